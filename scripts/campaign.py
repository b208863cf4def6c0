#!/usr/bin/env python3
"""Fault campaigns: thousands of seeded accidents, each of which must end well. Prints one JSON object.

    python scripts/campaign.py corruptions --count 5000 --seed 1 --json
    python scripts/campaign.py corruptions --only 1234 --seed 1          # one case of it again, with what was logged

    python scripts/campaign.py faults --count 300 --seed 1 --json        # about 8 s each on two idle cores

`corruptions` damages files of real checkpoint directories and loads them; `faults` kills a training's processes at
random moments and at named points, and starts it again. The work is done in `campaign_tools`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The models, the oracle and the processes are those of the distributed tests.
for folder in (HERE, HERE.parent, HERE.parent / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line. Every verb sets `run`: arguments -> (result, its text, whether all is well)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    corruptions = verbs.add_parser("corruptions", help="damage files, then load")
    add = corruptions.add_argument
    add("--count", type=int, default=5000, help="cases (default 5000)")
    add("--seed", type=int, default=1, help="default 1; the same seed makes the same cases")
    add("--only", type=int, default=None, metavar="CASE", help="run one case only, and show what it logs")
    add("--deadline", type=float, default=20.0, metavar="S", help="seconds that a load may take (default 20)")
    add("--seconds", type=float, default=float("inf"), help="stop after so long, with the cases done until then")
    add("--work-dir", default=None, help="where to work (default: a directory in memory)")
    add("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    corruptions.set_defaults(run=run_corruptions)
    faults = verbs.add_parser("faults", help="kill trainers, agents and nodes, then start again")
    faults.add_argument("--count", type=int, default=300, help="faults (default 300)")
    faults.add_argument("--seed", type=int, default=1, help="default 1; the same seed draws the same faults")
    faults.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    faults.add_argument("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    faults.set_defaults(run=run_faults)
    return parser


def run_faults(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    """Runs the campaign of killed processes."""
    from campaign_tools.faults import BAD, run, table

    result = run(
        arguments.count,
        arguments.seed,
        lambda text: print(text, file=sys.stderr, flush=True),
        seconds=arguments.seconds,
    )
    return result, table(result), not any(result[name] for name in BAD)


def run_corruptions(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    """Runs the campaign of damaged files."""
    from campaign_tools.corruptions import BAD, run, table

    result = run(arguments)
    return result, table(result), not any(result[name] for name in BAD)


def main() -> int:
    """Runs a campaign; 0 if nothing bad happened, else 1."""
    arguments = build_parser().parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    # What a library prints must not come between the result and its reader.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result, text, well = arguments.run(arguments)
    print(json.dumps(result) if arguments.json else text, file=out, flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # The interpreter's own teardown of torch.distributed can take seconds and nobody waits for it.
    os._exit(status)

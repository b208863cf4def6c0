"""`python -m moc_ckpt.launch SCRIPT …`: runs a training script that nobody may touch, with the plugin hooked in.

Works under torchrun and under `deepspeed --module moc_ckpt.launch SCRIPT …`, whose `--local_rank=N`
comes before the script's name and is handed on to the script.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import moc_ckpt  # noqa: F401  (registers the hook)

__all__ = ["main"]

_USAGE = "usage: python -m moc_ckpt.launch SCRIPT [ARGUMENTS …]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script as `__main__`.

    Args:
        argv: script and its arguments, after launcher options such as `--local_rank=N`; the process's own by default.

    Returns:
        2 for wrong use; else the script's own exit ends the process, or 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    launcher = []
    while arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        option = arguments.pop(0)
        launcher.append(option)
        if "=" not in option and arguments:
            launcher.append(arguments.pop(0))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"moc_ckpt.launch: no such script: {script}\n{_USAGE}", file=sys.stderr)
        return 2
    # As `python SCRIPT` would see it.
    sys.argv = [str(script), *launcher, *arguments[1:]]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A short campaign of damaged files; the long one is `scripts/campaign.py corruptions` (docs/campaigns.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROOT = Path(__file__).resolve().parents[2]


def test_every_accident_ends_well() -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts/campaign.py"),
        "corruptions",
        "--count",
        "100",
        "--seed",
        "20",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout)
    bad = ("wrong_tensors", "unhandled", "hangs", "lost_commits", "needless", "silent", "unnamed", "touched_live_state")
    assert {name: result[name] for name in bad} == dict.fromkeys(bad, 0), result["bad_cases"]
    assert done.returncode == 0
    assert result["cases"] == 100 and result["loads"] == 200
    assert result["exact"] + result["recovered"] + result["refused"] == 200
    # All three happen, or the campaign damages nothing that matters.
    assert min(result["exact"], result["recovered"], result["refused"]) > 0

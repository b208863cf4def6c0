"""A short fault campaign: what is killed comes back as promised; and the judge sees what is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from campaign_tools.faults import BAD, Campaign, Life, draw, recounted_plt  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

#: 300 is the long form.
COUNT = 300 if os.environ.get("MOC_TEST_FULL") == "1" else 6


@pytest.mark.timeout(120 * COUNT)
def test_what_is_killed_comes_back() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "campaign.py"), "faults", "--count", str(COUNT), "--json"]
    env = {key: value for key, value in os.environ.items() if key != "MOC_SHM_DIR"}
    done = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, env=env, check=False)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert [(name, result[name]) for name in BAD if result[name]] == [], result["unexpected"]
    assert result["cases"] == COUNT and done.returncode == 0
    assert result["recovered"] >= COUNT // 2


def judge(tmp_path: Path, **rank: object) -> Campaign:
    campaign = Campaign(None, 1, lambda text: None)
    life = Life(tmp_path, 3)
    for number in range(2):
        life.note(f"rank{number}", {"pid": 1, "agent": 0, "found": 7, "wrong": [], **rank})
    assert campaign._is_right(life, 7, 6, "") is (not rank)
    return campaign


def test_the_judge(tmp_path: Path) -> None:
    assert judge(tmp_path).counts == Counter(recovered=1)
    assert judge(tmp_path, found=6).counts == Counter(lost_memory=1)
    assert judge(tmp_path, found=5).counts == Counter(lost_commits=1)
    assert judge(tmp_path, wrong=["h.0.weight"]).counts == Counter(wrong_tensors=1)
    nobody = Campaign(None, 1, lambda text: None)
    assert not nobody._is_right(Life(tmp_path, 4), 7, 6, "why") and nobody.counts == Counter(refused=1)


def test_a_recount_of_the_loss() -> None:
    body = {
        "attempt": 2,
        "step": 9,
        "ledger": {
            "processed": [[100, 100], [50, 50]],
            "lost": [[10, 0], [0, 0]],
            "routed": [200, 100],
            "recoveries": [{"lost": [10, 0]}],
        },
        "units": [
            {"name": "dense/h", "attempt": 1, "step": 1, "tokens": None},
            {"name": "expert/0/0", "attempt": 1, "step": 4, "tokens": 60},
            {"name": "expert/0/1", "attempt": 2, "step": 9, "tokens": 100},
            {"name": "expert/1/0", "attempt": 2, "step": 8, "tokens": 45},
        ],
    }
    assert recounted_plt(body) == pytest.approx(((10 + 30) / 200 + 5 / 100) / 2)


def test_every_fault_is_drawn() -> None:
    rng = random.Random(1)
    drawn = Counter((fault.kind, fault.point) for fault in (draw(rng) for _ in range(4000)))
    kinds = {kind for kind, point in drawn if point == "random"}
    assert kinds == {"trainer", "trainers", "agent", "everything", "node"}
    assert len({point for _, point in drawn}) == 12

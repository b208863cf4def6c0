"""A short fault campaign: what is killed comes back as promised; and the judge sees what is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from campaign_tools.faults import BAD, Campaign, Life, draw  # noqa: E402
from campaign_tools.tally import Tally  # noqa: E402

from moc_ckpt.pec.ledger import Ledger, Recovery  # noqa: E402

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
    assert result["lossy"] > 0, "no restore lost a token, so the recount showed nothing"


def judge(tmp_path: Path, **rank: object) -> Campaign:
    campaign = Campaign(None, 1, lambda text: None)
    life = Life(tmp_path, 3)
    for number in range(2):
        life.note(f"rank{number}", {"pid": 1, "agent": 0, "found": 7, "lost": 5, "wrong": [], **rank})
    assert campaign._is_right(life, 7, 6, "") is (not rank)
    return campaign


def test_the_judge(tmp_path: Path) -> None:
    assert judge(tmp_path).counts == Counter(recovered=1, lossy=1, tokens_lost=5)
    assert judge(tmp_path, found=6).counts == Counter(lost_memory=1)
    assert judge(tmp_path, found=5).counts == Counter(lost_commits=1)
    assert judge(tmp_path, wrong=["h.0.weight"]).counts == Counter(wrong_tensors=1)
    nobody = Campaign(None, 1, lambda text: None)
    assert not nobody._is_right(Life(tmp_path, 4), 7, 6, "why") and nobody.counts == Counter(refused=1)


def body(version: tuple[int, int], *experts: tuple[int, int]) -> dict[str, Any]:
    """A manifest's body, as far as it is looked at: its version, and those of the experts of the only layer."""
    named = [("dense/h", version), *((f"expert/0/{number}", found) for number, found in enumerate(experts))]
    units = [{"name": name, "attempt": attempt, "step": step} for name, (attempt, step) in named]
    return {"attempt": version[0], "step": version[1], "units": units}


def test_a_recount_of_the_loss(tmp_path: Path) -> None:
    """Three updates of 10 and 1 tokens on each of two ranks, then restores of older versions, twice of the same one."""

    def life(number: int) -> list[Tally]:
        return [Tally(tmp_path, rank, 2, number, [2]) for rank in (1, 0)]

    first = life(0)
    for step in (1, 2, 3):
        for tally in first:
            tally.trained([[10, 1]], [12], (1, step))
    for tally in life(1):
        tally.restored(body((1, 3), (1, 1), (1, 3)))
        # Of expert 0 two updates of 2 x 10 tokens are gone.
        assert tally.counts() == {
            "processed": [[60, 6]],
            "lost": [[40, 0]],
            "routed": [72],
            "recoveries": [[40]],
            "plt": 40 / 72,
        }
        tally.trained([[10, 1]], [12], (2, 4))
    (_, tally) = life(2)
    tally.restored(body((2, 4), (2, 4), (1, 2)))
    # What expert 0 has lost before is lost already; expert 1 has the first two updates.
    assert tally.counts()["recoveries"] == [[40], [4]] and tally.counts()["lost"] == [[40, 4]]
    right = Ledger.start([2], [1])
    right = replace(
        right,
        processed=(np.array([80, 8]),),
        lost=(np.array([40, 4]),),
        routed=(96,),
        recoveries=(Recovery(1, 3, (40,), 0.0), Recovery(2, 4, (4,), 0.0)),
    )
    event = {"plt": 44 / 96, "lost": [4]}
    assert tally.differences(right, event) == [] and tally.differences(right, None) == []
    assert len(tally.differences(right, {**event, "plt": 0.4})) == 1
    assert len(tally.differences(right, {**event, "lost": [5]})) == 1
    assert len(tally.differences(replace(right, processed=(np.array([81, 8]),)), event)) == 1
    wrong = replace(right, recoveries=(Recovery(1, 3, (40,), 0.0), Recovery(2, 4, (0,), 0.0)))
    assert len(tally.differences(wrong, event)) == 2


def test_every_fault_is_drawn() -> None:
    rng = random.Random(1)
    drawn = Counter((fault.kind, fault.point) for fault in (draw(rng) for _ in range(4000)))
    kinds = {kind for kind, point in drawn if point == "random"}
    assert kinds == {"trainer", "trainers", "agent", "everything", "node"}
    assert len({point for _, point in drawn}) == 12

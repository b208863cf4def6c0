"""From the times of single blocks to what is reported. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Block", "arm_report", "merge_ranks", "quantile", "summarise", "to_json"]


@dataclass(slots=True)
class Block:
    """What one rank measured over one block of steps; times in seconds.

    Attributes:
        arm: name of the arm that was compared.
        with_arm: False for the block beside it, without checkpointing.
        steps: time of each step. On a GPU by its events, else by the wall clock; explicit saves are between the steps.
        wall: of the whole block, the device drained at both ends.
        calls: per checkpoint, host time inside the checkpointing's code: save calls, hooks, waits for the copy.
        drain: from the block's end until the last background work was done; nothing trained meanwhile.
        cpu: processor seconds of this process.
        cpu_others: the same of agents and helper processes; on the first local rank only.
        rss: resident bytes of this process at the end, without shared memory.
        rss_others: the same of agents and helpers; first local rank only.
        shared: bytes of shared memory in use, arenas and the like; first local rank only.
        first: this block held the arm's first checkpoint.
    """

    arm: str
    with_arm: bool
    steps: list[float]
    wall: float
    calls: list[float] = field(default_factory=list)
    drain: float = 0.0
    cpu: float = 0.0
    cpu_others: float = 0.0
    rss: int = 0
    rss_others: int = 0
    shared: int = 0
    first: bool = False


def quantile(values: Sequence[float], share: float) -> float:
    """Returns a quantile by linear interpolation; nan of nothing.

    Args:
        values: in any order.
        share: 0 to 1.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def merge_ranks(ranks: Sequence[Sequence[Block]]) -> list[Block]:
    """Returns the blocks of the job: the slowest rank's times, everyone's processor time and memory.

    Args:
        ranks: the blocks of each rank, in the same order.

    Raises:
        ValueError: if the ranks did not run the same blocks.
    """
    merged = []
    for same in zip(*ranks, strict=True):
        first = same[0]
        if len({(one.arm, one.with_arm, one.first, len(one.steps), len(one.calls)) for one in same}) > 1:
            raise ValueError(f"the ranks ran different blocks of {first.arm}: {[len(one.calls) for one in same]} saves")
        merged.append(
            Block(
                arm=first.arm,
                with_arm=first.with_arm,
                steps=[max(column) for column in zip(*(one.steps for one in same), strict=True)],
                wall=max(one.wall for one in same),
                calls=[max(column) for column in zip(*(one.calls for one in same), strict=True)],
                drain=max(one.drain for one in same),
                cpu=sum(one.cpu for one in same),
                cpu_others=sum(one.cpu_others for one in same),
                rss=sum(one.rss for one in same),
                rss_others=sum(one.rss_others for one in same),
                shared=sum(one.shared for one in same),
                first=first.first,
            )
        )
    return merged


def arm_report(blocks: Sequence[Block], arm: str) -> dict[str, Any]:
    """Returns what one arm cost, against the blocks beside it.

    `calls_ms` is the host time inside the checkpointing's code. `lost_ms` is all that the training loop lost: the wall
    time of the arm's blocks above that of the blocks beside them, by checkpoint; the difference is what the steps
    themselves slowed down by. Both are medians, `lost_ms` over pairs of blocks.

    Args:
        blocks: merged blocks, in the order they ran, without the first checkpoint's.
        arm: its name.
    """
    mine = [one for one in blocks if one.arm == arm]
    pairs = [(a, b) if a.with_arm else (b, a) for a, b in zip(mine[::2], mine[1::2], strict=True)]
    if not pairs or any(not a.with_arm or b.with_arm for a, b in pairs):
        raise ValueError(f"the blocks of {arm} are not pairs")
    steps = [step for block, _ in pairs for step in block.steps]
    beside = [step for _, block in pairs for step in block.steps]
    calls = [call for block, _ in pairs for call in block.calls]
    saves = [max(1, len(block.calls)) for block, _ in pairs]
    lost = [(block.wall - other.wall) / count for (block, other), count in zip(pairs, saves, strict=True)]
    step_ms, beside_ms = _ms(statistics.median(steps)), _ms(statistics.median(beside))
    return {
        "checkpoints": len(calls),
        "calls_ms": _ms(quantile(calls, 0.5)),
        "calls_p99_ms": _ms(quantile(calls, 0.99)),
        "lost_ms": _ms(statistics.median(lost)),
        "lost_low_ms": _ms(quantile(lost, 0.25)),
        "lost_high_ms": _ms(quantile(lost, 0.75)),
        "steps": len(steps),
        "step_ms": step_ms,
        "none_ms": beside_ms,
        "step_ratio": step_ms / beside_ms,
        "step_p99_ms": _ms(quantile(steps, 0.99)),
        "none_p99_ms": _ms(quantile(beside, 0.99)),
        "p99_ratio": quantile(steps, 0.99) / quantile(beside, 0.99),
        "wall_ratio": statistics.median(block.wall / other.wall for block, other in pairs),
        "drain_ms": _ms(statistics.median(block.drain for block, _ in pairs)),
        "cpu_s": statistics.median(
            (block.cpu - other.cpu) / count for (block, other), count in zip(pairs, saves, strict=True)
        ),
        "cpu_others_s": statistics.median(
            block.cpu_others / count for (block, _), count in zip(pairs, saves, strict=True)
        ),
        "rss_bytes": max(block.rss for block, _ in pairs),
        "rss_others_bytes": max(block.rss_others for block, _ in pairs),
        "shared_bytes": max(block.shared for block, _ in pairs),
    }


def summarise(blocks: Sequence[Block], names: Sequence[str], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the report's arms.

    Args:
        blocks: merged blocks in the order they ran.
        names: of the arms.
        facts: by arm what is known beside the times: bytes, set-up, K.
    """
    report = {}
    for name in names:
        later = [one for one in blocks if one.arm == name and not one.first]
        first = [one for one in blocks if one.arm == name and one.first]
        entry = {**arm_report(later, name), **facts.get(name, {})}
        if first:
            usual = statistics.median(step for one in later if not one.with_arm for step in one.steps)
            entry["first_ms"] = _ms(statistics.median(one.wall - usual * len(one.steps) for one in first))
            entry["first_calls_ms"] = _ms(statistics.median(sum(one.calls[:1]) for one in first))
        report[name] = entry
    return report


def to_json(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Returns the single blocks as plain data."""
    return [asdict(block) for block in blocks]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)

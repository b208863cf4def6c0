"""What is compared: the arms by name, and the order in which blocks of steps are trained. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BASELINE", "INTERVALS", "PEERS", "Arm", "ArmError", "all_arms", "blocks", "parse_arm", "plugin_section"]

BASELINE = "none"
INTERVALS = (1, 5, 10)
#: Peers of other projects; they are tried only when asked for.
PEERS = ("lm_resiliency", "nvrx", "dlrover")
_EXPLICIT = ("native", "dcp", "durable")


class ArmError(ValueError):
    """There is no such arm."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of checkpointing.

    Attributes:
        kind: native, dcp, durable (ours, blocking), full or pec (ours, asynchronous), or a peer.
        interval: steps between two checkpoints; 0: one in the middle of every block.
        persist: ours also writes to storage.
    """

    kind: str
    interval: int = 0
    persist: bool = False

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.kind + (f"/{self.interval}" if self.interval else "") + ("+persist" if self.persist else "")

    @property
    def ours(self) -> bool:
        """Whether this is the plugin's asynchronous pipeline."""
        return self.kind in ("full", "pec")

    def label(self) -> str:
        """As in tables and plots."""
        every = "" if not self.interval else "every step" if self.interval == 1 else f"every {self.interval}"
        text = {
            "native": "DeepSpeed save_checkpoint",
            "dcp": "torch DCP async_save",
            "durable": "moc_ckpt, durable, K = N",
            "full": f"moc_ckpt, K = N, {every}",
            "pec": f"moc_ckpt, PEC, {every}",
        }.get(self.kind, f"{self.kind}{', ' + every if every else ''}")
        return text + (", persist" if self.persist else "")


def parse_arm(name: str) -> Arm:
    """Returns the arm of a name such as `native`, `pec/5` or `full/1+persist`.

    Raises:
        ArmError: naming what can be chosen.
    """
    base, plus, rest = name.partition("+")
    kind, slash, interval = base.partition("/")
    steps = int(interval) if interval.isdigit() else 0
    known = kind in _EXPLICIT or kind in PEERS or kind in ("full", "pec")
    if not known or (plus and (rest != "persist" or kind not in ("full", "pec"))) or (slash and steps < 1):
        raise ArmError(
            f"no arm {name!r}: choose {', '.join(_EXPLICIT)}, full/STEPS, pec/STEPS (with +persist: also written to "
            f"storage), or a peer: {', '.join(PEERS)}"
        )
    if kind in ("full", "pec") and not steps:
        raise ArmError(f"arm {name!r} needs an interval, such as {kind}/1")
    if kind in _EXPLICIT and slash:
        raise ArmError(f"arm {kind!r} saves once in every block; it has no interval")
    return Arm(kind, steps, bool(plus))


def all_arms() -> list[Arm]:
    """Returns every arm but the peers: native, DCP, and ours with all experts and with PEC."""
    ours = [Arm(kind, steps, persist) for kind in ("full", "pec") for persist in (False, True) for steps in INTERVALS]
    return [Arm("native"), Arm("dcp"), *ours]


def blocks(
    arms: Sequence[Arm], pairs: int, rounds: int, seed: int = 0, *, explicit_pairs: int | None = None
) -> list[list[tuple[Arm, list[bool]]]]:
    """Returns the order of blocks: by round the arms, and for each the blocks with it (True) and without.

    Every block with an arm has one without any checkpointing right beside it, in the same process and on the same
    engine; which of the two comes first alternates at random, equally often within an arm where `pairs` is even.

    Args:
        arms: the arms.
        pairs: pairs of blocks per arm and round.
        rounds: how often all arms are gone through, each time in another order.
        seed: of the order; equal on all ranks.
        explicit_pairs: pairs of arms that save explicitly, once in every block: their saves take seconds. As the others
            if not given.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(rounds):
        entry = []
        for arm in draw.sample(list(arms), len(arms)):
            explicit = arm.kind in _EXPLICIT and explicit_pairs is not None
            first = [bool(number % 2) for number in range(explicit_pairs if explicit else pairs)]
            draw.shuffle(first)
            entry.append((arm, [with_arm for one in first for with_arm in (one, not one)]))
        found.append(entry)
    return found


def plugin_section(
    arm: Arm,
    known: Sequence[str],
    *,
    save_dir: str,
    experts: int,
    k: int | str,
    k_persist: int | str,
    persist_interval: int,
) -> dict[str, Any]:
    """Returns the section `moc_checkpoint` of an arm of ours.

    Args:
        arm: the arm.
        known: keys that the installed version has.
        save_dir: where it persists.
        experts: N.
        k: k_snapshot of PEC.
        k_persist: k_persist of PEC.
        persist_interval: steps.

    Raises:
        ArmError: if the installed version cannot do this arm.
    """
    section: dict[str, Any] = {"enabled": True, "storage": {"keep_last": 1}}
    if arm.kind == "durable":
        return {**section, **({"save_mode": "durable"} if "save_mode" in known else {})}
    full = arm.kind == "full"
    wanted = {
        "save_mode": "async",
        "snapshot_interval": arm.interval,
        "persist_interval": persist_interval if arm.persist else 0,
        "save_dir": save_dir if arm.persist else None,
        "dynamic_k": False,
    }
    missing = [key for key in wanted if key not in known]
    if missing:
        raise ArmError(f"arm {arm.name}: the installed moc_ckpt has no {', '.join(missing)}")
    section |= {"k_snapshot": experts if full else k, "k_persist": experts if full else k_persist, **wanted}
    if "host" in known:
        # The agent is not to outlive the benchmark by much.
        section["host"] = {"linger_s": 5.0}
    return section

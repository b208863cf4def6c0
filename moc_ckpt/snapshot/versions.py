"""Which versions of a unit must stay in memory, so that all ranks always have a common one (DESIGN section 8). Pure."""

from __future__ import annotations

from collections.abc import Iterable

from moc_ckpt.snapshot.records import Slot, SlotState

__all__ = ["freeable", "rolled_back"]

_IDLE = (SlotState.FILLED, SlotState.COMMITTED)


def freeable(
    slots: Iterable[Slot], *, confirmed: int, committed: int | None = None, keep_committed: bool = False
) -> list[Slot]:
    """Returns the slots whose versions nobody needs any more.

    Of each unit the newest version up to the newest confirmed snapshot stays: every rank that owns part of the unit
    has it whole. Newer versions stay too, and so does whatever is being filled or persisted. As long as a version that
    is the newest confirmed one anywhere is freed nowhere, all ranks have a common dense version and, of every unit,
    a common version not after it.

    This holds only if the slots of snapshots that were not confirmed have been freed on all ranks, and those of
    rolled-back timelines as well (`rolled_back`): a version that some ranks lack must not count as the newest.

    Args:
        slots: all live slots of the units concerned; other units may be left out.
        confirmed: step of the newest snapshot known to be FILLED on every rank.
        committed: step of the newest commit; None if there is none.
        keep_committed: keep, of each unit, the newest version up to the newest commit as well.

    Returns:
        FILLED and COMMITTED slots, to be freed.
    """
    versions: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.state != SlotState.FILLING and slot.step <= confirmed:
            versions.setdefault(slot.unit, []).append(slot)
    gone: list[Slot] = []
    for found in versions.values():
        if len(found) == 1:
            continue
        # Of two copies of one version the one in use stays.
        found.sort(key=lambda slot: (slot.attempt, slot.step, slot.state not in _IDLE, slot.state))
        needed = {found[-1].index}
        if keep_committed and committed is not None:
            needed.update([slot.index for slot in found if slot.step <= committed][-1:])
        gone += [slot for slot in found if slot.index not in needed and slot.state in _IDLE]
    return gone


def rolled_back(slots: Iterable[Slot], *, attempt: int, forked_at: int) -> list[Slot]:
    """Returns the slots of earlier attempts that are after the step at which the current attempt forked.

    They are of a timeline that training left; a version of the current attempt with the same step is another one.

    Args:
        slots: live slots.
        attempt: the current attempt.
        forked_at: the step that it was restored to.

    Returns:
        FILLED and COMMITTED slots, to be freed.
    """
    return [slot for slot in slots if slot.attempt < attempt and slot.step > forked_at and slot.state in _IDLE]

"""Units and their numbers in a few words. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable

from moc_ckpt.state.unit import parse_expert_unit

__all__ = ["compact_units", "number_ranges"]

_MOST_GROUPS = 12


def number_ranges(numbers: Iterable[int], separator: str = ", ") -> str:
    """Returns e.g. "0-3, 7"; an empty text for no numbers."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return separator.join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def compact_units(names: Iterable[str], most: int = _MOST_GROUPS) -> str:
    """Returns unit names in a few words, e.g. "expert/0-3/2,5-7; dense/h.0.attn".

    Args:
        names: the units. Layers of which the same experts are named share one group.
        most: groups to write; of more than that the rest is counted.
    """
    layers: dict[int, list[int]] = {}
    groups: list[tuple[str, int]] = []
    for name in sorted(set(names)):
        place = parse_expert_unit(name)
        if place is None:
            groups.append((name, 1))
        else:
            layers.setdefault(place[0], []).append(place[1])
    alike: dict[str, list[int]] = {}
    for layer, experts in sorted(layers.items()):
        alike.setdefault(number_ranges(experts, ","), []).append(layer)
    experts_of = [
        (f"expert/{number_ranges(some, ',')}/{text}", sum(len(layers[layer]) for layer in some))
        for text, some in alike.items()
    ]
    groups = experts_of + groups
    shown = "; ".join(text for text, _ in groups[:most])
    more = sum(count for _, count in groups[most:])
    return shown + (f"; and {more} more" if more else "")

"""A heat map in the terminal: one row per MoE layer, one cell per expert, shaded by how old its version is.

Every cell has a character too, so the map also reads without colour: in a pipe, in a log, in copied text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

__all__ = ["Grid", "HeatMap", "Level", "choose_grid", "choose_levels"]

_FRESH = "."
_OLDER = "123456789abcdef"
_BINS = 9
_MISSING = "?"
_WRAPPED_LINES = 48
"""Lines that a map may take to give every expert a cell of its own; beyond that several share one."""
_GROUP = 8
_LAYER = "layer"
_OLDEST = "oldest"
_GAP = 2
_ROOM_FOR_OLDEST = 50
# Dark blue to yellow. Lightness only grows, so it also reads in grey and for the colour-blind.
_RAMP = ((38, 28, 92), (58, 76, 140), (42, 112, 142), (32, 146, 140), (53, 183, 121), (144, 215, 67), (253, 231, 37))
# With 16 colours the ramp would be rounded to a few of them out of order.
_FEW_COLOURS = ("blue", "cyan", "green", "yellow", "red")


@dataclass(frozen=True, slots=True)
class Level:
    """The ages that one character stands for.

    Attributes:
        mark: the character.
        low: youngest age in steps.
        high: oldest age in steps.
    """

    mark: str
    low: int
    high: int

    @property
    def text(self) -> str:
        """The ages, for the legend."""
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}-{self.high:,}"


@dataclass(frozen=True, slots=True)
class Grid:
    """How the experts are laid out.

    Attributes:
        per_cell: neighbouring experts that share a cell.
        per_line: cells in a line.
        cell: columns of a cell, 1 or 2.
    """

    per_cell: int
    per_line: int
    cell: int


def choose_levels(ages: Iterable[int]) -> tuple[Level, ...]:
    """Returns what the characters of a map mean (pure).

    Args:
        ages: the ages to be shown, in steps, in any order.

    Returns:
        Ascending levels: `.` for age 0 if there is one, then `1` and so on. Up to 15 different ages have one each;
        more of them share nine bins of equal width.
    """
    distinct = sorted(set(ages))
    fresh = [Level(_FRESH, 0, 0)] if 0 in distinct else []
    older = [age for age in distinct if age]
    if len(older) <= len(_OLDER):
        return (*fresh, *(Level(mark, age, age) for mark, age in zip(_OLDER, older, strict=False)))
    # Ages are multiples of the interval between saves: bins that begin and end at such multiples read best.
    grain = math.gcd(*older)
    first, last = older[0], older[-1]
    width = grain * _round_up(-(-((last - first) // grain + 1) // _BINS))
    lows = range(first, last + 1, width)
    return (
        *fresh,
        *(Level(mark, low, min(low + width - grain, last)) for mark, low in zip(_OLDER, lows, strict=False)),
    )


def _round_up(number: int) -> int:
    """Returns the least of 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, … that is not less."""
    scale = 10 ** max(len(str(number)) - 2, 0)
    for step in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100):
        if step * scale >= number:
            return step * scale
    raise AssertionError(number)  # 100 * scale has one digit more than the number


def choose_grid(columns: int, counts: Collection[int]) -> Grid:
    """Lays the experts out in the columns that there are (pure).

    Args:
        columns: columns for cells, at least 1.
        counts: experts of each layer.

    Returns:
        Cells of two columns where that fits (nearly square in most fonts), else of one. A layer that is wider takes
        several lines, or, if these would be too many, the least power of two of its experts share a cell.
    """
    most = max(1, *counts)
    per_cell = 1
    if most > columns:
        whole = columns // _GROUP * _GROUP or columns
        lines = -(-most // whole)
        even = min(-(-most // (lines * _GROUP)) * _GROUP, whole)
        if sum(-(-count // even) for count in counts) <= _WRAPPED_LINES:
            return Grid(1, even, 1)
        while -(-most // per_cell) > columns:
            per_cell *= 2
    cells = -(-most // per_cell)
    return Grid(per_cell, cells, 2 if 2 * cells <= columns else 1)


class HeatMap:
    """The ages of all experts, for `rich.console.Console.print`; fits itself to the console's width and colours.

    Args:
        ages: age in steps by expert, by layer ordinal.
        counts: experts of each layer by ordinal; those without an age are shown as missing.
        note: where to find exact ages; shown if the map itself does not have them.
    """

    def __init__(self, ages: Mapping[int, Mapping[int, int]], counts: Mapping[int, int], note: str = "") -> None:
        self._ages = ages
        self._counts = dict(sorted(counts.items()))
        self._note = note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the lines."""
        if not self._counts:
            return
        label = max(
            len(_LAYER), *(len(f"{ordinal}") for ordinal in self._counts), len(f"+{max(self._counts.values())}")
        )
        oldest = {ordinal: max(self._ages.get(ordinal, {}).values(), default=None) for ordinal in self._counts}
        side = max(len(_OLDEST), *(len(_number(age)) for age in oldest.values()))
        side = side if options.max_width >= _ROOM_FOR_OLDEST else 0
        columns = max(options.max_width - label - _GAP - (side + _GAP if side else 0), 1)
        grid = choose_grid(columns, self._counts.values())
        cells = {ordinal: self._cells(ordinal, grid) for ordinal in self._counts}
        shown = [age for row in cells.values() for age in row if age is not None]
        levels = choose_levels(shown)
        styles = _styles(levels, None if console.no_color else console.color_system)

        head = Text(_LAYER.rjust(label) + " " * _GAP, style="bold")
        head.append(_ruler(grid).ljust(grid.per_line * grid.cell), style="dim")
        if side:
            head.append(" " * _GAP + _OLDEST.rjust(side))
        yield _line(head)
        plain = Style()
        for ordinal, row in cells.items():
            marks = [_MISSING if age is None else _mark(levels, age) for age in row]
            for start in range(0, max(len(row), 1), grid.per_line):
                part = marks[start : start + grid.per_line]
                name = f"+{start}" if start else f"{ordinal}"
                line = [Segment(name.rjust(label) + " " * _GAP, Style(dim=True) if start else plain)]
                line += [Segment(mark.ljust(grid.cell), styles.get(mark, plain)) for mark in part]
                if side and not start:
                    room = " " * ((grid.per_line - len(part)) * grid.cell + _GAP)
                    line.append(Segment(room + _number(oldest[ordinal]).rjust(side)))
                yield from Segment.adjust_line_length(line, options.max_width, pad=False)
                yield Segment.line()
        missing = any(age is None for row in cells.values() for age in row)
        yield from _legend(levels, styles, options.max_width, missing=missing)
        if notes := list(self._notes(grid, levels)):
            yield Text("; ".join(notes), style="dim")

    def _cells(self, ordinal: int, grid: Grid) -> list[int | None]:
        """Returns the age in each cell: of experts that share one, the oldest; None if one is missing."""
        ages = self._ages.get(ordinal, {})
        found: list[int | None] = []
        for first in range(0, self._counts[ordinal], grid.per_cell):
            some = [ages.get(expert) for expert in range(first, min(first + grid.per_cell, self._counts[ordinal]))]
            known = [age for age in some if age is not None]
            found.append(max(known) if len(known) == len(some) else None)
        return found

    def _notes(self, grid: Grid, levels: tuple[Level, ...]) -> Iterator[str]:
        if grid.per_cell > 1:
            yield f"each cell is the oldest of {grid.per_cell} neighbouring experts"
        elif grid.per_line < max(self._counts.values()):
            yield f"+{grid.per_line} goes on with expert {grid.per_line} of the same layer"
        if self._note and (grid.per_cell > 1 or any(level.low != level.high for level in levels)):
            yield self._note


def _number(age: int | None) -> str:
    return "-" if age is None else f"{age:,}"


def _line(text: Text) -> Text:
    text.rstrip()
    text.no_wrap = True
    text.overflow = "crop"
    return text


def _mark(levels: tuple[Level, ...], age: int) -> str:
    return next(level.mark for level in levels if age <= level.high)


def _ruler(grid: Grid) -> str:
    """Returns the numbers of experts above their cells, as close as they fit."""
    end = grid.per_line * grid.cell
    tick = 1
    while tick < grid.per_line and tick * grid.cell < len(f"{(grid.per_line - 1) * grid.per_cell}") + 2:
        tick *= 2
    text = ""
    for cell in range(0, grid.per_line, tick):
        text = text.ljust(cell * grid.cell) + f"{cell * grid.per_cell}"
    return text if len(text) <= end else text[:end].rpartition(" ")[0]


def _styles(levels: tuple[Level, ...], system: str | None) -> dict[str, Style]:
    """Returns the style of each mark, all plain if there are no colours."""
    if system is None:
        return {level.mark: Style() for level in levels}
    styles = {_MISSING: Style(color="bright_white", bgcolor="magenta", bold=True)}
    for index, level in enumerate(levels):
        # Level 0 of a map without fresh experts is old already.
        position = index / max(len(levels) - 1, 1) if levels[0].mark == _FRESH else (index + 1) / len(levels)
        if system in ("standard", "windows"):
            colour = _FEW_COLOURS[round(position * (len(_FEW_COLOURS) - 1))]
            styles[level.mark] = Style(color="black", bgcolor=colour)
        else:
            back = _blend(position)
            light = 0.3 * back.red + 0.59 * back.green + 0.11 * back.blue > 110
            front = ColorTriplet(0, 0, 0) if light else ColorTriplet(255, 255, 255)
            styles[level.mark] = Style(color=Color.from_triplet(front), bgcolor=Color.from_triplet(back))
    return styles


def _blend(position: float) -> ColorTriplet:
    place = position * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    part = place - index
    red, green, blue = (
        round(low + (high - low) * part) for low, high in zip(_RAMP[index], _RAMP[index + 1], strict=True)
    )
    return ColorTriplet(red, green, blue)


def _legend(levels: tuple[Level, ...], styles: Mapping[str, Style], width: int, *, missing: bool) -> Iterator[Text]:
    """Yields the lines of the legend; none of its entries is broken."""
    entries = [(level.mark, level.text) for level in levels]
    if missing:
        entries.append((_MISSING, "not in the checkpoint"))
    line = Text("steps behind:")
    for mark, text in entries:
        if line.cell_len + _GAP + len(mark) + 1 + len(text) > width and line.cell_len > _GAP:
            yield _line(line)
            line = Text()
        line.append(" " * _GAP)
        line.append(mark, styles.get(mark, Style()))
        line.append(f" {text}")
    yield _line(line)

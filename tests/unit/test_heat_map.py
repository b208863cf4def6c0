from __future__ import annotations

import io
import re
import time
from itertools import pairwise
from math import ceil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moc_ckpt.cli.heat_map import HeatMap, choose_grid, choose_levels

Ages = dict[int, dict[int, int]]


def draw(ages: Ages, counts: dict[int, int], width: int, colours: str | None = None, note: str = "") -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=colours, force_terminal=colours is not None)  # type: ignore[arg-type]
    console.print(HeatMap(ages, counts, note))
    return out.getvalue()


def plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines())


def parse(text: str) -> tuple[dict[int, list[str]], dict[str, tuple[int, int]], dict[int, str], int]:
    """Reads a map as a person would: (marks by layer, ages by mark, column "oldest", experts in a cell)."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("steps behind:"))
    ruler, rows = lines[0], lines[1:start]
    legend = " ".join(lines[start:])
    left = re.match(r"\s*layer  ", ruler)
    assert left is not None
    right = ruler.find("oldest")
    end = right if right >= 0 else None
    per_cell = int(found[1]) if (found := re.search(r"oldest of (\d+) neighbouring", legend)) else 1
    bodies: list[tuple[str, str]] = []
    oldest: dict[int, str] = {}
    for row in rows:
        label, body = row[: left.end()].strip(), row[left.end() :]
        if right >= 0 and not label.startswith("+"):
            oldest[int(label)] = body.split()[-1]
            body = body[: -len(body.split()[-1])]
        bodies.append((label, body.rstrip()))
    wide = 2 if all(not body[1::2].strip() for _, body in bodies) else 1
    for tick in re.finditer(r"\d+", ruler[left.end() : end]):
        assert tick.start() * per_cell == int(tick[0]) * wide
    marks: dict[int, list[str]] = {}
    layer = -1
    for label, body in bodies:
        if label.startswith("+"):
            assert len(marks[layer]) * per_cell == int(label)
        else:
            layer = int(label)
            marks[layer] = []
        marks[layer] += list(body[::wide])
    entries = re.findall(
        r"(\S) ([\d,]+)(?:-([\d,]+))?(?:  |$|\s)", legend.partition("each cell")[0][len("steps behind:") :]
    )
    levels = {mark: (int(low.replace(",", "")), int((high or low).replace(",", ""))) for mark, low, high in entries}
    return marks, levels, oldest, per_cell


# ---- the scale ----


@given(st.lists(st.integers(0, 5000) | st.integers(0, 40).map(lambda n: 10 * n), min_size=1, max_size=60))
def test_every_age_has_one_level(ages: list[int]) -> None:
    levels = choose_levels(ages)
    marks = [level.mark for level in levels]
    assert len(set(marks)) == len(marks) and len(marks) <= 16
    for age in ages:
        assert sum(level.low <= age <= level.high for level in levels) == 1
    for before, after in pairwise(levels):
        assert before.low <= before.high < after.low
    assert (levels[0].mark == ".") == (0 in ages)
    assert levels[-1].high == max(ages) and levels[0].low == min(ages)
    if len(set(ages) - {0}) <= 15:
        assert [level.low for level in levels] == [level.high for level in levels] == sorted(set(ages))
    else:
        assert len(levels) <= 10


def test_bins_follow_the_interval_between_saves() -> None:
    levels = choose_levels(range(0, 320, 10))
    assert [level.text for level in levels][:4] == ["0", "10-40", "50-80", "90-120"]
    assert levels[-1].text == "290-310"
    assert [level.text for level in choose_levels([0, 1000, 20])] == ["0", "20", "1,000"]
    assert [(level.mark, level.low) for level in choose_levels(range(0, 160, 10))][-2:] == [("e", 140), ("f", 150)]


# ---- the grid ----


@given(st.integers(1, 250), st.lists(st.integers(1, 600), min_size=1, max_size=70))
def test_the_grid_fits_and_has_room_for_every_expert(columns: int, counts: list[int]) -> None:
    grid = choose_grid(columns, counts)
    assert grid.per_line * grid.cell - (grid.cell - 1) <= columns
    lines = sum(ceil(ceil(count / grid.per_cell) / grid.per_line) for count in counts)
    if max(counts) <= columns:
        assert grid.per_cell == 1 and lines == len(counts)
    if grid.per_cell > 1:
        assert lines == len(counts)
        assert max(counts) > columns * (grid.per_cell // 2)  # fewer to a cell would not fit
    elif max(counts) > columns:
        assert lines <= 48


def test_few_layers_wrap_and_many_share_cells() -> None:
    assert choose_grid(63, [256] * 4) == choose_grid(63, [256])
    wrapped, binned = choose_grid(63, [256] * 4), choose_grid(63, [256] * 60)
    assert (wrapped.per_cell, wrapped.per_line) == (1, 56)
    assert (binned.per_cell, binned.per_line) == (8, 32)
    assert choose_grid(64, [256] * 60).per_cell == 4
    assert choose_grid(63, [16] * 60).cell == 2


# ---- the map ----


@settings(deadline=None, max_examples=50)
@given(
    width=st.integers(24, 170),
    layers=st.sampled_from([1, 2, 5, 60]),
    experts=st.sampled_from([1, 2, 7, 16, 65, 256, 300]),
    alike=st.booleans(),
    kinds=st.sampled_from([[0, 10], [0, 7, 14, 21, 1000], list(range(0, 400, 5)), [30]]),
    colours=st.sampled_from(["truecolor", "256", "standard"]),
    seed=st.integers(0, 1000),
)
def test_a_reader_finds_every_age(
    width: int, layers: int, experts: int, alike: bool, kinds: list[int], colours: str, seed: int
) -> None:
    random = Random(seed)
    counts = {layer: experts if alike else random.randint(1, experts) for layer in range(layers)}
    ages = {layer: {expert: random.choice(kinds) for expert in range(count)} for layer, count in counts.items()}
    text = plain(draw(ages, counts, width))
    assert all(len(line) <= width for line in text.splitlines())
    marks, levels, oldest, per_cell = parse(text)
    assert set(marks) == set(counts)
    for layer, count in counts.items():
        groups = [range(first, min(first + per_cell, count)) for first in range(0, count, per_cell)]
        assert len(marks[layer]) == len(groups)
        for mark, group in zip(marks[layer], groups, strict=True):
            low, high = levels[mark]
            assert low <= max(ages[layer][expert] for expert in group) <= high
        if width >= 50:
            assert int(oldest[layer].replace(",", "")) == max(ages[layer].values())
    # Colours change nothing that can be read.
    assert plain(draw(ages, counts, width, colours)) == text


def test_how_it_looks() -> None:
    ages = {0: dict(enumerate([0, 0, 10, 20])), 1: dict(enumerate([20, 10, 0, 0, 10, 0]))}
    assert plain(draw(ages, {0: 4, 1: 6}, 80)).splitlines() == [
        "layer  0   2   4     oldest",
        "    0  . . 1 2           20",
        "    1  2 1 . . 1 .       20",
        "steps behind:  . 0  1 10  2 20",
    ]


def test_notes_say_what_a_map_does_not_show() -> None:
    exact = {0: {expert: expert * 10 for expert in range(8)}}
    assert "NOTE" not in draw(exact, {0: 8}, 80, note="NOTE")
    coarse = {0: {expert: expert * 10 for expert in range(40)}}
    assert "NOTE" in draw(coarse, {0: 40}, 80, note="NOTE")
    many = {layer: dict.fromkeys(range(256), 10) for layer in range(60)}
    text = draw(many, dict.fromkeys(range(60), 256), 80, note="NOTE")
    assert "oldest of 4 neighbouring experts" in text and "NOTE" in text
    few = draw({0: many[0]}, {0: 256}, 80, note="NOTE")
    assert "+64 goes on with expert 64" in few and "NOTE" not in few


def test_a_shared_cell_shows_the_oldest() -> None:
    ages = {layer: dict.fromkeys(range(256), 0) for layer in range(60)}
    ages[7] |= {100: 10, 101: 30, 102: 20}
    marks, levels, oldest, per_cell = parse(plain(draw(ages, dict.fromkeys(range(60), 256), 80)))
    assert per_cell == 4 and levels == {".": (0, 0), "1": (30, 30)} and oldest[7] == "30"
    assert marks[7] == ["."] * 25 + ["1"] + ["."] * 38


def test_missing_experts_show() -> None:
    text = plain(draw({0: {0: 0, 2: 10}}, {0: 3, 1: 2}, 80))
    assert "    0  . ? 1" in text and "    1  ? ?" in text and "? not in the checkpoint" in text
    # One that shares its cell with others must not hide.
    ages = {layer: dict.fromkeys(range(256), 0) for layer in range(60)}
    del ages[7][100]
    marks, _, _, per_cell = parse(plain(draw(ages, dict.fromkeys(range(60), 256), 80)))
    assert per_cell == 4 and marks[7][25] == "?" and sum(row.count("?") for row in marks.values()) == 1


def test_older_is_lighter() -> None:
    ages = {0: {expert: expert * 10 for expert in range(10)}}
    row = draw(ages, {0: 10}, 80, "truecolor").splitlines()[1]
    shades = [tuple(map(int, found)) for found in re.findall(r"48;2;(\d+);(\d+);(\d+)m", row)]
    light = [0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue in shades]
    assert len(light) == 10 and light == sorted(light) and light[-1] > 3 * light[0]
    # Old versions do not look fresh just because nothing is fresh.
    (only,) = re.findall(r"48;2;(\d+);(\d+);(\d+)m", draw({0: {0: 500}}, {0: 1}, 80, "truecolor").splitlines()[1])
    assert tuple(map(int, only)) == shades[-1]


@pytest.mark.parametrize("colours", ["truecolor", "256", "standard"])
def test_marks_can_be_told_from_their_background(colours: str) -> None:
    ages = {0: {expert: expert * 10 for expert in range(16)}}
    row = draw(ages, {0: 16}, 80, colours).splitlines()[1]
    styles = set(re.findall(r"\x1b\[([\d;]*\b(?:3|4|9|10)\d[\d;]*)m", row))
    assert len(styles) >= (5 if colours == "standard" else 10)


def test_no_color_is_respected() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="truecolor", no_color=True).print(
        HeatMap({0: {0: 0, 1: 10}}, {0: 2})
    )
    assert "48;" not in out.getvalue() and ". 1" in plain(out.getvalue())


def test_big_maps_are_quick() -> None:
    ages = {layer: {expert: expert % 32 * 10 for expert in range(256)} for layer in range(128)}
    start = time.perf_counter()
    draw(ages, dict.fromkeys(ages, 256), 300, "truecolor")
    assert time.perf_counter() - start < 5

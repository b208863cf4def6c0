"""The plot of the accuracy experiment, as SVG without any plotting library. Pure: equal numbers give equal text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from _plt_design import ROUTING
from _plt_report import LIMIT, Analysis

__all__ = ["Panel", "figure", "ticks"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SHAPES = ("circle", "square", "triangle")
_FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
_INK, _PALE, _BAND = "#222222", "#dddddd", "#ececec"
_WIDTH, _HEIGHT = 1120, 400
_TOP, _BOTTOM, _LEFT, _GAP = 74, 58, 70, 84
_PANEL = (_WIDTH - _LEFT - 2 * _GAP - 22) / 3


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from low to high, about `count` of them.

    Args:
        low: lower end.
        high: upper end, above it.
        count: how many are wanted.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * power - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class Panel:
    """One set of axes; collects SVG elements.

    Args:
        left: x of its left edge, px.
        title: above it.
        x_range: data range.
        y_range: data range.
        labels: of the x and the y axis.
        shown: how numbers of the x and the y axis are written.
    """

    def __init__(
        self,
        left: float,
        title: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        labels: tuple[str, str],
        shown: tuple[Callable[[float], str], Callable[[float], str]],
    ) -> None:
        self._left, self._right = left, left + _PANEL
        self._top, self._bottom = _TOP, _HEIGHT - _BOTTOM
        self._x_range, self._y_range = x_range, y_range
        self.parts = [_text((self._left + self._right) / 2, self._top - 12, title, size=13, weight="600")]
        self._axes(labels, shown)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the place of a data point, px.

        Args:
            x: abscissa.
            y: ordinate.
        """
        (x0, x1), (y0, y1) = self._x_range, self._y_range
        return (
            self._left + (x - x0) / (x1 - x0) * (self._right - self._left),
            self._bottom - (y - y0) / (y1 - y0) * (self._bottom - self._top),
        )

    def _axes(self, labels: tuple[str, str], shown: tuple[Callable[[float], str], Callable[[float], str]]) -> None:
        for value in ticks(*self._y_range):
            y = self.at(self._x_range[0], value)[1]
            self.parts.append(_line(self._left, y, self._right, y, _PALE))
            self.parts.append(_text(self._left - 6, y + 4, shown[1](value), anchor="end"))
        for value in ticks(*self._x_range, count=4):
            x = self.at(value, self._y_range[0])[0]
            self.parts.append(_line(x, self._bottom, x, self._bottom + 4, _INK))
            self.parts.append(_text(x, self._bottom + 18, shown[0](value)))
        self.parts.append(_line(self._left, self._bottom, self._right, self._bottom, _INK))
        self.parts.append(_text((self._left + self._right) / 2, self._bottom + 38, labels[0], size=12))
        x, y = self._left - 52, (self._top + self._bottom) / 2
        self.parts.append(_text(x, y, labels[1], size=12, extra=f' transform="rotate(-90 {x:.1f} {y:.1f})"'))

    def band(self, low: float, high: float) -> None:
        """Shades a range of ordinates, behind everything.

        Args:
            low: lower end.
            high: upper end.
        """
        floor, ceiling = self._y_range
        x, top = self.at(self._x_range[0], min(high, ceiling))
        bottom = self.at(self._x_range[0], max(low, floor))[1]
        self.parts.insert(
            0,
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{self._right - self._left:.1f}" '
            f'height="{max(0.0, bottom - top):.1f}" fill="{_BAND}"/>',
        )

    def horizontal(self, y: float) -> None:
        """Draws a line across.

        Args:
            y: ordinate.
        """
        place = self.at(self._x_range[0], y)[1]
        self.parts.append(_line(self._left, place, self._right, place, _INK))

    def vertical(self, x: float, text: str) -> None:
        """Draws a dashed line up, with a text at its top.

        Args:
            x: abscissa.
            text: the text.
        """
        place = self.at(x, self._y_range[0])[0]
        self.parts.append(_line(place, self._top, place, self._bottom, _INK, extra=' stroke-dasharray="4 3"'))
        self.parts.append(_text(place + 4, self._top + 11, text, anchor="start", size=10))

    def mark(self, x: float, y: float, style: int, *, size: float, filled: bool, hint: str) -> None:
        """Draws a point.

        Args:
            x: abscissa.
            y: ordinate.
            style: which colour and shape.
            size: half its width, px.
            filled: or only its outline.
            hint: shown by a browser.
        """
        colour = _COLOURS[style % len(_COLOURS)]
        px, py = self.at(x, y)
        paint = f'fill="{colour if filled else "none"}" stroke="{colour}" stroke-width="1.3"'
        self.parts.append(_shape(style, px, py, size, paint, f"<title>{escape(hint)}</title>"))

    def curve(self, points: Sequence[tuple[float, float]], style: int, dash: str) -> None:
        """Draws a broken line.

        Args:
            points: its corners.
            style: which colour.
            dash: stroke-dasharray; empty for a solid line.
        """
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        colour = _COLOURS[style % len(_COLOURS)]
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>'
        )


def figure(analysis: Analysis) -> str:
    """Returns the plot: the loss at the end and right after the fault against PLT, and the recovery.

    Args:
        analysis: the statistics.
    """
    partial = sorted(k for k in analysis.settings.ks if k < analysis.settings.experts)
    styles = {k: number for number, k in enumerate(partial)}
    runs = analysis.partial()
    top = max([run["plt"] for run in runs] + [LIMIT])
    noise = 0.0 if math.isnan(analysis.noise) else analysis.noise
    parts = []
    for number, (title, value) in enumerate(
        (("Right after the fault", analysis.jump), ("At the end of training", analysis.delta))
    ):
        values = [value(run) for run in runs]
        band = 2 * noise if number else 0.0
        low, high = _padded(min([*values, -band]), max([*values, band]))
        panel = Panel(
            _LEFT + number * (_PANEL + _GAP),
            title,
            (0.0, top * 1.06),
            (low, high),
            ("PLT", "validation loss − loss without a fault"),
            (lambda x: f"{100 * x:g} %", lambda y: f"{y:+.3f}" if y else "0"),
        )
        if band:
            panel.band(-band, band)
        panel.horizontal(0.0)
        panel.vertical(LIMIT, "3.75 %")
        _scatter(panel, analysis, runs, value, styles)
        parts += panel.parts
    parts += _recovery_panel(analysis, styles)
    parts += _legend(analysis, styles, noise)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="{_FONT}" role="img">\n'
        "<title>Validation loss against the proportion of lost tokens</title>\n"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _scatter(
    panel: Panel,
    analysis: Analysis,
    runs: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
    styles: Mapping[int, int],
) -> None:
    for run in runs:
        hint = f"K {run['k']}, every {run['interval']} steps, seed {run['seed']}: {value(run):+.4f}"
        panel.mark(run["plt"], value(run), styles[run["k"]], size=3, filled=False, hint=hint)
    for k, interval in sorted({(run["k"], run["interval"]) for run in runs}):
        same = [run for run in runs if (run["k"], run["interval"]) == (k, interval)]
        mean = fmean(value(run) for run in same)
        hint = f"K {k}, every {interval} steps, mean over {len(same)} seeds: {mean:+.4f}"
        panel.mark(fmean(run["plt"] for run in same), mean, styles[k], size=5, filled=True, hint=hint)


def _recovery_panel(analysis: Analysis, styles: Mapping[int, int]) -> list[str]:
    settings = analysis.settings
    curves: list[tuple[int, str, list[float]]] = []
    for k in styles:
        interval = max(settings.intervals)
        runs = [run for run in analysis.partial() if (run["k"], run["interval"]) == (k, interval)]
        if runs:
            curves.append((styles[k], "", analysis.excess(runs)))
    repeats = [run for run in analysis.runs if run["kind"] == ROUTING]
    grey = len(_COLOURS) - 1
    if repeats:
        curves.append((grey, "2 3", analysis.excess(repeats)))
    values = [value for *_, curve in curves for value in curve]
    panel = Panel(
        _LEFT + 2 * (_PANEL + _GAP),
        f"Recovery (checkpoints every {max(settings.intervals)} steps)",
        (0.0, float(settings.steps - settings.fault)),
        _padded(min(values), max(values)),
        ("steps after the fault", "training loss − that of K = N"),
        (lambda x: f"{x:g}", lambda y: f"{y:+.3f}" if y else "0"),
    )
    panel.horizontal(0.0)
    for style, dash, curve in curves:
        points = [((at + 0.5) * settings.window, value) for at, value in enumerate(curve)]
        panel.curve(points, style, dash)
    return panel.parts


def _legend(analysis: Analysis, styles: Mapping[int, int], noise: float) -> list[str]:
    x, y = float(_LEFT), 24.0
    parts = []
    for k, style in styles.items():
        colour = _COLOURS[style % len(_COLOURS)]
        parts.append(_shape(style, x, y - 4, 5, f'fill="{colour}" stroke="{colour}"', ""))
        parts.append(_text(x + 10, y, f"K = {k}", anchor="start", size=12))
        x += 62
    seeds = len(analysis.seeds)
    notes = [f"filled: mean over {seeds} seeds, outlined: one seed"]
    if noise:
        notes.append(f"grey band: ± 2 standard deviations of the noise ({noise:.4f})")
    notes.append("dotted: no loss, other random numbers")
    parts.append(_text(x + 6, y, "; ".join(notes), anchor="start", size=11))
    return parts


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.08 or 1.0
    return low - room, high + room


def _shape(style: int, x: float, y: float, size: float, paint: str, inner: str) -> str:
    shape = _SHAPES[style % len(_SHAPES)]
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {paint}>{inner}</circle>'
    if shape == "square":
        box = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
        return f"<rect {box} {paint}>{inner}</rect>"
    corners = f"{x:.1f},{y - size * 1.2:.1f} {x - size * 1.1:.1f},{y + size:.1f} {x + size * 1.1:.1f},{y + size:.1f}"
    return f'<polygon points="{corners}" {paint}>{inner}</polygon>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", size: int = 11, weight: str = "400", extra: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{_INK}"{extra}>{escape(text)}</text>'
    )

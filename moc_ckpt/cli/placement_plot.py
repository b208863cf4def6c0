"""The plot of `moc-ckpt placement`; the only module that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moc_ckpt.cli.placement import Planned
from moc_ckpt.errors import ConfigError

__all__ = ["draw"]

_STYLES = {
    "mro": ("#009e73", "o", "-"),
    "mro_paper": ("#56b4e9", "s", "--"),
    "spread": ("#e69f00", "^", "-"),
    "compact": ("#cc79a7", "v", "-"),
}


def draw(found: Planned, path: Path) -> None:
    """Writes the chance that every expert survives against the number of failed nodes.

    Args:
        found: what was planned.
        path: of the picture; its suffix tells the format (svg, png, pdf).

    Raises:
        ConfigError: without matplotlib, or if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs {error.name}, which is not installed",
            where=f"--plot {path}",
            fix="pip install matplotlib, or read the table",
        ) from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    last = 1
    for name, values in found.survival.items():
        if values is None:
            continue
        colour, marker, line = _STYLES[name]
        marker = marker if found.nodes <= 32 else ""
        axes.plot(range(len(values)), values, color=colour, marker=marker, linestyle=line, label=name)
        last = max(last, next((k for k, value in enumerate(values) if value < 1e-3), len(values) - 1))
    if len(found.layers) == 1:
        bound = found.layers[0].bound
        axes.plot(range(len(bound)), bound, color="#888888", linestyle=":", label="upper bound")
    _label(axes, found, last)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot cannot be written: {error}", where=f"--plot {path}") from None


def _label(axes: Any, found: Planned, last: int) -> None:
    layers = f"MoE layer {found.layers[0].layer}" if len(found.layers) == 1 else f"{len(found.layers)} MoE layers"
    axes.set_title(f"{layers} on {found.nodes} nodes of {found.slots} slots")
    axes.set_xlabel("failed nodes")
    axes.set_ylabel("chance that every expert survives")
    axes.set_xlim(0, min(last + 1, found.nodes))
    axes.set_ylim(-0.02, 1.03)
    axes.grid(color="#dddddd")
    axes.legend(frameon=False)

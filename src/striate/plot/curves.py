"""Curves over a number of trained or removed layers: one line per kind of run, the mean over seeds with a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from striate.plot.style import DASHES, INK, STYLE, WIDTH, Mark, key, label, tidy, tip

TILES = 3  # panels in a row, where there are many


class Curve(NamedTuple):
    """One line: values by number of layers, per seed. `floor` is a dashed horizontal line."""

    seeds: Sequence[Mapping[int, float]]
    floor: float = math.nan

    def points(self) -> dict[int, list[float]]:
        """The values of all seeds, by number of layers."""
        numbers = sorted({number for seed in self.seeds for number in seed})
        return {number: [seed[number] for seed in self.seeds if number in seed] for number in numbers}


class Panel(NamedTuple):
    """Curves by name, with title and label; `unit` and `digits` format the values in tooltips."""

    curves: Mapping[str, Curve]
    title: str = ""
    ylabel: str = ""
    unit: str = ""
    digits: int = 1


@rc_context(STYLE)
def curves(panels: Sequence[Panel], style: Mapping[str, Mark], *, across: str, shared: bool = True) -> Figure:
    """Values against a number of layers, one panel per item; `across` is the label of the x axis.

    With several seeds, their mean, a band of one standard deviation each way, and a thin line per seed. `shared`: all
    panels have the same scale, and the y label of the first.
    """
    columns = len(panels) if len(panels) <= 2 else TILES
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 2.7 if columns < TILES else 0.5 + 1.5 * rows), layout="constrained")
    named = {name for panel in panels for name in panel.curves}
    key(figure, {name: mark for name, mark in style.items() if name in named}, lines=True)
    grid = figure.subplots(rows, columns, sharex=True, sharey=shared, squeeze=False)
    tiles = list(grid.flat)
    for axes, panel in zip(tiles, panels, strict=False):
        _panel(axes, panel, style, tile=columns == TILES)
        if not shared:
            axes.set_ylabel(panel.ylabel)
            axes.set_ylim(bottom=0)
    for axes in tiles[len(panels) :]:
        axes.set_axis_off()
    for axes in tiles[max(0, len(panels) - columns) : len(panels)]:
        axes.xaxis.set_tick_params(labelbottom=True)
    if shared:
        figure.supylabel(panels[0].ylabel, fontsize=10, color=INK)
    figure.supxlabel(across, fontsize=10, color=INK)
    return figure


@rc_context(STYLE)
def grid(rows: Sequence[Sequence[Panel]], style: Mapping[str, Mark], *, across: Sequence[str]) -> Figure:
    """Values against numbers of layers: one row of panels per kind of value, one column per kind of layers.

    `across` has the x label of each column. The panels of a row have the same scale, from zero up.
    """
    figure = Figure(figsize=(WIDTH, 0.5 + 1.7 * len(rows)), layout="constrained")
    named = {name for row in rows for panel in row for name in panel.curves}
    key(figure, {name: mark for name, mark in style.items() if name in named}, lines=True)
    tiles = figure.subplots(len(rows), len(across), sharex="col", sharey="row", squeeze=False)
    for line, row in zip(tiles, rows, strict=True):
        for axes, panel in zip(line, row, strict=True):
            _panel(axes, panel, style, tile=True)
            axes.set_ylim(bottom=0)
        line[0].set_ylabel(row[0].ylabel)
    for axes, title in zip(tiles[-1], across, strict=True):
        axes.set_xlabel(title)
    return figure


def _panel(axes: Axes, panel: Panel, style: Mapping[str, Mark], *, tile: bool) -> None:
    for name, curve in panel.curves.items():
        _curve(axes, name, curve, style[name], panel)
        if math.isfinite(curve.floor):
            axes.axhline(curve.floor, color=style[name].color, linewidth=0.8, linestyle=DASHES)
    if panel.title:
        axes.set_title(label(panel.title), fontsize=9)
    tidy(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(4 if tile else 6, integer=True))


def _curve(axes: Axes, name: str, curve: Curve, mark: Mark, panel: Panel) -> None:
    points = curve.points()
    if len(curve.seeds) > 1:
        for seed in curve.seeds:
            axes.plot(sorted(seed), [seed[x] for x in sorted(seed)], color=mark.color, linewidth=0.5, alpha=0.55)
        band = {x: (fmean(ys), stdev(ys)) for x, ys in points.items() if len(ys) > 1}
        low, high = ([mean + sign * spread for mean, spread in band.values()] for sign in (-1, 1))
        axes.fill_between(list(band), low, high, color=mark.color, alpha=0.13, linewidth=0)
    means = {x: fmean(ys) for x, ys in points.items()}
    line = DASHES if mark.dashed else "-"
    axes.plot(list(means), list(means.values()), color=mark.color, linewidth=1.4, linestyle=line)
    for x, mean in means.items():
        (dot,) = axes.plot([x], [mean], color=mark.color, marker=mark.shape, linestyle="", markersize=4)
        tip(dot, f"{name}, {x} layer{'s' * (x != 1)}: {_format(points[x], panel)}")


def _format(values: Sequence[float], panel: Panel) -> str:
    spread = f" ± {stdev(values):.{panel.digits}f}" if len(values) > 1 else ""
    seeds = f" (n = {len(values)})" if len(values) > 1 else ""
    return f"{fmean(values):.{panel.digits}f}{spread}{' ' * bool(panel.unit)}{panel.unit}{seeds}"

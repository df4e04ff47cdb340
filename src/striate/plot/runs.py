"""Figures that compare runs: accuracy, tasks, loss, cost, curves over a number of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from striate.plot.style import (
    DASHES,
    INK,
    STYLE,
    WIDTH,
    Estimate,
    Mark,
    from_zero,
    key,
    label,
    percent,
    region_cells,
    tidy,
    tip,
)
from striate.region import Region

POINTS = 200  # maximum number of points in a loss curve; more are averaged in equal blocks


class Cost(NamedTuple):
    """The cost of a training: wall-clock seconds and peak memory in GB, NaN where not measured."""

    seconds: float
    memory: float


@rc_context(STYLE)
def accuracy(
    visual: Mapping[str, Estimate],
    text: Mapping[str, Estimate],
    *,
    retention: Mapping[str, Estimate],
    regions: Mapping[str, Region],
    style: Mapping[str, Mark],
) -> Figure:
    """Each run's region as a row of cells, and bars for its mean accuracy on visual and on text tasks.

    One row per run in `style`; a run may be missing from the other mappings. `retention` is written above the bar of
    the visual accuracy.
    """
    panels = [(title, means) for title, means in (("visual", visual), ("text", text)) if means]
    height = 0.25 + 0.48 * len(style)
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.08))
    regions_axes, *bars = figure.subplots(1, 1 + len(panels), sharey=True, width_ratios=[1.0, *([1.05] * len(panels))])
    for row, (name, mark) in enumerate(style.items()):
        regions_axes.text(0, row - 0.16, label(name), va="center")
        if name in regions:
            region_cells(regions_axes, regions[name], row, mark.color)
        for axes, (_, means) in zip(bars, panels, strict=True):
            if name in means:
                _bar(axes, name, means[name], row, mark.color, retention.get(name) if means is visual else None)
    regions_axes.set(xlim=(0, 1), ylim=(len(style) - 0.5, -0.5))
    regions_axes.set_axis_off()
    for axes, (title, _) in zip(bars, panels, strict=True):
        axes.set_title(f"{title}, %")
        axes.set_xlim(0, 100)
        axes.set_axis_off()
    return figure


@rc_context(STYLE)
def tasks(values: Mapping[str, Mapping[str, Estimate]], style: Mapping[str, Mark]) -> Figure:
    """One row per task with the accuracy of every run; `values` is accuracy by task, then by run."""
    runs = [name for name in style if any(name in task for task in values.values())]
    figure, (axes,) = _figure(0.6 + len(values) * max(0.26, 0.07 * len(runs)), {n: style[n] for n in runs})
    for row, (title, task) in enumerate(values.items()):
        for i, name in enumerate(runs):
            if name in task:
                shift = 0.6 * ((i + 0.5) / len(runs) - 0.5)
                text = f"{title}, {name}: {percent(task[name])}"
                _point(axes, 100 * task[name].value, row + shift, style[name], text, x_error=100 * task[name].stderr)
    axes.set_yticks(range(len(values)), [label(task) for task in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel("accuracy, %")
    for row in range(len(values) - 1):
        axes.axhline(row + 0.5, color=INK, alpha=0.12, linewidth=0.6)
    tidy(axes, "x")
    return figure


@rc_context(STYLE)
def losses(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    style: Mapping[str, Mark],
    spikes: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Training loss (cross-entropy of an answer token, in nats) by step.

    Each name has the curves of one or several runs, one line of at most `POINTS` block means per run. Each of the
    `spikes` is marked with a dot.
    """
    figure, (axes,) = _figure(2.6, {name: mark for name, mark in style.items() if name in curves}, lines=True)
    for name, runs in curves.items():
        for curve in runs:
            (line,) = axes.plot(*thin(curve), color=style[name].color, linewidth=1.3 if len(runs) == 1 else 0.7)
            tip(line, name)
        for step, loss in (spikes or {}).get(name, ()):
            (dot,) = axes.plot([step], [loss], color=style[name].color, marker="o", markersize=4, linestyle="")
            tip(dot, f"{name}: {loss:.2f} in step {step:.0f}")
    axes.set(xlabel="step", ylabel="loss")
    tidy(axes, "y")
    return figure


def thin(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses of a curve, averaged in equal blocks if it has more than `POINTS` points."""
    size = math.ceil(len(curve) / POINTS)
    blocks = [list(zip(*curve[i : i + size], strict=True)) for i in range(0, len(curve), size)]
    steps, means = ([sum(axis) / len(axis) for axis in values] for values in zip(*blocks, strict=True))
    return steps, means


@rc_context(STYLE)
def cost(costs: Mapping[str, Cost], visual: Mapping[str, Estimate], style: Mapping[str, Mark]) -> Figure:
    """Visual accuracy against training time and against peak memory; the dashed line is the reference's accuracy."""
    complete = {name: mark for name, mark in style.items() if name in costs and name in visual}
    figure, panels = _figure(2.6, complete, columns=2)
    for axes, measure, title in zip(panels, ("seconds", "memory"), ("training, s", "peak memory, GB"), strict=True):
        for name, mark in complete.items():
            mean = visual[name]
            if mark.color == INK:
                axes.axhline(100 * mean.value, color=INK, alpha=0.5, linewidth=0.8, linestyle=DASHES)
            value = getattr(costs[name], measure)
            text = f"{name}: {percent(mean)}, {title} {value:.3g}"
            _point(axes, value, 100 * mean.value, mark, text, y_error=100 * mean.stderr)
        from_zero(axes, "x")
        axes.set_xlabel(title)
        tidy(axes, "y")
    panels[0].set_ylabel("visual accuracy, %")
    return figure


def _figure(
    height: float, style: Mapping[str, Mark], *, columns: int = 1, lines: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a legend of its runs on top; `height` in inches, without the legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    key(figure, style, lines=lines)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _bar(axes: Axes, name: str, mean: Estimate, row: float, color: str, kept: Estimate | None) -> None:
    """A bar from 0 to 100 with its number above, and the retention at the other end."""
    axes.barh(row + 0.18, 100, 0.26, color=INK, alpha=0.07)
    (bar,) = axes.barh(row + 0.18, 100 * mean.value, 0.26, color=color)
    tip(bar, f"{name}: {percent(mean)}")
    axes.errorbar(100 * mean.value, row + 0.18, xerr=100 * mean.stderr, color=INK, linewidth=1.2)
    axes.text(0, row - 0.16, f"{100 * mean.value:.1f}", va="center")
    if kept:
        axes.text(100, row - 0.16, f"{100 * kept.value:.1f} % kept", va="center", ha="right", alpha=0.65)


def _point(
    axes: Axes, x: float, y: float, mark: Mark, text: str, *, x_error: float = 0.0, y_error: float = 0.0
) -> None:
    bars = axes.errorbar(
        x,
        y,
        xerr=x_error,
        yerr=y_error,
        color=mark.color,
        marker=mark.shape,
        markeredgewidth=0,
        elinewidth=1.2,
    )
    tip(bars.lines[0], text)


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
            from_zero(axes, "y")
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
        from_zero(line[0], "y")  # the others share its scale
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

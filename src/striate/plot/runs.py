"""Figures that compare runs: accuracy, tasks, loss, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from striate.plot.style import DASHES, INK, STYLE, WIDTH, Estimate, Mark, key, label, percent, region_cells, tidy, tip
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
        axes.set_xlim(left=0)
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

"""Figures over the depth of one model: its layer scores, blocks of layers, single samples, reverted layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from striate.plot.style import INK, PALETTE, STYLE, WIDTH, Estimate, from_zero, label, tidy
from striate.region import Region

WIDE = 10.0  # values that span more than this factor are plotted on a logarithmic scale
SLACK = 0.25  # margin above and below a score, as a fraction of its range
COLUMNS, TILES = 2, 6  # panels per row, attention maps per row
KINDS = dict(zip(("image", "text", "prompt", "answer"), (PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[3]), strict=True))
BETTER, WORSE = PALETTE[0], PALETTE[1]  # blue and orange: distinct also for color-blind readers


class Profile(NamedTuple):
    """A score over the depth: one value per layer, NaN without a value.

    `stderr` is its standard error, `parts` the score by kind of token (those of `KINDS` are plotted).
    """

    values: Sequence[float]
    stderr: Sequence[float] | None = None
    parts: Mapping[str, Sequence[float]] = {}


class RevertProfile(NamedTuple):
    """Perplexities of a tuned model with groups of its layers reverted to the backbone, by group.

    `tuned`: no layer reverted; `backbone`: all layers reverted.
    """

    groups: Mapping[str, Estimate]
    tuned: Estimate
    backbone: Estimate

    @classmethod
    def from_json(cls, result: Mapping[str, Any]) -> RevertProfile:
        """The result of `striate revert` on one kind of data, from "reverted" in results.json."""

        def estimate(one: Mapping[str, Any]) -> Estimate:
            return Estimate(one["value"], math.nan if one["stderr"] is None else one["stderr"])

        groups = {name: estimate(one) for name, one in result["groups"].items()}
        return cls(groups, estimate(result["tuned"]), estimate(result["backbone"]))


@rc_context(STYLE)
def profiles(scores: Mapping[str, Profile], region: Region | None = None) -> Figure:
    """One small panel per score: its value by layer, a band of one standard error, and its parts.

    The layers of `region` are shaded. Values that span more than a factor of ten have a logarithmic scale.
    """
    kinds = [kind for kind in KINDS if any(kind in score.parts for score in scores.values())]
    rows = math.ceil(len(scores) / COLUMNS)
    figure = Figure(figsize=(WIDTH, 1.25 * rows + (0.25 if kinds else 0)), layout="constrained")
    panels = list(figure.subplots(rows, min(COLUMNS, len(scores)), squeeze=False).flat)
    for axes, (name, score) in zip(panels, scores.items(), strict=False):
        _profile(axes, score, region)
        axes.set_title(label(name.replace("_", " ")), fontsize=9)
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    if kinds:
        lines = [Line2D([], [], color=INK), *(Line2D([], [], color=KINDS[kind], linewidth=0.9) for kind in kinds)]
        figure.legend(lines, ["score", *kinds], loc="outside upper left", ncols=5, handlelength=1.2)
    return figure


@rc_context(STYLE)
def task_heatmaps(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel per score, tasks by layers: `scores` [score][task][layer], NaN without a value.

    Every row is scaled to its own range, so that it shows which layers its task needs, not which task scores high.
    A dot marks the layer with the highest value.
    """
    tasks = list(next(iter(scores.values())))
    height = 0.55 + 0.17 * len(tasks)
    figure = Figure(figsize=(WIDTH, height * len(scores) + 0.3), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(len(scores), 1, squeeze=False)[:, 0], scores.items(), strict=True):
        scaled = np.array([_scale_row(row) for row in rows.values()])
        axes.imshow(scaled, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
        for row, values in enumerate(scaled):
            if np.isfinite(values).any():
                axes.plot(int(np.nanargmax(values)), row, ".", color="#111111", markersize=3)
        axes.set_yticks(range(len(tasks)), [label(task) for task in tasks], fontsize=8)
        axes.set_title(label(name.replace("_", " ")), fontsize=9)
        _whole_numbers(axes)
    axes.set_xlabel("layer")
    return figure


def _scale_row(values: Sequence[float]) -> np.ndarray:
    """Values from 0 (the lowest) to 1; zeros where all are equal."""
    row = np.array(values, dtype=float)
    if not np.isfinite(row).any():
        return row
    low, high = np.nanmin(row), np.nanmax(row)
    return (row - low) / (high - low or 1)


@rc_context(STYLE)
def blocks(table: Sequence[Sequence[float]]) -> Figure:
    """Angular distances over blocks of layers: `table` [start][length - 1], NaN where a block does not fit.

    Every row (length of a block) is scaled to its own range, as in Gromov et al. 2024, figure 4: yellow is the smallest
    distance, and a dot marks it.
    """
    grid = np.array(table, dtype=float).T  # length, start
    figure = Figure(figsize=(WIDTH, 0.82 * WIDTH), layout="constrained")
    axes = figure.subplots()
    scaled = np.array([_scale_row(row) for row in grid])
    measured = np.flatnonzero(np.isfinite(scaled).any(axis=1))
    lengths = (0.5, len(grid) + 0.5)
    extent = (-0.5, grid.shape[1] - 0.5, *lengths)
    image = axes.imshow(scaled, cmap="viridis_r", origin="lower", aspect="auto", extent=extent, interpolation="none")
    axes.plot(np.nanargmin(grid[measured], axis=1), measured + 1, ".", color="#111111", markersize=3)
    axes.set(xlabel="first layer of the block", ylabel="layers in the block")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.5, label="angular distance, each row's range")
    bar.ax.set_yticklabels(["least", "most"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    _whole_numbers(axes)
    return figure


@rc_context(STYLE)
def instances(samples: Sequence[Sequence[float]]) -> Figure:
    """Image attention of every sample over all layers, one thin line per sample, and their mean.

    `samples` [sample][layer] are fractions, NaN in samples without images (the paper's figure 5).
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    rows = np.array(samples, dtype=float)
    rows = rows[np.isfinite(rows).any(axis=1)]
    for row in rows:
        axes.plot(row, color=PALETTE[0], linewidth=0.5, alpha=min(0.6, max(0.06, 12 / len(rows))))
    axes.plot(np.nanmean(rows, axis=0), color=INK, linewidth=1.8, label=f"mean of {len(rows)} samples")
    axes.legend(loc="best", handlelength=1.2)
    axes.set(xlabel="layer", ylabel="attention on image tokens")
    from_zero(axes, "y")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    tidy(axes, "y")
    _whole_numbers(axes)
    return figure


@rc_context(STYLE)
def overlay(image: np.ndarray, maps: np.ndarray) -> Figure:
    """Attention maps over an image, one panel per layer.

    `image` [height, width, 3] in 0..255, `maps` [L, h, w] attention >= 0 on h x w patches that cover the image. The
    maximum of each layer has the brightest color; absolute attention is in `instances`.
    """
    height, width = image.shape[:2]
    columns = min(TILES, len(maps))
    rows = math.ceil(len(maps) / columns)
    side = WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * (side * height / width + 0.2)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    gray = image @ np.array([0.299, 0.587, 0.114]) / 255
    extent = (0, width, height, 0)
    for layer, (axes, attention) in enumerate(zip(panels, maps, strict=False)):
        axes.imshow(gray, cmap="gray", vmin=0, vmax=1)
        axes.imshow(attention, cmap="inferno", alpha=0.6, vmin=0, extent=extent, interpolation="bilinear")
        axes.set_title(str(layer), fontsize=8, pad=2)
    return figure


@rc_context(STYLE)
def revert_profiles(panels: Mapping[str, RevertProfile]) -> Figure:
    """Perplexity with groups of layers reverted to the backbone, one panel per kind of data ("visual", "text").

    Two arrows lead to every group's perplexity: from the tuned model's (solid line) and from the backbone's (dashed).
    An arrow to the left (lower perplexity) is blue, one to the right is orange. (The paper's figure 1, left.)
    """
    names = list(next(iter(panels.values())).groups)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(names)), layout="constrained")
    row_of_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, panel) in zip(row_of_axes, panels.items(), strict=True):
        for value, line in ((panel.tuned.value, "-"), (panel.backbone.value, (0, (4, 3)))):
            axes.axvline(value, color=INK, linewidth=0.9, linestyle=line)
        for row, name in enumerate(names):
            mean = panel.groups[name]
            _arrow(axes, panel.tuned.value, mean.value, row - 0.16)
            _arrow(axes, panel.backbone.value, mean.value, row + 0.16)
            axes.errorbar(mean.value, row, xerr=mean.stderr, color=INK, marker="o", markersize=4, elinewidth=1.0)
        axes.set_title(title)
        axes.set_yticks(range(len(names)), [label(name) for name in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="perplexity")
        tidy(axes, "x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    key = [
        Line2D([], [], color=INK, linewidth=0.9),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 3))),
        Line2D([], [], color=BETTER, marker="<"),
        Line2D([], [], color=WORSE, marker=">"),
    ]
    figure.legend(key, ["tuned", "backbone", "lower", "higher"], loc="outside upper left", ncols=4, handlelength=1.6)
    figure.supylabel("reverted layers", fontsize=10)
    return figure


def _profile(axes: Axes, score: Profile, region: Region | None) -> None:
    layers = range(len(score.values))
    for layer in region or ():
        axes.axvspan(layer - 0.5, layer + 0.5, color=INK, alpha=0.09, linewidth=0)
    for kind, color in KINDS.items():
        if kind in score.parts:
            axes.plot(layers, score.parts[kind], color=color, linewidth=0.9)
    if score.stderr is not None:
        values, spread = np.array(score.values), np.array(score.stderr)
        axes.fill_between(layers, values - spread, values + spread, color=INK, alpha=0.2, linewidth=0)
    # A value between two gaps has no line: it needs a dot.
    axes.plot(layers, score.values, color=INK, linewidth=1.3, marker="." if len(layers) < 3 else "")
    axes.tick_params(labelsize=8)
    _fit(axes, score)
    tidy(axes, "y")
    _whole_numbers(axes)


def _fit(axes: Axes, score: Profile) -> None:
    """A scale that fits the score; distant parts are clipped."""
    values = np.array(score.values)
    if not np.isfinite(values).any():
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if 0 < WIDE * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_ylim(low / 1.5, high * 1.5)
        return
    axes.yaxis.set_major_locator(MaxNLocator(3))
    spread = np.nan_to_num(np.array(score.stderr)) if score.stderr is not None else np.zeros_like(values)
    low, high = float(np.nanmin(values - spread)), float(np.nanmax(values + spread))
    if slack := SLACK * (high - low):
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - slack), min(top, high + slack))


def _arrow(axes: Axes, start: float, end: float, row: float) -> None:
    color = BETTER if end < start else WORSE
    style = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.4}
    axes.annotate("", (end, row), (start, row), arrowprops=style)


def _whole_numbers(axes: Axes) -> None:
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

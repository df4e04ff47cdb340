"""The figures of the page, each with its numbers, and the heatmaps of layer scores."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate
from striate.region import Region
from striate.studies.report.compared import MODALITIES, ComparedRun, finite
from striate.studies.report.comparison import Arm, Comparison, Line, removed_lines, style, trained_lines

if TYPE_CHECKING:
    from striate.scores.table import Score, Scores


COSTS = ("seconds", "peak_memory_gb")
ALMOST = 0.98  # of the accuracy with all layers trained: the paper's dashed line
WHISKERS = "Whiskers: one standard error each way, over several seeds one standard deviation."
BANDS = "Several seeds: their mean, a band of one standard deviation, and one thin line per seed."
KINDS = ("svg", "png", "pdf", "csv")

Numbers = Sequence[Mapping[str, Any]]


TOP = 0.25  # share of the layers that is named beside a heatmap
FAINTEST = 0.06  # of a cell that has a value


class ReportFigure(NamedTuple):
    """A figure with title, caption and numbers; `name` is the stem of its files."""

    name: str
    title: str
    figure: plot.Figure
    caption: str
    numbers: Numbers

    @property
    def columns(self) -> list[str]:
        """Names of all numbers."""
        return list(dict.fromkeys(column for entry in self.numbers for column in entry))


def figures(comparison: Comparison) -> Iterator[ReportFigure]:
    """Every figure that there is data for."""
    arms = comparison.comparable_arms
    whole = [arm for arm in arms if not arm.first.pruned] or arms
    yield from _accuracy(comparison, whole)
    yield from _trained_figures(trained_lines(comparison))
    yield from _removal_figures(removed_lines(comparison))
    yield from _cost(comparison, whole)
    yield from _losses(comparison)
    for arm in comparison.arms:  # of several seeds only the first is shown
        for row in [row for row in arm.rows if row.scores or row.reverted][:1]:
            for title, figure, caption, numbers in layer_figures(row):
                yield ReportFigure(slug(title), title, figure, caption, numbers)


def save(figures: Sequence[ReportFigure], folder: Path) -> None:
    """Write every figure as SVG, PNG and PDF, and its numbers as CSV.

    Raises:
        UserError: the folder cannot be written.
    """
    for figure in figures:
        plot.save(figure.figure, folder, figure.name)
        write_csv(folder / f"{figure.name}.csv", figure.numbers)


def write_csv(file: Path, numbers: Numbers) -> None:
    """A header line, then one line per entry; missing values stay empty.

    Raises:
        UserError: the file cannot be written.
    """
    columns = list(dict.fromkeys(key for entry in numbers for key in entry))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", errors="replace", newline="") as out:
            writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(numbers)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def slug(title: str) -> str:
    """A title as the name of a file: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "figure"


def _accuracy(comparison: Comparison, arms: Sequence[Arm]) -> Iterator[ReportFigure]:
    shown = {arm.name: comparison.style[arm.name] for arm in arms}
    visual = {arm.name: mean for arm in arms if (mean := arm.visual)}
    text = {arm.name: mean for arm in arms if (mean := arm.text)}
    if not visual and not text:
        return
    kept = {arm.name: mean for arm in arms if arm is not comparison.whole and (mean := arm.share)}
    regions = {arm.name: arm.region for arm in arms if arm.region is not None}
    numbers = [
        {
            "run": name, **_both("visual, %", visual.get(name)), **_both("kept, %", kept.get(name)),
            **_both("text, %", text.get(name)),
        }
        for name in shown
    ]  # fmt: skip
    figure = plot.accuracy(visual, text, retention=kept, regions=regions, style=shown)
    caption = f"The tuned layers, and means over tasks, each task with the same weight. {WHISKERS}"
    yield ReportFigure("accuracy", "Accuracy", figure, caption, numbers)
    tasks = {name: found for name, found in _tasks(arms).items() if found}
    numbers = [
        {"task": task, "run": name, **_both("accuracy, %", mean)}
        for task, means in tasks.items()
        for name, mean in means.items()
    ]
    yield ReportFigure("accuracy-by-task", "Accuracy by task", plot.tasks(tasks, shown), WHISKERS, numbers)


def _tasks(arms: Sequence[Arm]) -> dict[str, dict[str, Estimate]]:
    """Means by task, then by arm; text tasks say so in their names."""
    found: dict[str, dict[str, Estimate]] = {}
    for modality in MODALITIES:
        for arm in arms:
            for name in arm.names(modality):
                mean = arm.task(name)
                if mean:
                    found.setdefault(f"{name} (text)" if modality == "text" else name, {})[arm.name] = mean
    return found


def _trained_figures(lines: Sequence[Line]) -> Iterator[ReportFigure]:
    """The paper's figures 2 and 3."""
    if not lines:
        return
    marks = style(lines)
    accuracy = {line.name: line.curve(_visual, ALMOST) for line in lines}
    panel = plot.Panel(accuracy, ylabel="visual accuracy, %", unit="%")
    caption = (
        f"Visual accuracy against the number of trained layers. Dashed: 98 % of that with all layers trained. {BANDS}"
    )
    figure = plot.curves([panel], marks, across="trained layers")
    yield ReportFigure("layers", "Number of trained layers", figure, caption, _points([panel], "trained layers"))
    costs = [
        plot.Panel({line.name: line.curve(methodcaller("training", name)) for line in lines}, "", title, unit, digits)
        for name, title, unit, digits in (
            ("seconds", "training, s", "s", 0),
            ("peak_memory_gb", "peak memory, GB", "GB", 2),
        )
    ]
    costs = [panel for panel in costs if any(curve.seeds for curve in panel.curves.values())]
    if costs:
        figure = plot.curves(costs, marks, across="trained layers", shared=False)
        numbers = _points(costs, "trained layers")
        yield ReportFigure(
            "cost-by-layers", "Cost by trained layers", figure, f"Training time and peak memory. {BANDS}", numbers
        )


def _removal_figures(lines: Sequence[Line]) -> Iterator[ReportFigure]:
    """The paper's figure 1, right, and figure 4."""
    if not lines:
        return
    marks = style(lines)
    mean = plot.Panel({line.name: line.curve(_visual) for line in lines}, ylabel="visual accuracy, %", unit="%")
    dashed = " Dashed: before healing." if any(line.dashed for line in lines) else ""
    caption = f"Visual accuracy against the number of removed layers.{dashed} {BANDS}"
    figure = plot.curves([mean], marks, across="removed layers")
    yield ReportFigure("pruning", "Pruning", figure, caption, _points([mean], "removed layers"))
    arms = [arm for line in lines for group in line.arms.values() for arm in group]
    names = list(dict.fromkeys(name for arm in arms for name in arm.names("visual")))
    if len(names) > 1:
        panels = [
            plot.Panel({line.name: line.curve(_of_task(name)) for line in lines}, name, "accuracy, %", "%")
            for name in names
        ]
        figure = plot.curves(panels, marks, across="removed layers")
        numbers = _points(panels, "removed layers")
        caption = f"Accuracy of each visual task against the number of removed layers.{dashed}"
        yield ReportFigure("pruning-by-task", "Pruning by task", figure, caption, numbers)


def _cost(comparison: Comparison, arms: Sequence[Arm]) -> Iterator[ReportFigure]:
    visual = {arm.name: mean for arm in arms if (mean := arm.visual)}
    costs = {}
    for arm in arms:
        means = [arm.training(name) for name in COSTS]
        if arm.name in visual and means[0]:
            costs[arm.name] = plot.Cost(*(mean.value if mean else math.nan for mean in means))
    if costs:
        shown = {name: mark for name, mark in comparison.style.items() if name in costs}
        numbers = [
            {
                "run": name, "training, s": cost.seconds, "peak memory, GB": finite(cost.memory),
                **_both("visual, %", visual[name]),
            }
            for name, cost in costs.items()
        ]  # fmt: skip
        caption = f"The dashed line is the accuracy of the reference. {WHISKERS}"
        yield ReportFigure("cost", "Cost", plot.cost(costs, visual, shown), caption, numbers)


def _losses(comparison: Comparison) -> Iterator[ReportFigure]:
    curves = {
        a.name: [row.curve for row in a.rows if row.curve] for a in comparison.arms if any(r.curve for r in a.rows)
    }
    if not curves:
        return
    spikes = {a.name: [spike for row in a.rows for spike in row.spikes] for a in comparison.arms}
    numbers = [
        {"run": row.name, "step": step, "loss": finite(loss)}
        for arm in comparison.arms
        for row in arm.rows
        if row.curve
        for step, loss in zip(*plot.thin(row.curve), strict=True)
    ]
    caption = f"Training loss by step; more than {plot.POINTS} steps are averaged in equal blocks. One line per run."
    if any(spikes.values()):
        caption += " Dots are losses far above those before them; their records are in log.jsonl."
    yield ReportFigure("loss", "Loss", plot.losses(curves, comparison.style, spikes), caption, numbers)


def _points(panels: Sequence[plot.Panel], across: str) -> Numbers:
    """Every value of the curves by number of layers, with the mean."""
    return [
        {
            "line": name, "panel": panel.title or panel.ylabel, across: number,
            "mean": math.fsum(values) / len(values), "n": len(values),
            **{f"value {i}": value for i, value in enumerate(values, start=1)},
        }
        for panel in panels
        for name, curve in panel.curves.items()
        for number, values in curve.points().items()
    ]  # fmt: skip


def _visual(row: ComparedRun) -> float | None:
    return None if row.visual is None else 100 * row.visual.value


def _of_task(name: str) -> Callable[[ComparedRun], float | None]:
    return lambda row: 100 * row.tasks[name]["value"] if name in row.tasks else None


def _both(name: str, mean: Estimate | None) -> dict[str, Any]:
    return {
        name: "" if mean is None else 100 * mean.value,
        f"{name} ±": "" if mean is None else finite(100 * mean.stderr),
    }


class HeatCell(NamedTuple):
    """A layer of a heatmap: shade 0..1, and its tooltip."""

    shade: float
    text: str


class Heatmap(NamedTuple):
    """One score over the depth: its cells, its range, and the most important layers."""

    name: str
    cells: Sequence[HeatCell]
    range: str
    top: str
    note: str


class RunHeatmaps(NamedTuple):
    """The scores of a run, and the runs of the same depth whose regions stand above them."""

    run: str
    depth: int
    about: str
    regions: Sequence[ComparedRun]
    scores: Sequence[Heatmap]


class Correlations(NamedTuple):
    """Rank correlations between the scores of a run, by the numbers of two scores; NaN where there is none."""

    names: Sequence[str]
    table: Sequence[Sequence[float]]


def heatmaps(row: ComparedRun, rows: Sequence[ComparedRun]) -> RunHeatmaps:
    """The scores of `row` under the regions of all `rows` whose model is as deep, one heatmap per score."""
    assert row.scores is not None
    scores = row.scores
    regions = [other for other in rows if other.region is not None and other.region.depth == scores.depth]
    about = f"{scores.model}, {scores.samples} records{', stopped before the last one' * scores.partial}"
    return RunHeatmaps(row.name, scores.depth, about, regions, [_heatmap(score) for score in scores.scores.values()])


def correlations(scores: Scores) -> Correlations:
    """How far each two scores agree on which layers are important; see `rank_correlation`."""
    from striate.scores.table import rank_correlation  # late: brings in torch

    table = list(scores.scores.values())
    return Correlations(
        [score.name for score in table], [[rank_correlation(one, other) for other in table] for one in table]
    )


def layer_figures(row: ComparedRun) -> Iterator[tuple[str, plot.Figure, str, list[dict[str, Any]]]]:
    """Title, figure, caption and numbers of the layer measurements of a run."""
    if row.scores:
        from striate.scores.figures import figures as score_figures  # late: brings in torch

        for figure in score_figures(row.scores, row.region):
            yield f"{figure.title}: {row.name}", figure.figure, figure.caption, _numbers(figure.name, row.scores)
    if row.reverted:
        caption = "Perplexity with layers reverted to the backbone: left is better."
        numbers = [
            {"data": data, "layers reverted": name, "perplexity": mean.value, "±": finite(mean.stderr)}
            for data, profile in row.reverted.items()
            for name, mean in {"none": profile.tuned, "all": profile.backbone, **profile.groups}.items()
        ]
        yield f"Layers reverted: {row.name}", plot.revert_profiles(row.reverted), caption, numbers


def _numbers(figure: str, scores: Scores) -> list[dict[str, Any]]:
    """The numbers of a figure of layer scores."""
    if figure in ("scores", "tasks"):
        by_task = [(n, {"task": task}, one) for n, score in scores.scores.items() for task, one in score.tasks.items()]
        listed = by_task if figure == "tasks" else [(name, {}, score) for name, score in scores.scores.items()]
        return [
            {"score": name, **task, "layer": layer, "value": finite(value), "±": finite(error)}
            for name, task, score in listed
            for layer, (value, error) in enumerate(
                zip(score.values, score.stderr or [math.nan] * len(score.values), strict=True)
            )
        ]
    score = scores.scores[figure]
    rows = score.samples if figure == "image_attention" else score.table
    names = ("sample", "layer") if figure == "image_attention" else ("first layer", "layers")
    return [
        {names[0]: i, names[1]: j if figure == "image_attention" else j + 1, "value": value}
        for i, row in enumerate(rows or ())
        for j, value in enumerate(row)
        if math.isfinite(value)
    ]


def _heatmap(score: Score) -> Heatmap:
    from striate.scores.table import order, shades  # late: brings in torch

    known = [value for value in score.values if math.isfinite(value)]
    cells = [_cell(layer, *shown) for layer, shown in enumerate(zip(score.values, shades(score), strict=True))]
    depth = len(score.values)
    most = [layer for layer in order(score) if math.isfinite(score.values[layer])][: max(1, round(TOP * depth))]
    note = f"{score.source}{f', n = {score.n}' if score.n else ''}{', low is important' * (score.direction == 'low')}"
    span = f"{min(known):.3g} to {max(known):.3g}" if known else "–"
    return Heatmap(score.name.replace("_", " "), cells, span, str(Region(tuple(most), depth)), note)


def _cell(layer: int, value: float, shade: float) -> HeatCell:
    if math.isnan(shade):
        return HeatCell(0.0, f"layer {layer}: not measured")
    return HeatCell(FAINTEST + (1 - FAINTEST) * shade, f"layer {layer}: {value:.4g}")

"""The figures of the page, each with its numbers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate
from striate.studies.report import layers
from striate.studies.report.arms import Arm
from striate.studies.report.compared import MODALITIES, ComparedRun, finite, of_task, of_training, share
from striate.studies.report.compared import text as text_of
from striate.studies.report.compared import visual as visual_of
from striate.studies.report.comparison import Comparison
from striate.studies.report.lines import Line, removed_lines, style, trained_lines

COSTS = ("seconds", "peak_memory_gb")
ALMOST = 0.98  # of the accuracy with all layers trained: the paper's dashed line
WHISKERS = "Whiskers: one standard error each way, over several seeds one standard deviation."
BANDS = "Several seeds: their mean, a band of one standard deviation, and one thin line per seed."
KINDS = ("svg", "png", "pdf", "csv")

Numbers = Sequence[Mapping[str, Any]]


class ReportFigure(NamedTuple):
    """A figure with title, caption and numbers; `name` is the stem of its files."""

    name: str
    title: str
    figure: plot.Figure
    caption: str
    numbers: Numbers


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
            for title, figure, caption, numbers in layers.figures(row):
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
    visual = {arm.name: mean for arm in arms if (mean := arm.mean(visual_of))}
    text = {arm.name: mean for arm in arms if (mean := arm.mean(text_of))}
    if not visual and not text:
        return
    kept = {arm.name: mean for arm in arms if arm is not comparison.whole and (mean := arm.mean(share))}
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
            for name in arm.measured[0].names(modality):
                mean = arm.mean(of_task(name))
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
        plot.Panel({line.name: line.curve(of_training(name)) for line in lines}, "", title, unit, digits)
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
    names = list(dict.fromkeys(name for arm in arms for name in arm.measured[0].names("visual")))
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
    visual = {arm.name: mean for arm in arms if (mean := arm.mean(visual_of))}
    costs = {}
    for arm in arms:
        means = [arm.mean(of_training(name)) for name in COSTS]
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

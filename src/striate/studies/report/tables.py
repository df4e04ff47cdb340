"""The tables of the page: runs that differ only in the seed on one line, and the tables of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from striate.plot import Estimate
from striate.region import Region
from striate.studies.report.compared import NOTHING, count, interval
from striate.studies.report.comparison import (
    Arm,
    Comparison,
    recipe_of,
    removed_lines,
    start,
    start_name,
    trained_lines,
)
from striate.studies.report.pairing import Retention
from striate.studies.report.treatment import kind

COSTS = {
    "trained parameters": "trainable_parameters",
    "time, s": "seconds",
    "records/s": "samples_per_second",
    "memory, GB": "peak_memory_gb",
}


class TableCell(NamedTuple):
    """A cell of a table: text, its number with its spread, and the arm whose mark stands before the text."""

    text: str
    value: float | None = None
    spread: float | None = None
    arm: str = ""


class Table(NamedTuple):
    """A table of the page and of a CSV file; the first column is what a line is about."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    lines: Sequence[Sequence[TableCell]]

    def numbers(self) -> list[dict[str, Any]]:
        """The table as it goes into a CSV file, percent as percent; a column with spreads has one more for them."""
        spread = {
            c for line in self.lines for c, cell in zip(self.columns, line, strict=True) if cell.spread is not None
        }
        found = []
        for line in self.lines:
            entry: dict[str, Any] = {}
            for column, cell in zip(self.columns, line, strict=True):
                entry[column] = cell.text.replace(NOTHING, "") if cell.value is None else cell.value
                if column in spread:
                    entry[f"{column} ±"] = "" if cell.spread is None else cell.spread
            found.append(entry)
        return found


def tables(comparison: Comparison) -> Iterator[Table]:
    """Every table that the runs have data for."""
    yield from strategies(comparison)
    yield from sizes(comparison)
    yield from models(comparison)
    yield from texts(comparison)
    yield from prunings(comparison)


def runs(comparison: Comparison) -> Table:
    """Every single run: its seed, what it measured, and how sure the difference from its reference is."""
    arms = {row.name: arm.name for arm in comparison.arms for row in arm.rows}
    grid = list(dict.fromkeys(key for row in comparison.rows for key, _ in row.values))
    lines = []
    for row in comparison.rows:
        kept, values, seed = row.kept, dict(row.values), row.info.get("seed")
        cells = [TableCell(row.name, arm=arms[row.name]), TableCell(NOTHING if seed is None else str(seed))]
        cells += [TableCell(values.get(key, NOTHING)) for key in grid]
        cells += [TableCell(NOTHING if row.region is None else str(row.region)), percent_cell(row.visual)]
        cells += (
            [percent_cell(Estimate(kept.share.value)), TableCell(interval(kept.share)), TableCell(verdict(kept))]
            if kept
            else 3 * [TableCell(NOTHING)]
        )
        p = kept.p if kept else math.nan
        cells += [
            TableCell(NOTHING) if math.isnan(p) else TableCell(f"{p:.2g}", p),
            percent_cell(row.text),
            TableCell("; ".join(row.notes)),
        ]
        lines.append(cells)
    columns = ("run", "seed", *grid, "layers", "visual", "kept", "95 % interval", "difference", "p", "text", "notes")
    caption = (
        "± is one standard error. Kept is relative to the reference on the same records; p is McNemar's, of all visual "
        "records, which weigh alike there, while kept weighs tasks alike."
    )
    return Table("runs", "Every run", caption, columns, lines)


def verdict(kept: Retention) -> str:
    """Whether the run is above or below the reference, or within noise."""
    return "within noise" if kept.noise else "below" if kept.lead.value < 0 else "above"


def strategies(comparison: Comparison) -> Iterator[Table]:
    """Which layers to train: regions of one size, chosen in different ways (the paper's first table)."""
    arms = [arm for arm in comparison.comparable_arms if not arm.first.pruned]
    tuned = [arm for arm in arms if arm.size and arm.fraction < 1]
    alike: dict[tuple[int, str], list[Arm]] = {}
    for arm in tuned:
        alike.setdefault((arm.size or 0, recipe_of(arm)), []).append(arm)
    same = [
        arm
        for ways in alike.values()
        if len({_choice(arm) for arm in ways}) > 1
        for arm in sorted(ways, key=_mean_visual, reverse=True)
    ]
    if not same:
        return
    around = [arm for arm in arms if arm.fraction in (0, 1)]
    columns, lines = _by_task([*around, *same], "visual", _strategy)
    yield Table(
        "strategies",
        "Which layers",
        "Visual accuracy, %, with regions of one size chosen in different ways; the best mean first.",
        ("run", "chosen", "layers", *columns),
        lines,
    )


def sizes(comparison: Comparison) -> Iterator[Table]:
    """How many layers to train (the paper's second table)."""
    for number, line in enumerate(trained_lines(comparison), start=1):
        arms = [arm for size in sorted(line.arms, reverse=True) for arm in line.arms[size]]
        columns, lines = _by_task(arms, "visual", lambda arm: [TableCell(str(arm.size), arm.size)], cost=True)
        yield Table(
            f"sizes-{number}",
            f"How many layers: {line.name}",
            "Visual accuracy, %, by the number of trained layers.",
            ("run", "layers", *columns),
            lines,
        )


def models(comparison: Comparison) -> Iterator[Table]:
    """Regions of several models, each against its own model with all layers tuned (the paper's third table)."""
    measured = [arm for arm in comparison.arms if arm.measured and arm.size and not arm.first.pruned]
    groups: dict[str, list[Arm]] = {}
    for arm in measured:
        groups.setdefault(start(arm.first), []).append(arm)
    if len(groups) < 2 or not all(any(arm.fraction == 1 for arm in group) for group in groups.values()):
        return

    def about(arm: Arm) -> list[TableCell]:
        return [TableCell(start_name(arm.first)), *_strategy(arm)]

    arms = [arm for group in groups.values() for arm in sorted(group, key=lambda arm: -arm.fraction)]
    columns, lines = _by_task(arms, "visual", about)
    caption = "Visual accuracy, %, of regions of several models. What is kept is against the run named as reference."
    yield Table("models", "Other models", caption, ("run", "model", "chosen", "layers", *columns), lines)


def texts(comparison: Comparison) -> Iterator[Table]:
    """What tuning on images does to tasks without images (the paper's fourth table)."""
    arms = [arm for arm in comparison.comparable_arms if arm.text and not arm.first.pruned]
    if len(arms) < 2:
        return
    arms.sort(key=lambda arm: (arm.region is not None, -arm.fraction))
    columns, lines = _by_task(arms, "text", _strategy)
    caption = "Accuracy, %, on tasks without images; the model before tuning comes first if it was measured."
    yield Table("text", "Text tasks", caption, ("run", "chosen", "layers", *columns), lines)


def prunings(comparison: Comparison) -> Iterator[Table]:
    """Pruned models by parent, way of choosing and number of layers."""
    lines = removed_lines(comparison)
    found = []
    for line in lines:
        for number in sorted(line.arms):
            for arm in line.arms[number]:
                gone = {", ".join(map(str, row.pruned.get("removed", ()))) for row in arm.rows}
                layers = gone.pop() if len(gone) == 1 else "by seed"
                cells = [TableCell(line.name), TableCell(str(number), number), TableCell(layers or NOTHING)]
                found.append([*cells, percent_cell(arm.visual), percent_cell(arm.text), _n(arm)])
    if found:
        columns = ("model", "removed", "which", "visual", "text", "n")
        yield Table("pruning", "Pruned models", "Accuracy, %, by the number of removed layers.", columns, found)


def percent_cell(mean: Estimate | None) -> TableCell:
    """A share of 1 in percent."""
    if mean is None:
        return TableCell(NOTHING)
    error = None if math.isnan(mean.stderr) else 100 * mean.stderr
    return TableCell(f"{100 * mean.value:.1f}", 100 * mean.value, error)


def cost_cells(arm: Arm) -> list[TableCell]:
    """Trained parameters, seconds, records per second and GB, each the mean of the runs."""
    return [_cost(arm, name) for name in COSTS.values()]


def _cost(arm: Arm, name: str) -> TableCell:
    values = [value for row in arm.rows if (value := row.training(name)) is not None]
    if not values:
        return TableCell(NOTHING)
    mean = fmean(values)
    if name == "trainable_parameters":
        return TableCell(count(mean), mean)
    digits = 2 if name == "peak_memory_gb" else 1 if name == "samples_per_second" or mean < 10 else 0
    return TableCell(f"{mean:,.{digits}f}", mean)


def _by_task(
    arms: Sequence[Arm], modality: str, about: Callable[[Arm], Sequence[TableCell]], *, cost: bool = False
) -> tuple[tuple[str, ...], list[list[TableCell]]]:
    """Columns and lines: what each arm is, its accuracy by task, the mean, and what it kept."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.names(modality)))
    lines = []
    for arm in arms:
        cells = [TableCell(arm.name, arm=arm.name), *about(arm)]
        cells += [percent_cell(arm.task(name)) for name in names]
        cells.append(percent_cell(arm.visual if modality == "visual" else arm.text))
        cells += [percent_cell(arm.share)] if modality == "visual" else []
        lines.append([*cells, *((_cost(arm, "seconds"), _cost(arm, "peak_memory_gb")) if cost else ()), _n(arm)])
    kept = ("kept",) if modality == "visual" else ()
    return (*names, "mean", *kept, *(("time, s", "memory, GB") if cost else ()), "n"), lines


def _n(arm: Arm) -> TableCell:
    return TableCell(str(len(arm.measured)), len(arm.measured))


def _strategy(arm: Arm) -> list[TableCell]:
    region = arm.first.region
    if region is None:
        return [TableCell("not tuned"), TableCell(NOTHING)]
    return [TableCell(_choice(arm)), TableCell(layers_of(arm))]


def layers_of(arm: Arm) -> str:
    """The region of an arm in words."""
    region: Region | None = arm.region or arm.first.region
    if region is None:
        return NOTHING
    return f"{region} of {region.depth}" if arm.region else f"{arm.size or 'some'} of {region.depth}, by seed"


def _choice(arm: Arm) -> str:
    return kind(arm.first.region) if arm.first.region is not None else "not tuned"


def _mean_visual(arm: Arm) -> float:
    return arm.visual.value if arm.visual else 0.0

"""Runs set side by side: retention against a reference, arms (runs that differ only in the seed), and
lines of arms that differ only in the number of trained or removed layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate, Mark
from striate.region import Region
from striate.studies.report.compared import ComparedRun, difference, find_runs, read_run
from striate.studies.report.pairing import Retention, compare_paired, compare_unpaired
from striate.studies.report.treatment import DEEP, kind, origin_of, settings, unlike, without_seed

# Options that say how many records a run saw; that is compared by their number.
AMOUNT = ("region", "steps", "epochs")
FEWEST = 3  # numbers of layers that make a line of trained ones; a pruned model and its parent do


@dataclass(frozen=True)
class Comparison:
    """Runs, and the one among them that the others are compared with."""

    rows: tuple[ComparedRun, ...]
    reference: ComparedRun

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The runs, grouped: the runs of an arm differ only in the seed."""
        return group_arms(self.rows)

    @property
    def whole(self) -> Arm:
        """The arm of the reference."""
        return next(arm for arm in self.arms if self.reference in arm.rows)

    @cached_property
    def comparable(self) -> tuple[ComparedRun, ...]:
        """The runs with results that are set against the reference, or against its twin of another seed.

        While the reference has no results: those on the first run's records.
        """
        measured = [row for row in self.rows if row.tasks]
        if self.reference.tasks:
            names = {row.name for row in self.whole.rows}
            return tuple(row for row in measured if row.reference in names)
        first = next(iter(measured), self.reference)
        return tuple(row for row in measured if not difference(row, first))

    @property
    def comparable_arms(self) -> tuple[Arm, ...]:
        """The arms of which every run with results is comparable."""
        return tuple(arm for arm in self.arms if arm.measured and set(arm.measured) <= {*self.comparable})

    @cached_property
    def style(self) -> dict[str, Mark]:
        """Color and marker of each arm; all runs of an arm share them."""
        return plot.marks([arm.name for arm in self.arms], self.whole.name)


def compare(runs: Sequence[Path], reference: Path | None = None) -> Comparison:
    """Read runs, and folders of runs, and set them against `reference`.

    By default that is the first that tuned all layers, else the first. A run of another seed, or on other records, is
    set against the run that differs from the reference in that alone, where there is one. Retention is that of the
    mean over visual tasks; see `Retention`.

    Raises:
        UserError: there is no run, or a folder holds no run.
    """
    if not runs:
        raise UserError("a report needs at least one run folder")
    listed = find_runs([*runs, *([reference] if reference else [])])
    rows = _distinct([read_run(one) for one in listed])
    chosen = next((row for row in rows if str(row.region) == "all" and not row.pruned), rows[0])
    if reference:
        place = Path(reference).resolve()
        named = [row for row in rows if row.run.path.resolve() == place]
        if not named:
            raise UserError(f"{reference} is a folder of runs: name one run as the reference")
        chosen = named[0]
    compared = tuple(_against(row, _counterpart(row, chosen, rows)) for row in rows)
    return Comparison(compared, compared[rows.index(chosen)])


def _distinct(rows: list[ComparedRun]) -> list[ComparedRun]:
    """Give runs of the same name different names: by their folder, else by a number."""
    for name in ("{0.run.path.parent.name}/{0.name}", "{0.name} ({1})"):
        names = [row.name for row in rows]
        rows = [
            replace(row, name=name.format(row, number)) if names.count(row.name) > 1 else row
            for number, row in enumerate(rows, start=1)
        ]
    return rows


def _counterpart(row: ComparedRun, reference: ComparedRun, rows: Sequence[ComparedRun]) -> ComparedRun:
    """The run to compare with: the reference of its own seed, else the reference, else a twin on the same records.

    A seed decides on the order of the data and more, and runs that share it differ less by chance.
    """
    if not row.tasks or not reference.tasks:
        return reference
    twins = [other for other in rows if other.tasks and other.treatment == reference.treatment]
    twins.sort(key=lambda twin: (twin.info.get("seed") != row.info.get("seed"), twin is not reference))
    return next((twin for twin in twins if not difference(row, twin)), reference)


def _against(row: ComparedRun, reference: ComparedRun) -> ComparedRun:
    """The run with its retention, or with a note why there is none, and with notes on other differences."""
    if row is not reference:
        row = replace(row, notes=(*row.notes, *unlike(row.info, reference.info, reference.name)))
    if not row.tasks or not reference.tasks:
        return row
    if why := difference(row, reference):
        return replace(row, notes=(*row.notes, why))
    if row is reference:
        return replace(row, reference=row.name)
    return replace(row, reference=reference.name, kept=retention(row, reference))


def retention(row: ComparedRun, reference: ComparedRun, modality: str = "visual") -> Retention | None:
    """How much of the accuracy of `reference` in a modality a run keeps; None where one of them has none."""
    own, others = row.mean(modality), reference.mean(modality)
    if own is None or others is None:
        return None
    if row.records and row.records == reference.records:
        tasks = row.names(modality)
        return compare_paired(row.predictions.scores(tasks), reference.predictions.scores(tasks))
    return compare_unpaired(own, others)


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ only in the seed (and in what was made from it: data, parent, a region sampled at random)."""

    name: str
    rows: tuple[ComparedRun, ...]

    @property
    def first(self) -> ComparedRun:
        """One run for what all of them share."""
        return self.rows[0]

    @property
    def measured(self) -> tuple[ComparedRun, ...]:
        """The runs with results."""
        return tuple(row for row in self.rows if row.tasks)

    @property
    def region(self) -> Region | None:
        """The region that all runs share."""
        regions = {row.region for row in self.rows}
        return self.first.region if len(regions) == 1 else None

    @property
    def size(self) -> int | None:
        """Number of layers that were trained, when it is the same in all runs."""
        sizes = {len(row.region) for row in self.rows if row.region is not None}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def fraction(self) -> float:
        """Share of the layers that were trained; 0 where no region was."""
        return self.first.region.fraction if self.first.region is not None else 0.0

    @cached_property
    def visual(self) -> Estimate | None:
        """The mean over visual tasks."""
        return self.mean(lambda row: row.visual)

    @cached_property
    def text(self) -> Estimate | None:
        """The mean over text tasks."""
        return self.mean(lambda row: row.text)

    @cached_property
    def share(self) -> Estimate | None:
        """What it keeps of its reference's visual accuracy, 1 for all."""
        return self.mean(lambda row: row.share)

    def task(self, name: str) -> Estimate | None:
        """What it measured in a task."""
        return self.mean(lambda row: row.task(name))

    def training(self, name: str) -> Estimate | None:
        """A number of its training."""
        return self.mean(lambda row: row.training(name))

    def names(self, modality: str) -> list[str]:
        """The tasks of a modality."""
        return self.measured[0].names(modality)

    def mean(self, measure: Callable[[ComparedRun], Estimate | float | None]) -> Estimate | None:
        """The mean of a measure: of one run its value and standard error, of several mean and standard deviation."""
        found = [value for row in self.rows if (value := measure(row)) is not None]
        if not found:
            return None
        estimates = [value if isinstance(value, Estimate) else Estimate(value) for value in found]
        values = [one.value for one in estimates]
        return estimates[0] if len(values) == 1 else Estimate(fmean(values), stdev(values))


def group_arms(rows: Sequence[ComparedRun]) -> tuple[Arm, ...]:
    """Group runs that differ only in the seed, in the order of their first run; a repeated seed starts another arm."""
    groups: dict[tuple[str, int], list[ComparedRun]] = {}
    for row in rows:
        repeat = 0
        while any(_once(row) == _once(other) for other in groups.get((row.treatment, repeat), ())):
            repeat += 1
        groups.setdefault((row.treatment, repeat), []).append(row)
    names = _names(list(groups.values()))
    return tuple(Arm(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True))


def _once(row: ComparedRun) -> tuple[Any, ...]:
    return row.info.get("seed"), row.records


def _names(groups: Sequence[Sequence[ComparedRun]]) -> list[str]:
    """A name per group: of a single run its own, of several the name that they share without the seed."""
    wanted = [_name(group) for group in groups]
    taken = {group[0].name for group in groups if len(group) == 1}
    return [
        name if len(group) == 1 or (wanted.count(name) == 1 and name not in taken) else f"{name} ({number})"
        for number, (name, group) in enumerate(zip(wanted, groups, strict=True), start=1)
    ]


def _name(group: Sequence[ComparedRun]) -> str:
    if len(group) == 1:
        return group[0].name
    own = {str(row.info.get("name") or row.run.path.name): row.info.get("seed") for row in group}
    shared = {re.sub(r"[-_ ]?(seed[-_=]?)?#", "", without_seed(name, seed)) for name, seed in own.items()}
    for names in (set(own), shared):
        if len(names) == 1 and all(names):
            return names.pop()
    return " / ".join(sorted(own))[:60]


def start(row: ComparedRun) -> str:
    """The start model of a run: a key of its content, size and depth."""
    size = row.training("total_parameters")
    depth = row.region.depth if row.region is not None else row.info.get("depth")
    origin = origin_of("model", row.info.get("parent"), row.info, DEEP)
    return json.dumps([origin, size, depth], sort_keys=True, default=str)


def start_name(row: ComparedRun) -> str:
    """The folder name of the start model, without the run's seed."""
    return Path(str(without_seed(row.info.get("parent") or "", row.info.get("seed")))).name


@dataclass(frozen=True, eq=False)
class Line:
    """The arms of a line by number of layers. `group` is shared by lines that belong together and share a color."""

    name: str
    arms: Mapping[int, Sequence[Arm]]
    group: str = ""
    dashed: bool = False

    def curve(self, measure: Callable[[ComparedRun], float | None], whole: float = 0.0) -> plot.Curve:
        """One mapping per seed from layers to `measure`; `whole`: the share of the last point for a dashed line."""
        seeds: dict[tuple[object, int], dict[int, float]] = {}
        for number, arms in sorted(self.arms.items()):
            for row in (row for arm in arms for row in arm.rows):
                value, repeat = measure(row), 0
                while number in seeds.get((row.info.get("seed"), repeat), ()):
                    repeat += 1
                if value is not None:
                    seeds.setdefault((row.info.get("seed"), repeat), {})[number] = value
        curve = plot.Curve([seeds[key] for key in sorted(seeds, key=str)])
        last = list(curve.points().values())[-1:]
        return curve._replace(floor=whole * sum(last[0]) / len(last[0])) if whole and last else curve


def trained_lines(comparison: Comparison) -> list[Line]:
    """A line for each way to choose layers, model and number of records seen, over the number of trained layers.

    A model of which all layers were trained ends every line of its kind.
    """
    tuned = [arm for arm in comparison.comparable_arms if arm.size and not arm.first.pruned]
    groups: dict[tuple[str, str], dict[int, list[Arm]]] = {}
    ends: dict[str, list[Arm]] = {}
    for arm in tuned:
        region, recipe = arm.first.region, recipe_of(arm)
        if region is None or not arm.first.training("trainable_parameters"):
            continue
        if len(region) == region.depth:
            ends.setdefault(recipe, []).append(arm)
        else:
            groups.setdefault((recipe, kind(region)), {}).setdefault(len(region), []).append(arm)
    for (recipe, _), line in groups.items():
        for end in ends.get(recipe, ()):
            line.setdefault(end.size or 0, []).append(end)
    long = {key: line for key, line in groups.items() if len(line) >= FEWEST}
    names = _line_names(list(long), [next(iter(line.values()))[0] for line in long.values()])
    return [Line(name, line, name) for name, line in zip(names, long.values(), strict=True)]


def removed_lines(comparison: Comparison) -> list[Line]:
    """A line for each pruned model, way to choose its layers, and healed or not, over the number of removed layers.

    The model as it was before stands at 0, where its run is among those given.
    """
    comparable = {*comparison.comparable}
    parents = {row.run.path.resolve(): arm for arm in comparison.arms for row in arm.rows if row in comparable}
    groups: dict[tuple[str, str, bool], dict[int, list[Arm]]] = {}
    for arm in comparison.comparable_arms:
        row = arm.first
        if row.pruned:
            parent = Path(str(row.info.get("parent") or row.pruned.get("parent")))
            whole = parents.get(parent.resolve())
            by = str(row.pruned.get("by") or "hand").replace("_", " ")
            line = groups.setdefault((whole.name if whole else parent.name, by, "healed" in row.info), {})
            if whole:
                line[0] = [whole]
            line.setdefault(len(row.pruned["removed"]), []).append(arm)
    ways, both = {by for _, by, _ in groups}, len({healed for _, _, healed in groups}) > 1
    lines = []
    for (parent_name, by, healed), line in groups.items():
        if len(line) > 1:
            group = f"{parent_name}, {by}" if len(ways) > 1 else parent_name
            name = f"{group}, healed" if healed and both else group
            lines.append(Line(name, line, group, dashed=both and not healed))
    return lines


def style(lines: Sequence[Line]) -> dict[str, plot.Mark]:
    """Colors and dashes of the lines: one color per group."""
    marks = plot.marks(list(dict.fromkeys(line.group for line in lines)))
    return {line.name: marks[line.group]._replace(dashed=line.dashed) for line in lines}


def recipe_of(arm: Arm) -> str:
    """A key that is equal for arms that differ only in the region."""
    row = arm.first
    kept = {key: value for key, value in settings(row.info).items() if key not in (*AMOUNT, "model")}
    return json.dumps([start(row), row.training("samples"), kept], sort_keys=True, default=str)


def _line_names(keys: Sequence[tuple[str, str]], arms: Sequence[Arm]) -> list[str]:
    """Names that say what lines differ in: the choice of layers, the records seen, the model; else a number."""
    models = [start_name(arm.first) for arm in arms]
    samples = [arm.first.training("samples") for arm in arms]
    names = []
    for (_, way), model, seen in zip(keys, models, samples, strict=True):
        parts = [way]
        parts += [f"{seen:,.0f} records"] if len({*samples}) > 1 and seen else []
        parts += [str(model)] if len({*models}) > 1 else []
        names.append(", ".join(parts))
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]

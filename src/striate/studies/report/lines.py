"""Lines over a number of layers: arms that differ only in the number of trained or removed layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from striate import plot
from striate.studies.report.arms import Arm, start, start_name
from striate.studies.report.compared import ComparedRun
from striate.studies.report.comparison import Comparison
from striate.studies.report.treatment import kind, settings

# Options that say how many records a run saw; that is compared by their number.
AMOUNT = ("region", "steps", "epochs")
FEWEST = 3  # numbers of layers that make a line of trained ones; a pruned model and its parent do


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
    names = _names(list(long), [next(iter(line.values()))[0] for line in long.values()])
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


def _names(keys: Sequence[tuple[str, str]], arms: Sequence[Arm]) -> list[str]:
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

"""Arms: runs that differ only in the seed, as one line of a table and one curve of a figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from striate.plot import Estimate
from striate.region import Region
from striate.studies.report.compared import ComparedRun
from striate.studies.report.treatment import DEEP, origin_of, without_seed


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

    def mean(self, measure: Callable[[ComparedRun], Estimate | float | None]) -> Estimate | None:
        """The mean of a measure: of one run its value and standard error, of several mean and standard deviation."""
        found = [value for row in self.rows if (value := measure(row)) is not None]
        if not found:
            return None
        estimates = [value if isinstance(value, Estimate) else Estimate(value) for value in found]
        values = [one.value for one in estimates]
        return estimates[0] if len(values) == 1 else Estimate(fmean(values), stdev(values))


def arms(rows: Sequence[ComparedRun]) -> tuple[Arm, ...]:
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

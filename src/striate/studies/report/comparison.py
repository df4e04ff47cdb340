"""Runs set side by side: what each one measured, and how much of the reference's accuracy it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from striate import plot
from striate.errors import UserError
from striate.plot import Mark
from striate.studies.report.arms import Arm, arms
from striate.studies.report.compared import ComparedRun, difference, read_run
from striate.studies.report.folders import find_runs
from striate.studies.report.pairing import Retention, compare_paired, compare_unpaired
from striate.studies.report.unlike import unlike


@dataclass(frozen=True)
class Comparison:
    """Runs, and the one among them that the others are compared with."""

    rows: tuple[ComparedRun, ...]
    reference: ComparedRun

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The runs, grouped: the runs of an arm differ only in the seed."""
        return arms(self.rows)

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
        chosen = next((row for row in rows if row.run.path.resolve() == place), None) or _refuse(reference)
    compared = tuple(_against(row, _counterpart(row, chosen, rows)) for row in rows)
    return Comparison(compared, compared[rows.index(chosen)])


def _refuse(reference: Path) -> ComparedRun:
    raise UserError(f"{reference} is a folder of runs: name one run as the reference")


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
    twins.sort(key=lambda twin: (_seed(twin) != _seed(row), twin is not reference))
    return next((twin for twin in twins if not difference(row, twin)), reference)


def _seed(row: ComparedRun) -> Any:
    return row.info.get("seed")


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

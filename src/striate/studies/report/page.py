"""The page: everything that the template shows, made from a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from striate import plot
from striate.plot import Estimate
from striate.runs.environment import versions
from striate.studies.html import render, write
from striate.studies.report.compared import (
    MODALITIES,
    NOTHING,
    ComparedRun,
    interval,
)
from striate.studies.report.comparison import Arm, Comparison, compare
from striate.studies.report.figures import KINDS, ReportFigure, correlations, figures, heatmaps, save, write_csv
from striate.studies.report.headline import headline
from striate.studies.report.pairing import PERPLEXITY, compare_paired
from striate.studies.report.records import browser
from striate.studies.report.tables import Table, TableCell, cost_cells, tables
from striate.studies.report.tables import runs as runs_table

GLYPHS = dict(zip("o" + plot.SHAPES, "●■◆▲▼✚✖", strict=True))
TEMPLATE, CSS, SCRIPT = "page.html.jinja", "page.css", "page.js"
FEW = 60  # numbers of a figure that the page lists below it


class Entry(NamedTuple):
    """An arm in the summary."""

    arm: Arm
    reference: bool
    notes: Sequence[str]
    kept: Estimate | None
    sure: str
    noise: str
    costs: Sequence[TableCell]


class Task(NamedTuple):
    """A task's results by arm, and the arms whose difference from the reference may be chance."""

    metric: str
    n: int
    estimates: dict[str, Estimate]
    noise: set[str]


class Settings(NamedTuple):
    """Fields of run.json: those that some runs share, and those in which they differ, one value per run."""

    title: str
    shared: Mapping[str, str]
    runs: tuple[str, ...]
    differing: Mapping[str, Sequence[str]]


def report(
    runs: Sequence[Path], *, out: Path, reference: Path | None = None, title: str = "", page_only: bool = False
) -> Path:
    """Write one HTML file about runs that needs no network.

    Runs without results are listed with their status, runs on other records apart from the rest with the reason.

    Args:
        runs: run folders, sweeps, or folders with runs in them.
        out: the HTML file to write.
        reference: the run that the others are compared with; default: the first that tuned all layers, else the first.
        title: words above the headline.
        page_only: write the page only; else also the figures (SVG, PNG, PDF) and their numbers (CSV) to a folder beside
            it: report-figures/ beside report.html.

    Returns:
        The file.

    Raises:
        UserError: a folder holds no run, or `out` exists and is not a report.
    """
    comparison = compare(runs, reference)
    plots, made = _distinct(list(figures(comparison))), list(tables(comparison))
    out = Path(out)
    folder = None if page_only else out.with_name(f"{out.stem}-figures")
    here = resources.files(__package__)
    template, css, script = (here.joinpath(name).read_text("utf-8") for name in (TEMPLATE, CSS, SCRIPT))
    content = _page(comparison, title, plots, made, folder, explored=_explored(comparison, out))
    write(render(template, css, script, content), out)
    if folder:
        save(plots, folder)
        for table in (*made, runs_table(comparison)):
            write_csv(folder / f"table-{table.name}.csv", table.numbers())
    return out


def _explored(comparison: Comparison, out: Path) -> dict[str, list[tuple[str, str]]]:
    """By arm, the runs that have a page of `explore`, each with its address as seen from the report."""
    return {
        arm.name: [
            (row.name, quote(os.path.relpath(row.run.exploration, out.parent).replace(os.sep, "/")))
            for row in arm.rows
            if row.run.exploration.is_file()
        ]
        for arm in comparison.arms
    }


def _distinct(plots: Sequence[ReportFigure]) -> list[ReportFigure]:
    """Figures whose files have names of their own."""
    names = [one.name for one in plots]
    return [
        one._replace(name=f"{one.name}-{number}") if names.count(one.name) > 1 else one
        for number, one in enumerate(plots, start=1)
    ]


def _page(
    comparison: Comparison, title: str, plots: Sequence[ReportFigure], made: Sequence[Table], folder: Path | None,
    *, explored: Mapping[str, Sequence[tuple[str, str]]],
) -> dict[str, Any]:  # fmt: skip
    """What the template shows."""
    arms = comparison.arms
    title_line, remarks = headline(comparison)
    marks = {name: (plot.css(mark.color), GLYPHS[mark.shape]) for name, mark in comparison.style.items()}
    marks |= {row.name: marks[arm.name] for arm in arms for row in arm.rows}
    scored = [row for arm in arms for row in [row for row in arm.rows if row.scores][:1]]
    alone = [replace(arm.first, name=arm.name) for arm in arms if arm.region is not None and not arm.first.pruned]
    return {
        "title": title,
        "headline": title_line,
        "remarks": remarks,
        "summary": _summary(comparison),
        "several": any(len(arm.rows) > 1 for arm in arms),
        "runs": runs_table(comparison),
        "reference": comparison.whole,
        "marks": marks,
        "tables": made,
        "results": _results(comparison),
        "measured": [arm for arm in arms if arm.measured],
        "comparable": comparison.comparable_arms,
        "figures": [(one, Markup(plot.svg(one.figure, one.name))) for one in plots],
        "kinds": KINDS,
        "few": FEW,
        "folder": quote(folder.name) if folder else "",
        "heatmaps": [heatmaps(row, alone) for row in scored],
        "correlations": {row.name: correlations(row.scores) for row in scored if row.scores},
        "browser": browser(comparison, marks, explored=dict(pair for pairs in explored.values() for pair in pairs)),
        "explored": explored,
        "settings": _settings(comparison.rows),
        "credits": dict.fromkeys(str(line) for row in comparison.rows for line in row.info.get("credits") or ()),
        "version": versions().get("striate", ""),
    }


def _summary(comparison: Comparison) -> dict[str, list[Entry]]:
    """The summary: what is compared, what is not, and what has no results. Pruned runs have a table of their own."""
    comparable = {*comparison.comparable_arms}
    groups: dict[str, list[Entry]] = {"": [], "Not compared": [], "Without results": []}
    pruned = [arm for arm in comparable if arm.first.pruned]
    for arm in comparison.arms:
        if arm not in pruned or len(pruned) == len(comparable):
            group = "" if arm in comparable else "Not compared" if arm.measured else "Without results"
            groups[group].append(_entry(arm, arm is comparison.whole))
    return {name: lines for name, lines in groups.items() if lines}


def _entry(arm: Arm, reference: bool) -> Entry:
    kept = [row.kept for row in arm.rows if row.kept]
    whole = Estimate(1.0) if reference and arm.visual else None
    if len(kept) == 1:
        sure, noise = interval(kept[0].share), "within noise" if kept[0].noise else ""
    else:
        sure, inside = "", sum(one.noise for one in kept)
        noise = f"within noise in {inside} of {len(kept)}" if inside else ""
    notes = [f"{len(arm.rows)} runs"] if len(arm.rows) > 1 else []
    notes += _notes(arm)
    return Entry(
        arm, reference, notes, whole or arm.share, sure, noise, cost_cells(arm)
    )  # fmt: skip


def _notes(arm: Arm) -> list[str]:
    """The notes of the runs; a note that not all runs share says how many have it."""
    numbers = {note: sum(note in row.notes for row in arm.rows) for row in arm.rows for note in row.notes}
    total = len(arm.rows)
    return [note if number == total else f"{note} ({number} of {total})" for note, number in numbers.items()]


def _results(comparison: Comparison) -> dict[str, dict[str, Task]]:
    """Every result by kind ("visual", "text", "perplexity"), then by task."""
    kinds: dict[str, dict[str, Task]] = {kind: {} for kind in (*MODALITIES, PERPLEXITY)}
    by_name = {row.name: row for row in comparison.rows}
    for arm in comparison.arms:
        names = dict.fromkeys(name for row in arm.rows for name in row.tasks)
        for name in names:
            result = next(row.tasks[name] for row in arm.rows if name in row.tasks)
            kind = PERPLEXITY if result["metric"] == PERPLEXITY else result["modality"]
            task = kinds[kind].setdefault(name, Task(result["metric"], result["n"], {}, set()))
            mean = arm.task(name)
            if mean:
                task.estimates[arm.name] = mean
            if len(arm.rows) == 1 and kind != PERPLEXITY and _within_noise(arm.first, by_name, name):
                task.noise.add(arm.name)
    return {kind: tasks for kind, tasks in kinds.items() if tasks}


def _within_noise(row: ComparedRun, rows: Mapping[str, ComparedRun], task: str) -> bool:
    """Whether the difference from the reference in one task may be chance; never where the records are unknown."""
    reference = rows.get(row.reference, row)
    if reference is row or not row.records or row.records != reference.records:
        return False
    kept = compare_paired(row.predictions.scores([task]), reference.predictions.scores([task]))
    return kept is not None and kept.noise


def _settings(rows: Sequence[ComparedRun]) -> list[Settings]:
    """The fields of run.json: first those all runs share, then by verb those its runs share and those that differ."""
    fields = {row.name: dict(_flat(row.info)) for row in rows if "verb" in row.info}
    everywhere = _common(list(fields.values()))
    settings = [Settings("All runs", everywhere, (), {})]
    for verb in dict.fromkeys(str(row.info["verb"]) for row in rows if row.name in fields):
        names = [row.name for row in rows if row.name in fields and str(row.info["verb"]) == verb]
        group = {name: {k: v for k, v in fields[name].items() if k not in everywhere} for name in names}
        shared = _common(list(group.values()))
        keys = dict.fromkeys(key for own in group.values() for key in own if key not in shared)
        differing = {key: [own.get(key, NOTHING) for own in group.values()] for key in keys}
        settings.append(Settings(verb, shared, tuple(group), differing))
    return [part for part in settings if part.shared or part.differing]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of run.json as dotted names and text, without what the report shows elsewhere."""
    for key, value in fields.items():
        if not prefix and key in ("verb", "name", "status", "training", "credits"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def _common(fields: Sequence[Mapping[str, str]]) -> dict[str, str]:
    first, *others = fields or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

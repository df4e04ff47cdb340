"""The page: everything that the template shows, made from a comparison."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate
from striate.report.arms import Arm, start
from striate.report.browser import browser
from striate.report.comparison import (
    MODALITIES,
    NOTHING,
    Comparison,
    Row,
    compare,
    interval,
    of_task,
    of_training,
    percent,
    share,
    text,
    visual,
)
from striate.report.figures import KINDS, Drawn, figures, save, write_csv
from striate.report.layers import correlations, strips
from striate.report.pairing import PERPLEXITY, paired
from striate.report.samples import MOST, PER_TASK, samples
from striate.report.tables import Cell, Table, cost_cells, tables
from striate.report.tables import runs as runs_table
from striate.run import versions

GLYPHS = dict(zip("o" + plot.SHAPES, "●■◆▲▼✚✖", strict=True))
TEMPLATE, CSS, SCRIPT = "page.html.jinja", "page.css", "page.js"
GENERATOR = '<meta name="generator" content="striate">'
FEW = 60  # numbers of a figure that the page lists below it


class Figure(NamedTuple):
    """A figure of the page, its few numbers as a table, and its files by kind."""

    title: str
    svg: Markup
    caption: str
    columns: Sequence[str]
    numbers: Sequence[Sequence[Any]]
    files: Mapping[str, str]


class Entry(NamedTuple):
    """An arm in the summary."""

    arm: Arm
    reference: bool
    notes: Sequence[str]
    visual: Estimate | None
    text: Estimate | None
    kept: Estimate | None
    sure: str
    noise: str
    costs: Sequence[Cell]


class Task(NamedTuple):
    """A task's results by arm, and the arms whose difference from the reference may be chance."""

    metric: str
    n: int
    estimates: dict[str, Estimate]
    noise: set[str]


class Settings(NamedTuple):
    """Fields of run.json: those that some runs share, and those in which they differ, one value a run."""

    title: str
    shared: Mapping[str, str]
    runs: tuple[str, ...]
    differing: Mapping[str, Sequence[str]]


def report(
    runs: Sequence[Path], *, out: Path, reference: Path | None = None, title: str = "", page_only: bool = False
) -> Path:
    """Write one HTML file about runs that opens anywhere, without a network.

    Runs without results appear with their status; runs on other records appear apart, with the reason.

    Args:
        runs: run folders, sweeps, or folders with runs in them.
        out: the HTML file to write.
        reference: the run that the others are compared with; default: the first that tuned all layers, else the first.
        title: words above the headline.
        page_only: write no more than the page; else the figures too, as SVG, PNG and PDF, and all numbers as CSV, into
            a folder beside it: report-figures/ beside report.html.

    Returns:
        The file.

    Raises:
        UserError: a folder holds no run, or `out` exists and is no report.
    """
    comparison = compare(runs, reference)
    drawn, made = _distinct(list(figures(comparison))), list(tables(comparison))
    out = Path(out)
    folder = None if page_only else out.with_name(f"{out.stem}-figures")
    page = _rendered(_page(comparison, title, drawn, made, folder))
    try:
        if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
            raise UserError(f"{out} exists and is no report of striate: choose another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    if folder:
        save(drawn, folder)
        for table in (*made, runs_table(comparison)):
            write_csv(folder / f"table-{table.name}.csv", table.numbers())
    return out


def _distinct(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Figures whose files have names of their own."""
    names = [one.name for one in drawn]
    return [
        one._replace(name=f"{one.name}-{number}") if names.count(one.name) > 1 else one
        for number, one in enumerate(drawn, start=1)
    ]


def _rendered(content: Mapping[str, Any]) -> str:
    """The template with its style and its script, the only one that the page lets run."""
    here = resources.files(__package__)
    css, script = (here.joinpath(name).read_text("utf-8") for name in (CSS, SCRIPT))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(here.joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(css=Markup(css), script=Markup(script), digest=digest, **content)


def _page(
    comparison: Comparison, title: str, drawn: Sequence[Drawn], made: Sequence[Table], folder: Path | None
) -> dict[str, Any]:
    """What the template shows."""
    arms = comparison.arms
    headline, remarks = _headline(comparison)
    marks = {name: (plot.css(mark.colour), GLYPHS[mark.shape]) for name, mark in comparison.style.items()}
    marks |= {row.name: marks[arm.name] for arm in arms for row in arm.rows}
    scored = [row for arm in arms for row in [row for row in arm.rows if row.scores][:1]]
    alone = [replace(arm.first, name=arm.name) for arm in arms if arm.region is not None and not arm.first.pruned]
    return {
        "generator": Markup(GENERATOR),
        "title": title,
        "headline": headline,
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
        "figures": [_figure(one, folder) for one in drawn],
        "folder": quote(folder.name) if folder else "",
        "strips": [strips(row, alone) for row in scored],
        "correlations": {row.name: correlations(row.scores) for row in scored if row.scores},
        "samples": samples(comparison),
        "sampling": (PER_TASK, MOST),
        "browser": browser(comparison, marks),
        "settings": _settings(comparison.rows),
        "credits": dict.fromkeys(str(line) for row in comparison.rows for line in row.info.get("credits") or ()),
        "version": versions().get("striate", ""),
        "palettes": (plot.PALETTE, plot.DARK),
    }


def _figure(drawn: Drawn, folder: Path | None) -> Figure:
    files = {kind: f"{quote(folder.name)}/{quote(drawn.name)}.{kind}" for kind in KINDS} if folder else {}
    columns = list(dict.fromkeys(column for entry in drawn.numbers for column in entry))
    few = drawn.numbers if len(drawn.numbers) <= FEW else ()
    numbers = [[entry.get(column, "") for column in columns] for entry in few]
    return Figure(drawn.title, Markup(plot.svg(drawn.figure, drawn.name)), drawn.caption, columns, numbers, files)


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
    whole = Estimate(1.0) if reference and arm.mean(visual) else None
    if len(kept) == 1:
        sure, noise = interval(kept[0].share), "within noise" if kept[0].noise else ""
    else:
        sure, inside = "", sum(one.noise for one in kept)
        noise = f"within noise in {inside} of {len(kept)}" if inside else ""
    notes = [f"{len(arm.rows)} runs"] if len(arm.rows) > 1 else []
    notes += _notes(arm)
    return Entry(
        arm, reference, notes, arm.mean(visual), arm.mean(text), whole or arm.mean(share), sure, noise, cost_cells(arm)
    )  # fmt: skip


def _notes(arm: Arm) -> list[str]:
    """The notes of the runs; those that not all have say how many do."""
    numbers = {note: sum(note in row.notes for row in arm.rows) for row in arm.rows for note in row.notes}
    total = len(arm.rows)
    return [note if number == total else f"{note} ({number} of {total})" for note, number in numbers.items()]


def _headline(comparison: Comparison) -> tuple[str, list[str]]:
    """The finding in a sentence, and the sentences that qualify it."""
    reference, total = comparison.whole, len(comparison.rows)
    smaller = [arm for arm in comparison.comparable_arms if arm is not reference and _is_smaller(arm)]
    unpruned = [arm for arm in smaller if not arm.first.pruned] or smaller
    alike = [arm for arm in unpruned if _amount(arm) == _amount(reference)] or unpruned
    if not alike:
        done = sum(bool(row.tasks) for row in comparison.rows)
        return f"{total} run{'s' * (total > 1)}, {done} with results", []
    best = max(alike, key=_share)
    region = best.first.region
    assert region is not None
    whole = "tuning all layers" if str(reference.first.region) == "all" else reference.name
    time, whole_time = (arm.mean(of_training("seconds")) for arm in (best, reference))
    spent = f", in {time.value / whole_time.value:.2f} of the time" if time and whole_time else ""
    trained = f"{region.origin or best.name}, {len(region)} of {region.depth} layers,"
    headline = f"{trained} keeps {100 * _share(best):.1f} % of the visual accuracy of {whole}{spent}"
    return headline, [*_certainty(best), *_beside(best, reference, len(alike))]


def _is_smaller(arm: Arm) -> bool:
    region = arm.first.region
    return region is not None and region.fraction < 1 and any(row.kept for row in arm.rows)


def _amount(arm: Arm) -> tuple[str, float | None]:
    """The model that an arm started from, and the records that it saw."""
    return start(arm.first), arm.first.training("samples")


def _share(arm: Arm) -> float:
    return fmean(row.kept.share.value for row in arm.rows if row.kept)


def _certainty(best: Arm) -> Iterator[str]:
    """How sure the retention of the headline is."""
    kept = [row.kept for row in best.rows if row.kept]
    if len(kept) > 1:
        shares = [one.share.value for one in kept]
        yield f"Mean of {len(kept)} seeds, which keep {100 * min(shares):.1f} to {100 * max(shares):.1f} %."
        return
    (one,) = kept
    way = "both runs on the same records" if one.paired else "the two runs taken as independent"
    yield f"95 % interval {interval(one.share)} %, {way}."
    if one.noise:
        yield "The difference from the reference is within noise."


def _beside(best: Arm, reference: Arm, number: int) -> Iterator[str]:
    """What else is to be known: how many were tried, what happened to text and to memory."""
    if number > 1:
        yield f"The best of {number} regions by visual accuracy."
    own, whole_text = best.mean(text), reference.mean(text)
    if own and whole_text:
        yield f"Text accuracy {percent(own)} % against {percent(whole_text)} %."
    memory, whole_memory = (arm.mean(of_training("peak_memory_gb")) for arm in (best, reference))
    if memory and whole_memory:
        yield f"Peak memory {memory.value:.2f} GB against {whole_memory.value:.2f} GB."


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
            mean = arm.mean(of_task(name))
            if mean:
                task.estimates[arm.name] = mean
            if len(arm.rows) == 1 and kind != PERPLEXITY and _within_noise(arm.first, by_name, name):
                task.noise.add(arm.name)
    return {kind: tasks for kind, tasks in kinds.items() if tasks}


def _within_noise(row: Row, rows: Mapping[str, Row], task: str) -> bool:
    """Whether the difference from the reference in one task may be chance; never where records are not known."""
    reference = rows.get(row.reference, row)
    if reference is row or not row.records or row.records != reference.records:
        return False
    kept = paired(row.answers.scores([task]), reference.answers.scores([task]))
    return kept is not None and kept.noise


def _settings(rows: Sequence[Row]) -> list[Settings]:
    """What ran: first what all runs share, then verb by verb what its runs share and where they differ."""
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

"""The page: everything that the template shows, made from a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate
from striate.report.comparison import (
    MODALITIES,
    NOTHING,
    PERPLEXITY,
    Comparison,
    Row,
    compare,
    estimate,
    percent,
)
from striate.report.layers import correlations, figures, strips
from striate.report.samples import MOST, PER_TASK, samples
from striate.run import versions

COSTS = ("seconds", "peak_memory_gb")
GLYPHS = dict(zip("o" + plot.SHAPES, "●■◆▲▼✚✖", strict=True))
TEMPLATE = "page.html.jinja"
GENERATOR = '<meta name="generator" content="striate">'


class Figure(NamedTuple):
    """A figure of the page."""

    title: str
    svg: Markup
    caption: str


class Task(NamedTuple):
    """A task's results by run."""

    metric: str
    n: int
    estimates: dict[str, Estimate]


class Settings(NamedTuple):
    """Fields of run.json: those that some runs share, and those in which they differ, one value a run."""

    title: str
    shared: Mapping[str, str]
    runs: tuple[str, ...]
    differing: Mapping[str, Sequence[str]]


def report(runs: Sequence[Path], *, out: Path, reference: Path | None = None, title: str = "") -> Path:
    """Write one HTML file about `runs` that needs no network and no scripts; returns its path.

    `reference` is the run that the others are compared with; default: the first that tuned all layers, else
    the first. Runs without results appear with their status; runs evaluated on other records appear too, but
    are not compared. Raises `UserError` when a folder is no run, or `out` exists and is no report.
    """
    comparison = compare(runs, reference)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8"))
    page = template.render(_page(comparison, title))
    out = Path(out)
    try:
        if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
            raise UserError(f"{out} exists and is no report of striate: choose another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    return out


def _page(comparison: Comparison, title: str) -> dict[str, Any]:
    """What the template shows."""
    rows = comparison.rows
    headline, remarks = _headline(comparison)
    return {
        "generator": Markup(GENERATOR),
        "title": title,
        "headline": headline,
        "remarks": remarks,
        "rows": rows,
        "reference": comparison.reference,
        "comparable": comparison.comparable,
        "marks": {name: (plot.css(m.colour), GLYPHS[m.shape]) for name, m in comparison.style.items()},
        "results": _results(rows),
        "figures": [
            Figure(name, Markup(plot.svg(figure, name)), caption) for name, figure, caption in _figures(comparison)
        ],
        "strips": [strips(row, rows) for row in rows if row.scores],
        "correlations": {row.name: correlations(row.scores) for row in rows if row.scores},
        "samples": samples(comparison),
        "sampling": (PER_TASK, MOST),
        "settings": _settings(rows),
        "credits": dict.fromkeys(str(line) for row in rows for line in row.info.get("credits") or ()),
        "version": versions().get("striate", ""),
        "palettes": (plot.PALETTE, plot.DARK),
    }


def _headline(comparison: Comparison) -> tuple[str, list[str]]:
    """The finding in a sentence, and the sentences that qualify it."""
    reference, total = comparison.reference, len(comparison.rows)
    smaller = [
        (row.kept.value, row, row.region)
        for row in comparison.comparable
        if row.kept and row.region is not None and row.region.fraction < 1 and row is not reference
    ]
    if not smaller:
        done = sum(bool(row.tasks) for row in comparison.rows)
        return f"{total} run{'s' * (total > 1)}, {done} with results", []
    kept, best, region = max(smaller, key=lambda candidate: candidate[0])
    whole = "tuning all layers" if str(reference.region) == "all" else reference.name
    time, whole_time = best.training("seconds"), reference.training("seconds")
    spent = f", in {time / whole_time:.2f} of the time" if time and whole_time else ""
    trained = f"{region.origin or best.name}, {len(region)} of {region.depth} layers,"
    headline = f"{trained} keeps {100 * kept:.1f} % of the visual accuracy of {whole}{spent}"
    remarks = [f"Retention {percent(best.kept)} %, with one standard error."]
    if len(smaller) > 1:
        remarks.append(f"The best of {len(smaller)} regions by visual accuracy.")
    if best.text and reference.text:
        remarks.append(f"Text accuracy {percent(best.text)} % against {percent(reference.text)} %.")
    memory, whole_memory = best.training("peak_memory_gb"), reference.training("peak_memory_gb")
    if memory and whole_memory:
        remarks.append(f"Peak memory {memory:.2f} GB against {whole_memory:.2f} GB.")
    return headline, remarks


def _results(rows: Sequence[Row]) -> dict[str, dict[str, Task]]:
    """Every result by kind ("visual", "text", "perplexity"), then by task."""
    kinds: dict[str, dict[str, Task]] = {kind: {} for kind in (*MODALITIES, PERPLEXITY)}
    for row in rows:
        for name, result in row.tasks.items():
            kind = PERPLEXITY if result["metric"] == PERPLEXITY else result["modality"]
            task = kinds[kind].setdefault(name, Task(result["metric"], result["n"], {}))
            task.estimates[row.name] = estimate(result)
    return {kind: tasks for kind, tasks in kinds.items() if tasks}


def _figures(comparison: Comparison) -> Iterator[tuple[str, plot.Figure, str]]:
    """Title, figure and caption of all that there is data for."""
    rows, style = comparison.comparable, comparison.style
    shown = {row.name: style[row.name] for row in rows}
    visual = {row.name: row.visual for row in rows if row.visual}
    text = {row.name: row.text for row in rows if row.text}
    if visual or text:
        kept = {row.name: row.kept for row in rows if row.kept and row is not comparison.reference}
        regions = {row.name: row.region for row in rows if row.region is not None}
        figure = plot.accuracy(visual, text, retention=kept, regions=regions, style=shown)
        yield "Accuracy", figure, "The tuned layers, and means over tasks, each task with the same weight."
        results = _results(rows)
        tasks = {
            f"{name} (text)" if kind == "text" else name: task.estimates
            for kind in MODALITIES
            for name, task in results.get(kind, {}).items()
        }
        yield (
            "Accuracy by task",
            plot.tasks(tasks, shown),
            "Whiskers reach one standard error each way.",
        )
    trained = [row for row in rows if row.training("seconds")]
    costs = {r.name: plot.Cost(*(r.training(name) or math.nan for name in COSTS)) for r in trained if r.visual}
    if costs:
        yield "Cost", plot.cost(costs, visual, shown), "The dashed line is the accuracy of the reference."
    if curves := {row.name: row.curve for row in comparison.rows if row.curve}:
        caption = f"Training loss by step; more than {plot.POINTS} steps are averaged in equal blocks."
        yield "Loss", plot.losses(curves, style), caption
    for row in comparison.rows:
        yield from figures(row)


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

"""Scores and reversions for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from striate.plot import Estimate, RevertProfile
from striate.runs.run import Run
from striate.scores.table import Score, Scores, order, shades

WIDTH = 80
WIDEST = 4  # columns per layer
BARS = "▁▂▃▄▅▆▇█"  # heights are readable without colors, too
COLORS = ("#3b4a8c", "#33638d", "#287d8e", "#1f968b", "#29af7f", "#56c667", "#95d840", "#dce319")
TOP = 5  # number of the most important layers listed
LOWER, HIGHER = "bold blue", "bold dark_orange"


def render(run: Run, verb: str) -> RenderableType:
    """The results of `score` or `revert`."""
    if verb == "score":
        return heat_strips(Scores.load(run.path))
    results = (run.results or {})["reverted"]
    return reversions({kind: RevertProfile.from_json(one) for kind, one in results.items()})


def heat_strips(scores: Scores) -> RenderableType:
    """One heat strip per score, and per task of it, taller and lighter for higher values; above it the range and the
    top layers."""
    wide = layer_width(scores.depth)
    lines: list[Text] = []
    for score in scores.scores.values():
        lines += [_heading(score.name, score), _bars(score, wide)]
        for task, one in score.tasks.items():
            lines += [_heading(f"  {task}, n {one.n}", one), _bars(one, wide)]
    step = 8 // wide
    numbers = "".join(f"{layer:<{wide * step}}" for layer in range(0, scores.depth, step))
    return Group(*lines, Text(numbers.rstrip(), "dim"))


def layer_width(depth: int) -> int:
    """Columns of one layer in a heat strip."""
    return max(1, min(WIDEST, WIDTH // depth))


def reversions(found: Mapping[str, RevertProfile]) -> Table:
    """Perplexity with each group reverted, and its differences from the tuned model's and the backbone's."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("reverted", no_wrap=True)
    for kind in found:
        table.add_column(kind, justify="right", no_wrap=True)
        for other in ("tuned", "backbone"):
            table.add_column(f"- {other}", justify="right", no_wrap=True)
    groups = next(iter(found.values())).groups
    table.add_row("none", *(cell for one in found.values() for cell in _cells(one.tuned, one)), style="dim")
    for name in groups:
        table.add_row(name, *(cell for one in found.values() for cell in _cells(one.groups[name], one)))
    table.add_row("all", *(cell for one in found.values() for cell in _cells(one.backbone, one)), style="dim")
    return table


def _heading(title: str, score: Score) -> Text:
    known = [value for value in score.values if math.isfinite(value)]
    span = f"{min(known):.3g} to {max(known):.3g}" if known else "not measured"
    top = [layer for layer in order(score) if math.isfinite(score.values[layer])][:TOP]
    low = ", low is important" * (score.direction == "low")
    line = Text.assemble((title, "bold"), f"  {span}{low}", (f"  top: {' '.join(map(str, top))}", "dim"))
    line.truncate(WIDTH, overflow="ellipsis")
    return line


def _bars(score: Score, wide: int) -> Text:
    bars = Text()
    for shade in shades(score):
        if math.isnan(shade):
            bars.append("·" * wide, "dim")
            continue
        level = round(shade * (len(BARS) - 1))
        bars.append(BARS[level] * wide, COLORS[level])
    return bars


def _cells(found: Estimate, among: RevertProfile) -> tuple[str, Text, Text]:
    error = "" if math.isnan(found.stderr) else f"±{found.stderr:.1g}"
    return f"{found.value:.4g}{error}", _change(found, among.tuned), _change(found, among.backbone)


def _change(found: Estimate, other: Estimate) -> Text:
    change = found.value - other.value
    if not change:
        return Text("0", "dim")
    return Text(f"▲ {change:+.2g}", HIGHER) if change > 0 else Text(f"▼ {change:+.2g}", LOWER)

"""Scores and reversions for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from striate.plot import Estimate, Reverted
from striate.run import Run
from striate.score.table import Score, Scores, order, shades

WIDTH = 80
WIDEST = 4  # columns a layer
BARS = "▁▂▃▄▅▆▇█"  # to be told apart without colours, too
COLOURS = ("#3b4a8c", "#33638d", "#287d8e", "#1f968b", "#29af7f", "#56c667", "#95d840", "#dce319")
NAMED = 5  # of the most important layers
LOWER, HIGHER = "bold blue", "bold dark_orange"


def shown(run: Run, verb: str) -> RenderableType:
    """What `score` or `revert` found out."""
    if verb == "score":
        return strips(Scores.load(run.path))
    found = (run.results or {})["reverted"]
    return reversions({kind: Reverted.from_json(one) for kind, one in found.items()})


def strips(scores: Scores) -> RenderableType:
    """A strip for each score, the taller and lighter the higher its value; above it range and top layers."""
    wide = max(1, min(WIDEST, WIDTH // scores.depth))
    lines: list[Text] = []
    for score in scores.scores.values():
        lines += [_heading(score), _strip(score, wide)]
    step = 8 // wide
    numbers = "".join(f"{layer:<{wide * step}}" for layer in range(0, scores.depth, step))
    return Group(*lines, Text(numbers.rstrip(), "dim"))


def reversions(found: Mapping[str, Reverted]) -> Table:
    """Perplexity with each group put back, and how far that is from the tuned model's and from the backbone's."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("put back", no_wrap=True)
    for kind in found:
        table.add_column(kind, justify="right", no_wrap=True)
        for other in ("tuned", "backbone"):
            table.add_column(f"- {other}", justify="right", no_wrap=True)
    rows = next(iter(found.values())).groups
    table.add_row("none", *(cell for one in found.values() for cell in _cells(one.tuned, one)), style="dim")
    for name in rows:
        table.add_row(name, *(cell for one in found.values() for cell in _cells(one.groups[name], one)))
    table.add_row("all", *(cell for one in found.values() for cell in _cells(one.backbone, one)), style="dim")
    return table


def _heading(score: Score) -> Text:
    known = [value for value in score.values if math.isfinite(value)]
    span = f"{min(known):.3g} to {max(known):.3g}" if known else "not measured"
    top = [layer for layer in order(score) if math.isfinite(score.values[layer])][:NAMED]
    low = ", low is important" * (score.direction == "low")
    line = Text.assemble((score.name, "bold"), f"  {span}{low}", (f"  top: {' '.join(map(str, top))}", "dim"))
    line.truncate(WIDTH, overflow="ellipsis")
    return line


def _strip(score: Score, wide: int) -> Text:
    strip = Text()
    for shade in shades(score):
        if math.isnan(shade):
            strip.append("·" * wide, "dim")
            continue
        level = round(shade * (len(BARS) - 1))
        strip.append(BARS[level] * wide, COLOURS[level])
    return strip


def _cells(found: Estimate, among: Reverted) -> tuple[str, Text, Text]:
    error = "" if math.isnan(found.stderr) else f"±{found.stderr:.1g}"
    return f"{found.value:.4g}{error}", _change(found, among.tuned), _change(found, among.backbone)


def _change(found: Estimate, other: Estimate) -> Text:
    change = found.value - other.value
    if not change:
        return Text("0", "dim")
    return Text(f"▲ {change:+.2g}", HIGHER) if change > 0 else Text(f"▼ {change:+.2g}", LOWER)

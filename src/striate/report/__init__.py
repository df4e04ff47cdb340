"""Any number of runs, side by side: one self-contained HTML file, or a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from striate.region import Region
from striate.report.comparison import NOTHING, Comparison, Row, compare, percent
from striate.report.page import report

__all__ = ["Comparison", "Row", "compare", "report", "table"]


def table(runs: Sequence[Path], reference: Path | None = None) -> Table:
    """The summary of `runs` for a terminal: regions, accuracy with standard errors, retention and cost."""
    summary = Table(box=None, header_style="bold")
    summary.add_column("run", overflow="fold")
    summary.add_column("layers", no_wrap=True)
    for title in ("visual %", "kept %", "text %", "trained", "seconds", "samples/s", "peak GB"):
        summary.add_column(title, justify="right", no_wrap=True)
    summary.add_column("")
    for row in compare(runs, reference).rows:
        shares = map(percent, (row.visual, row.kept, row.text))
        notes = Text("; ".join(row.notes), style="dim")
        summary.add_row(Text(row.name), _strip(row.region), *shares, *row.cells, notes)
    return summary


def _strip(region: Region | None) -> Text:
    """A cell a layer, those of the region filled."""
    if region is None:
        return Text(NOTHING)
    return Text.assemble(*(("■", "bold cyan") if i in region else ("·", "dim") for i in range(region.depth)))

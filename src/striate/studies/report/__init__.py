"""Any number of runs, side by side: one self-contained HTML file, or a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from striate.region import Region
from striate.studies.report.compared import NOTHING, ComparedRun, interval, percent
from striate.studies.report.comparison import Arm, Comparison, compare
from striate.studies.report.page import report
from striate.studies.report.tables import cost_cells

__all__ = ["ComparedRun", "Comparison", "compare", "report", "table"]


def table(runs: Sequence[Path], reference: Path | None = None) -> Table:
    """Summarize `runs` for a terminal: regions, accuracy ± standard error, retention with its 95 % interval, cost."""
    comparison = compare(runs, reference)
    rows = comparison.rows
    noted = any(row.notes for row in rows)
    summary = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    summary.add_column("run", no_wrap=True)
    summary.add_column("layers", overflow="fold")
    for title in ("visual %", "kept %", "text %", "trained", "seconds", "peak GB"):
        summary.add_column(title, justify="right", no_wrap=True)
    if noted:
        summary.add_column("", overflow="fold")
    for row in rows:
        visual, text = (percent(share).replace(" ± ", "±") for share in (row.visual, row.text))
        kept = "100.0" if row is comparison.reference and row.visual and row.visual.value else _retention(row)
        trained, seconds, _, memory = (cell.text for cell in cost_cells(Arm(row.name, (row,))))
        notes = [Text("; ".join(row.notes), style="dim")] if noted else []
        summary.add_row(Text(row.name), _layer_bar(row.region), visual, kept, text, trained, seconds, memory, *notes)
    return summary


def _retention(row: ComparedRun) -> str:
    if row.kept is None:
        return NOTHING
    share = row.kept.share
    return f"{100 * share.value:.1f} {interval(share, digits=0).replace(' to ', '-')}"


def _layer_bar(region: Region | None) -> Text:
    """One cell per layer, filled if the layer is in the region; above 16 layers the region in text."""
    if region is None:
        return Text(NOTHING)
    if region.depth > 16:
        return Text(f"{region} of {region.depth}")
    return Text.assemble(*(("■", "bold cyan") if i in region else ("·", "dim") for i in range(region.depth)))

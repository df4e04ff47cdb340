"""What a sweep shows: progress, forecast and result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.live import Live
from rich.table import Table
from rich.text import Text

from striate.console import console
from striate.runs.run import Run
from striate.studies.sweep.cell import FAILED, FINISHED, NOT_STARTED, RUNNING, Cell, last_step

NOTHING = "–"
STYLES = {FINISHED: "green", FAILED: "red", RUNNING: "cyan"}
FRAME = 5  # lines of a terminal that are not rows


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep: its cells and their status; where none was to run, a forecast or the commands instead."""

    file: Path
    cells: tuple[Cell, ...]
    forecast: Forecast | None = None
    commands: tuple[str, ...] | None = None

    @property
    def unfinished(self) -> tuple[Cell, ...]:
        """Cells that failed or were stopped."""
        ran = self.forecast is None and self.commands is None
        return tuple(cell for cell in self.cells if ran and cell.status != FINISHED)

    def __rich__(self) -> Table | Forecast | str:
        """One row per run; or the forecast; or one command per line."""
        return self.forecast or (table(self.cells, {}) if self.commands is None else "\n".join(self.commands))


class ForecastRow(NamedTuple):
    """A cell of a plan: trainable parameters, seconds still to come, bytes at the peak of training."""

    name: str
    status: str
    layers: str
    trainable: int
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Forecast:
    """The plan of a sweep, one row per cell."""

    rows: tuple[ForecastRow, ...]

    def __rich__(self) -> Table:
        """The rows, and their sum."""
        shown = _table("cell", "state", "layers", trains="right", time="right", memory="right")
        for row in self.rows:
            memory = "" if row.memory is None else f"{row.memory / 1e9:.2f} GB"
            cells = (row.layers, f"{row.trainable:,}", duration(row.seconds), memory)
            shown.add_row(Text(row.name), _state(row.status), *cells)
        known = [row.seconds for row in self.rows if row.seconds is not None]
        left = f"{duration(sum(known))}" if len(known) == len(self.rows) else ""
        ending = f", {left} one after the other" if left and sum(known) else ""
        shown.caption = f"{len(self.rows)} cell{'s' * (len(self.rows) > 1)}{ending}"
        return shown


class Watch:
    """Shows cells while they run: a live table on a terminal, else one line per change."""

    def __init__(self, cells: Sequence[Cell], steps: Mapping[str, int | None], *, on: bool) -> None:
        self.cells, self.steps, self.on = cells, steps, on
        self.console = console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.shown = {cell.name: cell.refresh().status for cell in cells}

    def __enter__(self) -> Watch:
        if self.on and self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def show(self) -> None:
        """Bring what is shown up to date."""
        if not self.on:
            return
        now = [cell.refresh() for cell in self.cells]
        if self.console.is_terminal:
            self.live.update(table(now, self.steps, room=self.console.height - FRAME), refresh=True)
            return
        for cell in now:
            if cell.status != self.shown[cell.name]:
                self.shown[cell.name] = cell.status
                if cell.status != NOT_STARTED:
                    self.print(f"{cell.name}: {cell.status}{_ending(cell)}")

    def print(self, line: str) -> None:
        """One line above the live table."""
        if self.on:
            self.console.print(line)


def table(cells: Sequence[Cell], steps: Mapping[str, int | None], *, room: int | None = None) -> Table:
    """One row per run; of more than `room` rows, those of the cells that run or failed."""
    rows = [(cell, index) for cell in cells for index in range(len(cell.runs))]
    hidden = room is not None and len(rows) > room
    if hidden:
        rows = [(cell, index) for cell, index in rows if cell.status in (RUNNING, FAILED)][: max(1, room or 0)]
    pruned = " of a cell" * any(len(cell.runs) > 1 for cell in cells)
    shown = _table(f"run{pruned}", "state", step="right", loss="right", **{"visual %": "right", "text %": "right"})
    for cell, index in rows:
        shown.add_row(*_run_columns(cell, index, steps.get(cell.name)))
    if hidden:
        counts = {status: sum(cell.status == status for cell in cells) for status in {cell.status for cell in cells}}
        shown.caption = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    return shown


def duration(seconds: float | None) -> str:
    """Seconds as "1:02:03"; empty if unknown."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _run_columns(cell: Cell, index: int, total: int | None) -> tuple[Text, Text, str, str, str, str]:
    folder = cell.runs[index]
    results = Run(folder).results or {}
    step = last_step(folder)
    state = cell.status
    if state == RUNNING:
        stage, at = cell.stage
        state = stage if at == folder else FINISHED if results else NOTHING
    elif index:
        state = FINISHED if results else NOTHING
    done = f"{step['step']}/{total}" if step and total and not index else str(step.get("step", NOTHING))
    loss = f"{step['loss']:.3f}" if isinstance(step.get("loss"), float) else NOTHING
    return Text(folder.name), _state(state), done, loss, _percent(results, "visual"), _percent(results, "text")


def _state(status: str) -> Text:
    return Text(status, style=STYLES.get(status, "cyan" if status in ("tune", "eval", "prune") else ""))


def _ending(cell: Cell) -> str:
    """The accuracies of a finished cell, as text."""
    if cell.status != FINISHED:
        return ""
    shares = []
    for folder in cell.runs:
        results = Run(folder).results or {}
        sides = [side for side in ("visual", "text") if results.get(side) is not None]
        shares.append(", ".join(f"{side} {_percent(results, side)} %" for side in sides))
    return f": {'; pruned: '.join(shares)}" if any(shares) else ""


def _percent(results: Mapping[str, Any], side: str) -> str:
    value = results.get(side)
    return NOTHING if value is None else f"{100 * value:.1f}"


def _table(*left: str, **justified: Any) -> Table:
    shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), caption_justify="left")
    for title in left:
        shown.add_column(title, overflow="fold")
    for title, side in justified.items():
        shown.add_column(title, justify=side, no_wrap=True)
    return shown

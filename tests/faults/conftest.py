"""Fault injection. Each test records what it tried and what was lost; the records are printed as one table.

    make faults          # all of it, and the table into docs/reliability.md
    make test            # the same tests with small amounts

A test asks for `amount` when it can try more or less, and for `note_fault` to record the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

BEGIN, END = "<!-- table: make faults -->", "<!-- end of table -->"
HEADER = ("fault", "tried", "survived", "lost", "HF `Trainer` alone")


@dataclass(frozen=True)
class Fault:
    """A row of the table: `lost` is what a user loses, `trainer` what `transformers.Trainer` does in the same test."""

    fault: str
    tried: int
    survived: int
    lost: str = "0"
    trainer: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.fault, f"{self.tried:,}", f"{self.survived:,}", self.lost, self.trainer)


def merge(faults: list[Fault]) -> list[Fault]:
    """One row per kind of fault."""
    merged: dict[str, Fault] = {}
    for one in faults:
        before = merged.get(one.fault, replace(one, tried=0, survived=0))
        merged[one.fault] = replace(
            before, tried=before.tried + one.tried, survived=before.survived + one.survived,
            trainer=before.trainer or one.trainer,
        )  # fmt: skip
    return list(merged.values())


ROWS = pytest.StashKey[list[Fault]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="tests/faults: try all, not the part that `make test` tries")
    group.addoption("--table", type=Path, help="tests/faults: write the table into this page, between its marks")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def amount(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`amount(few, all)`: how many to try."""
    full: bool = pytestconfig.getoption("--full", default=False)
    return lambda few, many: many if full else few


@pytest.fixture(scope="session")
def note_fault(pytestconfig: pytest.Config) -> Callable[..., None]:
    """`note_fault(fault, tried, survived, lost, trainer)`: add a row to the table, before the assertion on it."""
    return lambda *cells, **named: pytestconfig.stash[ROWS].append(Fault(*cells, **named))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (rows := merge(config.stash[ROWS])):
        return
    for line in table(rows):
        terminalreporter.write_line(line)
    page: Path | None = config.getoption("--table", default=None)
    if page is not None:
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n" + "\n".join(table(rows)) + f"\n{END}{after}", encoding="utf-8")


def table(rows: list[Fault]) -> list[str]:
    """The rows as Markdown that also reads well in a terminal."""
    lines = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    ruled = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in ruled]

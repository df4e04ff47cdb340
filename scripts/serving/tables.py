"""The tables of docs/serving.md, each written by the script that measures it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def write_table(script: str, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Replace the table of a script, its first row the header, with a line above it."""
    header, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
    start, end = f"<!-- table of scripts/serving/{script} -->", "<!-- end of table -->"
    table = "\n".join([start, f"{title}:\n", *lines, end])
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{start}.*?{end}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")

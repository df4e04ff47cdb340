"""Write docs/families.md: what striate does with every type of vision-language model of the installed transformers."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import page  # noqa: E402

if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(page(), encoding="utf-8")

"""The demo, end to end and very small: ordinary run folders, a summary, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import striate
from striate import demo as demos
from striate.report import table


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos, "QUICK", demos.Size(train=32, test=2, text=2, steps=2))
    report = demos.demo(out=tmp_path / "demo", quick=True)
    assert "OpenMoji" in report.read_text()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["depth"] == 12
    assert set(summary["runs"]) == {"backbone", "all", "uniform", "first", "last"}
    seen = {name: summary["runs"][name]["visual"] for name in demos.REGIONS}
    expected = {name: value / seen["all"] for name, value in seen.items()} if seen["all"] else {}
    assert summary["retention"] == pytest.approx(expected, abs=1e-4)
    assert [summary["runs"][name]["region"] for name in ("uniform", "first", "last")] == ["0,4,8", "0-2", "9-11"]
    assert set(summary["runs"]["uniform"]["tasks"]) == {
        "name", "count", "exists", "colour", "position", "read", "know", "facts", "arithmetic", "stories",
    }  # fmt: skip
    runs = [tmp_path / "demo" / name for name in summary["runs"]]
    for path in runs[1:]:
        run = striate.Run.open(path)
        assert run.info["status"] == "finished"
        assert run.info["training"]["steps"] == 2
        assert len(run.predictions()) == 7 * 2 + 3 * 2
        assert striate.load(path).depth == 12
    assert table(runs).row_count == 5
    with pytest.raises(striate.UserError, match="holds another run"):
        demos.demo(out=tmp_path / "demo", quick=True)


def test_what_ships_is_small_and_plain() -> None:
    files = [file for file in demos.MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}

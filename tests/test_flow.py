"""The demo, end to end and very small: ordinary run folders, a summary, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

import striate
from striate.routing import read_route
from striate.runs.run import Run
from striate.studies import demo as demos
from striate.studies.report import table


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos, "QUICK", demos.DemoSize(train=32, test=2, text=2, steps=2))
    found = demos.demo(out=tmp_path / "demo", quick=True)
    assert "OpenMoji" in found.report.read_text()
    assert found.explored == tmp_path / "demo" / "explore.html"
    assert "layer by layer" in found.explored.read_text()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["depth"] == 12
    assert list(summary["runs"]) == ["backbone", "usual", "all", "uniform", "routed", "last"]
    assert [one["region"] for one in summary["runs"].values()][2:] == ["all", "0,4,8", "0,4,8", "9-11"]
    assert read_route(AutoConfig.from_pretrained(tmp_path / "demo" / "routed" / "checkpoint")).layers == (0, 4, 8)
    assert set(summary["runs"]["uniform"]["tasks"]) == {
        "name", "count", "exists", "colour", "position", "read", "know", "facts", "arithmetic", "stories",
    }  # fmt: skip
    runs = [tmp_path / "demo" / name for name in summary["runs"]]
    for path in runs[1:]:
        run = Run.open(path)
        assert run.info["status"] == "finished"
        assert run.info["training"]["steps"] == 2
        assert len(run.predictions()) == 7 * 2 + 3 * 2
        assert striate.load(path).depth == 12
    assert list(found.runs) == runs
    assert table(runs).row_count == 6
    with pytest.raises(striate.UserError, match="holds another run"):
        demos.demo(out=tmp_path / "demo", quick=True)


@pytest.mark.parametrize("best", [0.8, 0.0])
def test_retention_is_the_share_of_all_layers(tmp_path: Path, best: float) -> None:
    runs = {}
    for number, name in enumerate(["backbone", *demos.ARMS]):
        runs[name] = Run.create(tmp_path / name, verb="tune", options={})
        runs[name].update(depth=12)
        tasks = {"read": {"value": best}}
        runs[name].write_results({"visual": best * (1 if name == "all" else number / 10), "text": 0.5, "tasks": tasks})
    summary = demos.summarize(runs, seed=0, seconds=1.0)
    assert summary["retention"] == (
        {"backbone": 0.0, "all": 1.0, "uniform": 0.2, "routed": 0.3, "last": 0.4} if best else {}
    )


def test_what_ships_is_small_and_plain() -> None:
    files = [file for file in demos.MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}

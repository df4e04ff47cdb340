"""What has finished, as one file of JSON: a line a run, with the score of every question."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from striate.runs.run import Run

RESULTS = Path(__file__).parents[2] / "research" / "results" / "thirty_layers.json"
CELLS = "cells"  # the folder of the sweeps that share cells
KEPT = (
    "region",
    "route",
    "modules",
    "seed",
    "samples",
    "method",
    "steps",
    "learning_rate",
    "projector_learning_rate",
    "remove",
    "by",
    "heal",
)


def collect(out: Path, file: Path) -> int:
    """Write all that has finished to `file`, beside runs that the file has from elsewhere; returns their number."""
    folders = [
        out / "start",
        *sorted(at.parent for name in (CELLS, "lora", "longer", "healing") for at in (out / name).glob("*/run.json")),
    ]
    found = {one["run"]: one for one in load(file)} if file.is_file() else {}
    for run in map(Run, folders):
        if run.results and run.info["status"] == "finished":
            found[name_of(run)] = describe(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(one) for one in found.values())  # a run is a line: what is new shows in a diff
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(found)


def name_of(run: Run) -> str:
    """The folder of a run, below that of the study."""
    return f"{run.path.parent.name}/{run.path.name}"


def describe(run: Run) -> dict[str, Any]:
    """What is kept of a run: its options, results by task, the score of every question, what training took."""
    options, training, results = run.info["options"], run.info.get("training", {}), run.results or {}
    options = options | {"modules": None} if options.get("modules") == "all" else options
    losses = [line["loss"] for line in run.history() if "loss" in line][-20:]
    return {
        "run": name_of(run), "verb": run.info["verb"],
        "options": {key: options.get(key) for key in KEPT if options.get(key) is not None},
        "layers": list(run.region.layers) if run.region else [], "tasks": results["tasks"],
        "visual": round(results["visual"], 4), "facts": round(results["text"], 4),
        "loss": round(fmean(losses), 4) if losses else None,
        "training": {key: training.get(key) for key in ("seconds", "peak_memory_gb", "trainable_parameters")},
        "scores": scores_of(run),
    }  # fmt: skip


def scores_of(run: Run) -> dict[str, list[float]]:
    """The score of every question by task, in the order of the records; of a page of prose, its own perplexity."""
    scores: dict[str, list[float]] = {}
    for one in run.predictions():
        scores.setdefault(one["task"], []).append(round(one["score"], 3))
    return scores


def load(file: Path = RESULTS) -> list[dict[str, Any]]:
    """The runs that have finished."""
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    print(f"{collect(Path('runs/thirty'), RESULTS)} runs in {RESULTS}")

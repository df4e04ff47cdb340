"""The paper's experiments in small, on the demo's world: strategies, number of layers by data size, pruning.

    python examples/paper_mini/run.py          # or: make paper-mini

Makes the world and the untuned model, scores its layers, and does three sweeps, the YAML files beside this script. It
can be stopped and killed at any time: the same command goes on. Options of `striate sweep` may follow (`--workers 2`:
two cells side by side). Leaves `runs/paper-mini/report.html`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from striate.runs.cli import main
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import score
from striate.studies.demo import FULL, assemble_start
from striate.studies.demo.world import write_world

OUT = Path("runs/paper-mini")
SHEETS = ("strategies", "sizes", "pruning")


def prepare() -> None:
    """The world, the untuned model, and its scores, those that are missing."""
    world, start, scores = OUT / "world", OUT / "backbone", OUT / "scores"
    if not (world / "text.json").is_file():  # the last file written
        write_world(world, seed=0, train=FULL.train, test=FULL.test, text=FULL.text)
    if not is_finished(start):
        shutil.rmtree(start, ignore_errors=True)
        assemble_start(start)
    if not is_finished(scores):
        shutil.rmtree(scores, ignore_errors=True)
        score(start, data=world / "train.json", images=world / "images", out=scores, options=ReadOptions(device="cpu"))


def is_finished(run: Path) -> bool:
    """Whether there is a finished run."""
    return (run / "run.json").is_file() and Run.open(run).info["status"] == "finished"


def paper_mini(*options: str) -> int:
    """Run what is unfinished, and write the report; returns the exit status."""
    prepare()
    for sheet in SHEETS:
        if status := main(["sweep", str(Path(__file__).parent / f"{sheet}.yaml"), *options]):
            return status
    return main(["report", *(str(OUT / sheet) for sheet in SHEETS), "--out", str(OUT / "report.html")])


if __name__ == "__main__":
    raise SystemExit(paper_mini(*sys.argv[1:]))

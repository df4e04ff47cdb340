"""How much do models see after layers are pruned? On the demo's world: accuracy against the number of layers cut.

    python bench/regions.py --out runs/regions --seeds 0 1 2
    python bench/curves.py --runs runs/regions --out runs/curves --seeds 0 1 2

Prunes the tuned models that bench/regions.py leaves: the one with all layers tuned, by angular distance over all of its
layers; the one with a region tuned, by angular distance outside the region and, as the control, at random there. Every
pruned model is evaluated as it is and after healing: a short tune of the layers next to the cuts. Finished runs
are reused. Prints a table and writes `curves.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from regions import evaluate_once, is_finished

from striate.runs.pruning import prune
from striate.runs.run import Run
from striate.studies.demo import FULL, tuning
from striate.train import TrainOptions

MODELS = {"all layers": "tuned-all", "region": "tuned-0-4-8"}
# Which layers must stay: a model of which all layers were tuned has no region.
KEEP = {"all layers": "none", "region": "0,4,8"}
CURVES = (("all layers", "angular_distance"), ("region", "angular_distance"), ("region", "random"))


@dataclass(frozen=True)
class Point:
    """One pruned model of a curve."""

    model: str
    by: str
    remove: int
    healed: bool

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.model}-{self.by}-{self.remove}{'-healed' if self.healed else ''}".replace(" ", "-")


def points(removals: list[int]) -> Iterator[Point]:
    """All of them, few removed layers first, so that at any time all curves have the same points."""
    for remove in removals:
        for healed in (False, True):
            yield from (Point(model, by, remove, healed) for model, by in CURVES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/regions"), help="the folder of bench/regions.py")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remove", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--heal-steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64, help="training records that angular distance is measured on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[int, dict[str, Any]] = {seed: {} for seed in args.seeds}
    for seed in args.seeds:
        for model, run in MODELS.items():
            found[seed][f"{model} whole"] = outcome(Run.open(args.runs / f"seed-{seed}" / run))
    for point in points(args.remove):
        for seed in args.seeds:
            options = replace(tuning(FULL, seed), steps=args.heal_steps)
            run = prune_once(args.out / f"seed-{seed}", args.runs / f"seed-{seed}", point, args.samples, options)
            found[seed][point.name] = outcome(run)
        (args.out / "curves.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found)


def prune_once(out: Path, runs: Path, point: Point, samples: int, options: TrainOptions) -> Run:
    """The evaluated run of a pruned model; created if missing."""
    run, world = out / point.name, runs / "world"
    if not is_finished(run):
        shutil.rmtree(run, ignore_errors=True)
        prune(
            runs / MODELS[point.model], out=run, region=KEEP[point.model], remove=str(point.remove), by=point.by,
            data=world / "train.json", images=world / "images", samples=samples,
            heal=world / "train.json" if point.healed else None, heal_layers="neighbors", options=options,
        )  # fmt: skip
    evaluate_once(run, world, keep=False)
    return Run.open(run)


def outcome(run: Run) -> dict[str, Any]:
    """Accuracies of a model and its removed layers."""
    results = run.results
    assert results is not None
    tasks = {task: one["value"] for task, one in results["tasks"].items()}
    removed = run.info.get("prune", {}).get("removed", [])
    return {"removed": removed, "visual": results["visual"], "text": results["text"], "tasks": tasks}


def print_table(found: dict[int, dict[str, Any]]) -> None:
    """A table: accuracy by model, mean and spread over seeds."""
    print(f"{'model':44}{'visual %':>9}{'sd':>6}{'text %':>8}  removed by seed")
    for name in next(iter(found.values())):
        runs = [seed[name] for seed in found.values()]
        visual, text = ([100 * run[side] for run in runs] for side in ("visual", "text"))
        spread = stdev(visual) if len(visual) > 1 else float("nan")
        removed = "  ".join(",".join(map(str, run["removed"])) for run in runs)
        print(f"{name:44}{fmean(visual):9.1f}{spread:6.1f}{fmean(text):8.1f}  {removed}")


if __name__ == "__main__":
    main()

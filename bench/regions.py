"""Visual accuracy of regions picked by scores against evenly spread ones, on the demo's world with equal steps.

    python bench/regions.py --out runs/regions --seeds 0 1 2

For every seed: the demo's untuned model is scored, all layers are tuned and scored, and then one model is tuned for
each region: evenly spread with every offset, three random draws, the top and bottom quarter by every score, taken
before tuning and after it. Regions that turn out equal are tuned once. Runs that are finished are not made again, so
the script can be stopped and started, or started once for each seed with one thread each and then for all seeds to
collect. Prints a table and writes `regions.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any

import torch

from striate.region import Region
from striate.runs.evaluating import EVAL, evaluate
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import score
from striate.runs.training import tune
from striate.scores import Score, Scores
from striate.studies.demo import FULL, MODELS, DemoSize, assemble_start, tuning
from striate.studies.demo.world import write_world

DEPTH, QUARTER = 12, 3
SPREAD = {f"uniform, offset {offset}": f"uniform:{QUARTER}@{offset}" for offset in range(DEPTH // QUARTER)}
RANDOM = {f"random draw {seed}": f"random:{QUARTER}@{seed}" for seed in range(3)}
KEPT = ("all", "0-4-8")
"""Tuned models that are kept: bench/curves.py prunes them."""
BLOCKS = {"first": f"first:{QUARTER}", "last": f"last:{QUARTER}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/regions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--test", type=int, default=FULL.test, help="test questions a task")
    parser.add_argument("--samples", type=int, default=64, help="training records that the scores are measured on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = replace(FULL, steps=args.steps, train=16 * args.steps, test=args.test, text=args.test)
    folders = {seed: args.out / f"seed-{seed}" for seed in args.seeds}
    choices = {seed: prepare(out, seed, size, args.samples) for seed, out in folders.items()}
    found: dict[int, dict[str, Any]] = {seed: {} for seed in args.seeds}
    for name in choices[args.seeds[0]]:  # choice by choice, so that what is there at any time is there for every seed
        for seed, out in folders.items():
            found[seed][name] = measure(out, Region.parse(choices[seed][name], DEPTH), seed, size)
        (args.out / "regions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found)
    print_agreement(folders, found)


def prepare(out: Path, seed: int, size: DemoSize, samples: int) -> dict[str, str]:
    """Create what the choice of regions needs; returns the region form by the name of the choice."""
    world, start = out / "world", out / "backbone"
    if not (world / "text.json").is_file():
        write_world(world, seed=seed, train=size.train, test=size.test, text=size.text)
    if not is_finished(start):
        shutil.rmtree(start, ignore_errors=True)
        assemble_start(start)
    everything = tune_once(out, Region.parse("all", DEPTH), seed, size)
    picked: dict[str, dict[str, str]] = {"top": {}, "bottom": {}}
    for when, run in (("before", start), ("after", everything)):
        for name in score_once(run, world, after=when == "after", seed=seed, samples=samples):
            for end, chosen in picked.items():
                chosen[f"{end} by {name}, {when} tuning"] = f"{end}:{QUARTER}@{run}:{name}"
    return {"all": "all", **SPREAD, **RANDOM, **BLOCKS, **picked["top"], **picked["bottom"]}


def measure(out: Path, region: Region, seed: int, size: DemoSize) -> dict[str, Any]:
    """Region and accuracies of the model tuned in this region."""
    results = Run.open(tune_once(out, region, seed, size)).results
    assert results is not None
    tasks = {task: one["value"] for task, one in results["tasks"].items()}
    return {"region": layers_of(region), "visual": results["visual"], "text": results["text"], "tasks": tasks}


def is_finished(run: Path) -> bool:
    """Whether there is a finished run."""
    return (run / "run.json").is_file() and Run.open(run).info["status"] == "finished"


def layers_of(region: Region) -> str:
    """The layers themselves, whatever chose them: equal regions are one run."""
    return "-".join(map(str, region)) if len(region) < region.depth else "all"


def tune_once(out: Path, region: Region, seed: int, size: DemoSize) -> Path:
    """The evaluated run of a region; created if missing."""
    run, world = out / f"tuned-{layers_of(region)}", out / "world"
    if not is_finished(run):
        shutil.rmtree(run, ignore_errors=True)
        tune(
            out / "backbone", data=world / "train.json", images=world / "images", out=run, method="full",
            region=",".join(map(str, region)), options=tuning(size, seed),
        )  # fmt: skip
    evaluate_once(run, world, keep=layers_of(region) in KEPT)
    return run


def evaluate_once(run: Path, world: Path, *, keep: bool) -> None:
    """Evaluate a run that is not yet; the weights of dozens of models are not kept."""
    if Run.open(run).results is None:
        evaluate(
            run, [world / "test.json", world / "text.json"], images=world / "images", max_new_tokens=8,
            options=replace(EVAL, batch=64, device="cpu"),
        )  # fmt: skip
        if not keep:
            shutil.rmtree(run / "checkpoint")
        print(run, Run.open(run).results["visual"], flush=True)


def score_once(run: Path, world: Path, *, after: bool, seed: int, samples: int) -> list[str]:
    """Names of the scores of a run; measured if missing."""
    if not (run / "scores.json").is_file():
        backbone = str(MODELS / "backbone") if after else None
        score(
            run, data=world / "train.json", images=world / "images", backbone=backbone,
            options=ReadOptions(samples=samples, seed=seed, device="cpu"),
        )  # fmt: skip
    return list(Scores.load(run / "scores.json").scores)


def print_table(found: dict[int, dict[str, Any]]) -> None:
    """A table: visual accuracy by choice, mean and spread over seeds, best first."""
    names = dict.fromkeys(name for seed in found.values() for name in seed)
    rows = []
    for name in names:
        runs = [seed[name] for seed in found.values() if name in seed]
        kept = [100 * seed[name]["visual"] / seed["all"]["visual"] for seed in found.values() if name in seed]
        visual, text = ([100 * run[side] for run in runs] for side in ("visual", "text"))
        spread = stdev(visual) if len(visual) > 1 else float("nan")
        rows.append((fmean(visual), spread, fmean(kept), fmean(text), name, " ".join(run["region"] for run in runs)))
    print(f"{'choice':52}{'visual %':>9}{'sd':>6}{'kept %':>8}{'text %':>8}  regions by seed")
    for visual, spread, kept, text, name, regions in sorted(rows, reverse=True):
        print(f"{name:52}{visual:9.1f}{spread:6.1f}{kept:8.1f}{text:8.1f}  {regions}")


def print_agreement(folders: dict[int, Path], found: dict[int, dict[str, Any]]) -> None:
    """A table: how well a score, summed over a region, predicts the visual accuracy of the model tuned there.

    Spearman's rank correlation over all regions of a quarter that were tuned, seed by seed.
    """
    print(f"\n{'score':52}{'mean':>6}  by seed")
    rows = []
    for when, run in (("before", "backbone"), ("after", "tuned-all")):
        scores = {seed: Scores.load(out / run / "scores.json").scores for seed, out in folders.items()}
        for name in next(iter(scores.values())):
            agree = [agreement(scores[seed][name], found[seed]) for seed in folders]
            rows.append((fmean(agree), f"{name}, {when} tuning", agree))
    for mean, name, agree in sorted(rows, reverse=True):
        print(f"{name:52}{mean:6.2f}  {' '.join(f'{one:.2f}' for one in agree)}")


def agreement(score: Score, found: dict[str, Any]) -> float:
    """Rank correlation of a score's sum over regions with the accuracy after tuning them."""
    seen = {one["region"]: one["visual"] for one in found.values() if one["region"] != "all"}
    sign = -1 if score.direction == "low" else 1
    sums = [sign * sum(score.values[int(layer)] for layer in region.split("-")) for region in seen]
    return correlation(ranks(sums), ranks([*seen.values()]))


def ranks(values: list[float]) -> list[float]:
    """From 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


if __name__ == "__main__":
    main()

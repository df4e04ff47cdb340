"""What an option costs in accuracy and saves in time: the demo's model and world, `uniform:25%`, over seeds.

    python bench/prices.py --out runs/prices --seeds 0 1 2 --json bench/results/prices.json

The first arm is striate as it is, the second the plain way to the same: padded batches, activation checkpointing. The
others change one option. All arms of a seed stand side by side in time; runs that are finished are not made again.
Prints mean and spread of visual and text accuracy and the median of each arm's time over that of the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from regions import evaluate_once, is_finished

from striate.runs.run import Run
from striate.runs.training import tune
from striate.studies.demo import FULL, assemble_start, tuning
from striate.studies.demo.world import write_world

ARMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "padded, activation checkpointing": {"packing": "off", "checkpointing": "all"},
    "projector frozen": {"projector": "freeze"},
    "frozen layers NF4": {"frozen_layers": "nf4"},
    "8-bit moments": {"optimizer": "adamw_8bit"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/prices"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", choices=ARMS, default=list(ARMS), help="arms; the first one is always there"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    arms = {name: changes for name, changes in ARMS.items() if name in ("defaults", *args.only)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in args.seeds:
        out = prepare(args.out / f"seed-{seed}", seed, args.steps)
        for name, changes in arms.items():
            found[name].append(measure(out, name, changes, seed, args.steps))
    rows = {name: summary(runs, found["defaults"]) for name, runs in found.items()}
    for name, row in rows.items():
        print(
            f"{name:40}{row['visual']:6.1f} ± {row['visual_sd']:.1f}{row['text']:8.1f} ± {row['text_sd']:.1f}"
            f"{row['time']:8.2f}"
        )
    if args.json:
        head = {"command": "python bench/prices.py", "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps(head | {"arms": rows, "runs": found}, indent=1) + "\n", encoding="utf-8")


def prepare(out: Path, seed: int, steps: int) -> Path:
    """The folder with a seed's world and untuned model."""
    if not (out / "world" / "text.json").is_file():
        write_world(out / "world", seed=seed, train=16 * steps, test=FULL.test, text=FULL.text)
    if not is_finished(out / "backbone"):
        shutil.rmtree(out / "backbone", ignore_errors=True)
        assemble_start(out / "backbone")
    return out


def measure(out: Path, name: str, changes: dict[str, Any], seed: int, steps: int) -> dict[str, float]:
    """Accuracies in percent and seconds of training of one arm."""
    run, world = out / name.replace(" ", "-").replace(",", "").replace("%", "percent"), out / "world"
    if not is_finished(run):
        shutil.rmtree(run, ignore_errors=True)
        options = {key: value for key, value in changes.items() if key != "projector"}
        tune(
            out / "backbone", data=world / "train.json", images=world / "images", out=run, method="full",
            options=replace(tuning(replace(FULL, steps=steps), seed), **options),
            projector=changes.get("projector", "train"),
        )  # fmt: skip
    evaluate_once(run, world, keep=False)
    info, results = Run.open(run).info["training"], Run.open(run).results
    assert results is not None
    return {"visual": 100 * results["visual"], "text": 100 * results["text"], "seconds": info["seconds"]}


def summary(runs: list[dict[str, float]], defaults: list[dict[str, float]]) -> dict[str, float]:
    """Mean and spread of the accuracies, and the time over that of the defaults, seed by seed."""
    means: dict[str, float] = {}
    for side in ("visual", "text"):
        values = [run[side] for run in runs]
        means |= {side: fmean(values), f"{side}_sd": stdev(values) if len(values) > 1 else 0.0}
    pairs = zip(runs, defaults, strict=True)
    means["time"] = median(run["seconds"] / base["seconds"] for run, base in pairs)
    return {name: round(value, 3) for name, value in means.items()}


if __name__ == "__main__":
    main()

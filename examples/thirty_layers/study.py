"""The study on thirty layers: which layers of SmolLM2-135M have to be tuned for it to see?

    python examples/thirty_layers/study.py --llm SMOLLM2.gguf --workers 2       # or: make thirty

Makes the world and the start, then does the sheets below in their order, the most informative first, each a
`striate sweep`. It can be stopped and killed at any time: the same command goes on. Whenever a sheet ends, what has
finished is written to research/results/thirty_layers.json; `results.py` does that at once, `table.py` makes tables.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import predict
import torch
import yaml
from results import CELLS, RESULTS, collect
from start import START, start
from transformers import AutoConfig
from world import write_world

from striate.routing import write_route
from striate.runs.cli import main as striate
from striate.runs.evaluating import evaluate
from striate.runs.options import call_arguments, options_of
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import score
from striate.scores.consensus import CHOOSING
from striate.scores.metrics import METRICS
from striate.scores.table import Scores

OUT = Path("runs/thirty")
TRAIN, TEST, STEPS, BATCH = 3000, 110, 80, 8
# Peak learning rates of all layers and of a region, chosen by the trials "rates" and "lora_rates"
# (research/log_thirty.md).
ALL_RATE, REGION_RATE = 2e-4, 5e-4
LORA_RATES = 1e-3, 4e-3
PROJECTOR_RATE = 1e-4
LORA = {"method": "lora", "rank": 32, "alpha": 64}
SEEDS = [0, 1, 2]
PREDICTING = [name for name, metric in METRICS.items() if "backbone" not in metric.needs]  # looked at by `predict.py`
FOUR = ["all", "uniform:25%", "uniform:25%@2", "last:25%"]

# Each sheet: the grid of a sweep for each seed, and what differs from the others. Those that share a folder
# share cells: what is pruned was tuned before.
SHEETS: dict[str, dict[str, Any]] = {
    "four": {"grid": {"region": FOUR}},
    "places": {
        "grid": {
            "region": [
                "uniform:25%@1", "uniform:25%@3", "first:25%", "middle:25%", "hybrid:25%", "random:25%@0",
                "random:25%@1", "random:25%@2",
            ],
        },
    },
    # Chosen by scores of the start, before any tuning (`score_start`).
    "scores": {"grid": {"region": ["spread:25%@{scores}:gradient", "top:25%@{scores}:layer_contribution"]}},
    "sizes": {"grid": {"region": [f"uniform:{number}" for number in (4, 2, 1, 16, 6)]}},
    # Of 3000 records 640 are trained on: of 150 and 300 each one four times and twice.
    "data": {"grid": {"samples": ["5%", "10%"], "region": ["all", "uniform:25%", "uniform:4"]}},
    "pruning": {
        "grid": {"region": ["all", "uniform:25%"], "prune.remove": ["1", "2", "4", "6", "8"]},
        "prune": {"samples": 64, "region": "uniform:25%"},  # of all, too, only what lies outside of it goes
    },
    "healing": {
        "grid": {
            "region": ["all", "uniform:25%"], "prune.remove": ["2", "4", "8"],
            "prune.heal": ["train.json"],
        },
        "prune": {"samples": 64, "region": "uniform:25%", "steps": 40},
    },
    # Image tokens pass through a quarter of the layers: those that train (`same`), those that contribute most to image
    # tokens, and some without layer 0; or through more of them.
    "route": {
        "grid": {
            "region": ["uniform:25%"],
            "route": [
                "uniform:25%", "auto:25%", "uniform:25%@2", "first:25%", "first:50%", "first:67%", "uniform:50%",
            ],
        },
    },
    "route_all": {"grid": {"region": ["all"], "route": ["uniform:25%", "first:67%", "first:50%"]}},
    "modules": {"grid": {"region": ["all", "uniform:25%"], "modules": ["gate_up", "attention"]}},
    "lora": {
        "grid": {"region": ["all", "uniform:25%"]},
        "out": "lora",
        "rates": LORA_RATES,
        "tune": LORA,
    },
    "longer": {"out": "longer", "grid": {"region": ["all", "uniform:25%"]}, "tune": {"steps": 3 * STEPS}},
    "longer_route": {
        "out": "longer", "grid": {"region": ["all"], "route": ["first:67%"]}, "tune": {"steps": 3 * STEPS},
    },
}  # fmt: skip
# Tried on validation scenes, before all else; they are no part of the results.
TRIALS: dict[str, dict[str, Any]] = {
    "rates": {
        "out": "rates",
        "grid": {"learning_rate": [2e-4, 5e-4], "region": ["all", "uniform:25%"]},
        "tune": {"steps": 40},
        "eval": {"samples": 20},
    },
    "lora_rates": {
        "out": "rates",
        "grid": {"learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], "region": ["all", "uniform:25%"]},
        "tune": LORA | {"steps": 40},
        "eval": {"samples": 20},
    },
    "gemma_rates": {
        "out": "rates",
        "grid": {"learning_rate": [5e-5, 1e-4, 2e-4], "region": ["all", "uniform:25%"]},
        "tune": {"steps": 40},
        "eval": {"samples": 20},
    },
}
# Of another language model, 18 layers; peak rates of all layers and of a region, chosen by the trial "gemma_rates".
OTHERS = {
    "gemma": {
        "grid": {"region": ["all", "uniform:25%", "uniform:25%@1", "last:25%"]},
        "rates": (5e-5, 2e-4),
        "eval": {"samples": 60},  # questions a task: an answer takes long with a vocabulary of 262,144
    },
}


def sheet(name: str, out: Path, *, seed: int, everything: bool) -> dict[str, Any]:
    """One seed of a sheet as a sweep file: its cells that tune all layers, or those that tune a region; empty if it has
    none."""
    own = (SHEETS | OTHERS | TRIALS)[name]
    world = out / ("validation" if name in TRIALS else "world")
    grid: dict[str, Any] = {"seed": [seed]} | own["grid"]
    regions = [region for region in grid["region"] if (region == "all") == everything]
    grid["region"] = [region.format(scores=out / "scores") for region in regions]
    of_all, of_region = own.get("rates", (ALL_RATE, REGION_RATE))
    tune = {
        "method": "full", "steps": STEPS, "batch": BATCH, "micro_batch": BATCH,
        "learning_rate": of_all if everything else of_region, "projector_learning_rate": PROJECTOR_RATE,
        "max_length": 256, "attn": "eager", "device": "cpu",  # on a CPU eager attention trains faster than SDPA
    } | own.get("tune", {})  # fmt: skip
    asked = {
        "data": [str(world / "test.json"), str(world / "text.json")], "batch": 64, "max_new_tokens": 40,
        "max_length": 512, "device": "cpu", "dtype": "bfloat16",
    } | own.get("eval", {})  # fmt: skip
    prune = own.get("prune")
    if "prune.heal" in grid:
        grid = grid | {"prune.heal": [str(world / file) for file in grid["prune.heal"]]}
        healing = ("batch", "micro_batch", "learning_rate", "max_length", "attn", "device")
        prune |= {key: tune[key] for key in healing}
    if not grid["region"]:
        return {}
    return {
        "model": str(out / "start"), "data": str(world / "train.json"), "images": str(world / "images"),
        "eval": asked, "out": str(out / own.get("out", CELLS)),
        "tune": {key: value for key, value in tune.items() if key not in grid},
        **({"prune": prune} if prune else {}), "grid": grid,
    }  # fmt: skip


def prepare(out: Path, llm: str, parts: Path) -> None:
    """The worlds and the start, as far as they are not there."""
    for name, seed in (("world", 0), ("validation", 9)):
        if not (out / name / "text.json").is_file():  # the last file written
            questions = {"test": TEST} if name == "world" else {"test": 30, "split": "validation"}
            write_world(out / name, train=TRAIN, seed=seed, **questions)
    run = Run(out / "start")
    if run.info.get("status") != "finished":
        shutil.rmtree(run.path, ignore_errors=True)
        start(llm, run.path, parts=parts)


def study(out: Path, results: Path, *, workers: int, only: list[str], seeds: list[int]) -> int:
    """Do what is left to do; returns the exit status."""
    for name in only or SHEETS:
        if name == "scores":
            score_start(out, "scores", "world/train.json", CHOOSING, samples=64)
            score_start(out, "scores_by_task", "validation/test.json", PREDICTING, samples=128, by="task")
            write_scores(out / "scores_by_task")
        for seed in [9] if name in TRIALS else seeds:
            for everything in (True, False):
                if not (content := sheet(name, out, seed=seed, everything=everything)):
                    continue
                file = out / f"{name}.yaml"
                file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
                if status := striate(["sweep", str(file), "--workers", str(workers)]):
                    return status
                print(f"{name}, seed {seed}: {collect(out, results)} runs in {results}", flush=True)
            if name == "route":
                evaluate_routed(out, seed)
    evaluate_start(out)
    collect(out, results)
    return 0


def score_start(
    out: Path, name: str, file: str, metrics: Sequence[str], *, samples: int, by: Literal["task"] | None = None
) -> None:
    """Measure scores of the start, before any tuning."""
    if Run(out / name).info.get("status") != "finished":
        shutil.rmtree(out / name, ignore_errors=True)
        data, options = out / file, ReadOptions(samples=samples, max_length=256, device="cpu")
        score(
            out / "start", data=data, images=data.parent / "images", out=out / name, metrics=metrics, by=by,
            options=options,
        )  # fmt: skip


def write_scores(run: Path) -> None:
    """Keep the scores of a run, without the measurements of single records, beside the results."""
    scores = Scores.load(run)
    brief = {name: replace(one, samples=None, table=None) for name, one in scores.scores.items()}
    replace(scores, scores=brief).save(predict.SCORES)


def evaluate_start(out: Path) -> None:
    """Ask the start what its tuned cells are asked."""
    run = Run(out / "start")
    if run.results is None:
        ask(run, out)


def evaluate_routed(out: Path, seed: int) -> None:
    """Ask the quarter that was tuned without a route, with one: what a route costs that no training went through."""
    tuned, run = (Run(out / CELLS / f"seed-{seed}_uniform-25%{end}") for end in ("", "+routed-at-evaluation"))
    if tuned.results is None or run.results is not None:
        return
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(tuned.path, run.path, ignore=shutil.ignore_patterns("results.json", "predictions*"))
    config = AutoConfig.from_pretrained(run.checkpoint)
    write_route(config, run.region)
    config.save_pretrained(run.checkpoint)
    run.update(options=run.info["options"] | {"route": "uniform:25%, at evaluation only"})
    ask(run, out)


def ask(run: Run, out: Path) -> None:
    """Evaluate a run as the tuned cells are evaluated."""
    settings = sheet("four", out, seed=0, everything=True)["eval"]
    settings |= {"model": run.path, "images": out / "world" / "images"}
    defaults = {option.name: option.default for option in options_of(evaluate)}
    evaluate(**call_arguments(evaluate, defaults | settings))


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", required=True, help="SmolLM2-135M-Instruct: a .gguf file, a folder or the hub id")
    parser.add_argument("--start", type=Path, default=START, help="tower and projector, made by start.py for this llm")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1, help="cells side by side, a thread each")
    parser.add_argument("--only", nargs="+", default=[], choices=[*SHEETS, *OTHERS, *TRIALS], help="these sheets alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options.out, options.llm, options.start)
    return study(
        options.out, options.results, workers=options.workers, only=options.only, seeds=options.seeds
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())

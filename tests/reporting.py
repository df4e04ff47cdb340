"""Runs and scores as other verbs leave them, without any model."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from striate.region import Region
from striate.runs.run import Run
from striate.scores.table import Score, Scores

DEPTH = 12
# Most tests look at the page alone; files of figures take longer than all else.


QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def make_run(
    path: Path,
    *,
    region: str | None = "all",
    visual: tuple[float, ...] = (0.8, 0.6),
    text: float | None = 0.7,
    seconds: float | None = 100.0,
    data: str = "test.json",
    n: int = 100,
    seed: int = 0,
    answers: tuple[str, ...] = ("cup", "two"),
    images: tuple[Path, ...] = (),
    **options: Any,
) -> Path:
    """A finished run: two visual tasks with standard errors 0.03 and 0.04, two text tasks, two answers."""
    run = Run.create(path, verb="tune", options={"epochs": 1, **options}, seed=seed)
    if region:
        run.write_region(Region.parse(region, DEPTH))
    for step in range(1, 4):
        run.log({"step": step, "loss": 3.0 / step, "lr": 1e-3, "seconds": float(step)})
    tasks = {
        name: {"metric": "exact_match", "modality": "visual", "value": value, "stderr": stderr, "n": n}
        for name, value, stderr in zip(("read", "count"), visual, (0.03, 0.04), strict=False)
    }
    if text is not None:
        tasks["facts"] = {"metric": "exact_match", "modality": "text", "value": text, "stderr": None, "n": n}
        tasks["story"] = {"metric": "perplexity", "modality": "text", "value": 2.125, "stderr": 0.0, "n": n}
    run.write_results({"tasks": tasks, "seconds": 1.0, "data": data})
    run.write_predictions(
        {
            "id": task,
            "task": task,
            "metric": "exact_match",
            "question": f"What to {task}?",
            "answers": ["cup"],
            "prediction": answer,
            "score": float(answer == "cup"),
            "images": [str(image) for image in images],
        }
        for task, answer in zip(("read", "count"), answers, strict=True)
    )
    training = {
        "seconds": seconds,
        "samples_per_second": 8.0,
        "peak_memory_gb": 1.5,
        "trainable_parameters": 1_480_000,
    }
    run.update(status="finished", **({"training": training} if seconds else {}))
    return path


def make_scores(path: Path, *, depth: int = DEPTH, suffix: str = "", partial: bool = False) -> Path:
    """A finished score run: one score rises with depth, one falls, one falls and counts the other way round."""
    rising = tuple(layer / depth for layer in range(depth))
    spread = (0.01,) * depth
    table = tuple((*(0.1,) * (depth - start), *(math.nan,) * start) for start in range(depth))
    scores = [
        Score(
            f"image_attention{suffix}", rising, stderr=spread, n=9, samples=(rising,) * 9, source=f"somebody{suffix}"
        ),
        Score(f"angular_distance{suffix}", rising[::-1], stderr=spread, n=9, parts={"image": rising}, table=table),
        Score(f"weight_angle{suffix}", (math.nan, *rising[:0:-1]), direction="low"),
    ]
    run = Run.create(path, verb="score", options={}, seed=0)
    scores_file = Scores(f"some/model{suffix}", depth, 9, {score.name: score for score in scores}, partial)
    run.write_scores(scores_file.to_json())
    run.update(status="finished")
    return path


def answer(path: Path, scores: dict[str, list[float]], *, words: str = "") -> Path:
    """Give a run results and predictions that agree: visual tasks with these scores, one a record."""
    run = Run.open(path)
    tasks = {
        name: {"metric": "exact_match", "modality": "visual", "value": fmean(own), "stderr": 0.1, "n": len(own)}
        for name, own in scores.items()
    }
    run.write_results({"tasks": tasks, "seconds": 1.0, "data": "test.json"})
    run.write_predictions(
        {
            "id": str(i), "task": name, "metric": "exact_match", "question": f"{words} {name} {i}?", "answers": ["yes"],
            "prediction": "yes" if score else "no", "score": score, "images": [],
        }
        for name, own in scores.items()
        for i, score in enumerate(own)
    )  # fmt: skip
    return path

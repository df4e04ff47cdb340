"""What `striate cost` forecasts for the paper's four recipes on GPUs, as a table; no model is loaded.

    python bench/forecast.py

For each recipe and GPU the fastest step of 128 records (576 image, 64 + 64 text tokens) that fits into 90 % of the
memory: adapters of rank 128 on all layers, the same on the quarter, and the quarter's full weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from striate.region import Region
from striate.studies.cost import Counts, FakeModel, Machine, Setup, Step, fake_model, gpu_of, with_one_image
from striate.studies.cost.fit import ROOM
from striate.studies.cost.section import Trained

RECIPES = Path(__file__).parents[1] / "recipes"
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
GPUS = ("rtx-4090", "a100-80gb", "h100")
WAYS: tuple[tuple[Trained, str], ...] = (("lora", "all"), ("lora", "uniform:25%"), ("full", "uniform:25%"))


def main() -> None:
    """Print the table."""
    heads = [f"{method}, {region}" for method, region in WAYS]
    print("| recipe | GPU |", " | ".join(heads), "|")
    print("|---" * (2 + len(WAYS)) + "|")
    for file in sorted(RECIPES.glob("*.json")):
        model = fake_model(str(file), dtype="bfloat16")
        tried = [steps(model, method, region) for method, region in WAYS]
        for gpu in map(gpu_of, GPUS):
            print(f"| {file.stem} | {gpu.name} |", " | ".join(best(found, gpu) for found in tried), "|", flush=True)


def steps(model: FakeModel, method: Trained, region: str) -> list[Step]:
    """A step for each micro-batch, with and without activation checkpointing."""
    setup, chosen = with_one_image(model, Setup(method=method)), Region.parse(region, model.vlm.depth)
    tried = (
        replace(setup, micro_batch=number, checkpointing=recomputed)
        for number, recomputed in product(MICRO_BATCHES, (False, True))
    )
    return [Counts(model, one).step(chosen) for one in tried]


def best(found: Sequence[Step], gpu: Machine) -> str:
    """The fastest of the steps that fit."""
    fitting = [step for step in found if step.memory.peak <= ROOM * gpu.memory]
    if not fitting:
        return "does not fit"
    step = min(fitting, key=lambda step: step.seconds(*gpu.reached))
    return describe(step, step.seconds(*gpu.reached))


def describe(step: Step, seconds: float) -> str:
    """Memory, micro-batch, and records per second."""
    how = f"{step.setup.micro_batch} a pass" + ", recomputed" * step.setup.checkpointing
    return f"{step.memory.peak / 1e9:.1f} GB, {how}, {step.setup.batch / seconds:.1f} records/s"


if __name__ == "__main__":
    main()

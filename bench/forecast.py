"""What `striate cost` forecasts for the paper's four recipes on GPUs, as a table; no model is loaded.

    python bench/forecast.py

For each recipe and GPU the fastest step of 128 records (576 image, 64 + 64 text tokens) that fits into 90 % of the
memory: adapters of rank 128 on all layers, the same on the quarter, and the quarter's full weights.
"""

from __future__ import annotations

from pathlib import Path

from striate.region import Region
from striate.studies.cost import FakeModel, Machine, Setup, Step, fake_model, gpu_of, with_one_image
from striate.studies.cost.section import Trained
from striate.studies.cost.step import fastest

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
        for gpu in map(gpu_of, GPUS):
            found = [best(model, method, region, gpu) for method, region in WAYS]
            print(f"| {file.stem} | {gpu.name} |", " | ".join(found), "|", flush=True)


def best(model: FakeModel, method: Trained, region: str, gpu: Machine) -> str:
    """The fastest step that fits."""
    setup, chosen = with_one_image(model, Setup(method=method)), Region.parse(region, model.vlm.depth)
    step = fastest(model, setup, chosen, gpu.memory, gpu, MICRO_BATCHES)
    return describe(step, step.seconds(*gpu.reached)) if step else "does not fit"


def describe(step: Step, seconds: float) -> str:
    """Memory, micro-batch, and records per second."""
    how = f"{step.setup.micro_batch} a pass" + ", recomputed" * step.setup.checkpointing
    return f"{step.memory.peak / 1e9:.1f} GB, {how}, {step.setup.batch / seconds:.1f} records/s"


if __name__ == "__main__":
    main()

"""How striate's training step grows: with depth, image tokens, batch and size of the region, one at a time.

    python bench/growth.py --out bench/results/growth.json --figure research/growth.png

SmolLM2-135M's shape with random weights (`bench/train.py`), the projector trained. Every setting runs `--steps` steps
behind one that does not count; the median counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from train import SHAPES, Shape, build, write_records

import striate
from striate.data import Examples, collate, read
from striate.plot.style import PALETTE, STYLE
from striate.train import trainable_parameters
from striate.train.loss import FastPaths, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import select
from striate.vlm.devices import has_native_bfloat16

BASE = {"depth": 30, "image tokens": 64, "batch": 16, "layers trained": 8}
SERIES = {
    "depth": [8, 15, 30, 60],
    "image tokens": [16, 64, 144, 256],
    "batch": [2, 4, 8, 16],
    "layers trained": [1, 4, 8, 15, 30],
}


def seconds_per_step(settings: dict[str, int], steps: int) -> float:
    """The median of steps: forward, backward, AdamW."""
    device = torch.device("cpu")
    base = SHAPES["135m"]
    side = base.tower["patch_size"] * round(settings["image tokens"] ** 0.5)
    shape: Shape = replace(base, tower=base.tower | {"image_size": side})
    in_bfloat16 = has_native_bfloat16(device)
    # Frozen layers are held in the dtype of the matmuls, as `tune` holds those of a checkpoint in bfloat16.
    vlm = build(shape, device, torch.bfloat16 if in_bfloat16 else torch.float32, depth=settings["depth"])
    with tempfile.TemporaryDirectory() as folder:
        examples = Examples(read(write_records(Path(folder), shape, settings["batch"])).records, vlm.processor)
        batch = collate([examples[index] for index in range(len(examples))], pad_id=0)
    region = striate.Region.parse(f"uniform:{settings['layers trained']}", vlm.depth)
    named = trainable_parameters(vlm, select(vlm, region))
    optimizer = torch.optim.AdamW([p for part in named.values() for p in part.values()], fused=True)
    seconds = []
    cast = torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16)
    with record_by_record(vlm):
        for _ in range(steps + 1):
            began = time.perf_counter()
            with cast:
                loss = answer_losses(vlm, vlm.model, batch, fast_paths=FastPaths(True, True)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Records per second against each of the four."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.8))
        axes = figure.subplots(1, 4)
        for axis, (name, series) in zip(axes, found.items(), strict=True):
            sizes = [int(size) for size in series]
            batches = sizes if name == "batch" else [BASE["batch"]] * len(sizes)
            rates = [batch / seconds for batch, seconds in zip(batches, series.values(), strict=True)]
            axis.plot(sizes, rates, marker="o", color=PALETTE[0])
            axis.set_xlabel(name)
            axis.set_ylim(0, 1.08 * max(rates))
        axes[0].set_ylabel("records per second")
        figure.tight_layout()
        figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="image file to write")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name, sizes in SERIES.items():
        found[name] = {}
        for size in sizes:
            found[name][str(size)] = seconds_per_step(BASE | {name: size}, options.steps)
            print(f"{name} {size}: {found[name][str(size)]:.2f} s", flush=True)
    doubled = found["depth"]["60"] / found["depth"]["30"]
    print(f"twice the depth, the same number of layers trained: {doubled:.2f} x the time")
    options.out.write_text(json.dumps({"base": BASE, "seconds": found, "twice_the_depth": doubled}, indent=2) + "\n")
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()

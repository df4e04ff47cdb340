"""How long saving a state stops the training: seconds of the steps with a save beyond those without one, on the clock
and of the training thread's own CPU time, which other work on the machine does not lengthen.

    python bench/save.py          # 0.3 GB of trained weights, a state of 1 GB

Full fine-tuning of all layers of a model with random weights, with a state saved in every third step. The first two
saves are not counted: in the first one the memory for the copies is new.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from train import SHAPES, build, write_records

import striate
from striate.data import read
from striate.train import TUNE, trainable_parameters
from striate.train.fit import fit
from striate.train.optimizer import Group
from striate.train.watch import Log
from striate.vlm import select

EVERY = 3


class Times(Log):
    """When each step ended, before its state was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[float, float]] = []

    def step(self, entry: dict[str, Any]) -> None:
        super().step(entry)
        self.ends.append((time.perf_counter(), time.thread_time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size; 8 layers")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    text = {"hidden_size": args.width, "intermediate_size": 2 * args.width, "num_attention_heads": 8,
            "num_key_value_heads": 8, "num_hidden_layers": 8}  # fmt: skip
    shape = replace(SHAPES["tiny"], text=SHAPES["tiny"].text | text, batch=1)
    vlm = build(shape, torch.device(args.device), torch.float32)
    named = trainable_parameters(vlm, select(vlm, "all"))
    weights = sum(p.nbytes for parameters in named.values() for p in parameters.values())
    options = replace(
        TUNE, steps=EVERY * args.saves + 1, save_steps=EVERY, batch=1, dtype="float32", device=args.device
    )
    log, region = Times(), striate.Region.parse("all", vlm.depth)
    with tempfile.TemporaryDirectory() as folder:
        records = read(write_records(Path(folder), shape, options.steps))
        groups = {part: Group(parameters, 2e-5) for part, parameters in named.items()}
        fit(vlm, vlm.model, region, records, groups, options, log=log, state=Path(folder) / "state")
    print(f"{weights / 1e9:.2f} GB of trained weights")
    for name, ends in zip(("on the clock", "of CPU time"), zip(*log.ends, strict=True), strict=True):
        seconds = [after - before for before, after in itertools.pairwise(ends)]  # from the end of step 1 on
        behind_save = seconds[EVERY - 1 :: EVERY][2:]
        others = [one for index, one in enumerate(seconds) if index % EVERY != EVERY - 1]
        stall = median(behind_save) - median(others)
        print(
            f"seconds {name}: a step {median(others):.2f}, with a save {median(behind_save):.2f} "
            f"({min(behind_save):.2f} to {max(behind_save):.2f}): {stall / (weights / 1e9):.2f} per GB"
        )


if __name__ == "__main__":
    main()

"""How long `striate` takes to its help, and `striate tune` on a tiny model to the end of its first step.

    python bench/start.py          # medians of three starts: seconds on the clock, and of CPU time

CPU time counts all threads of the process, from its start; on a machine that does nothing else the clock shows less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

STEP = """
import os, sys, time
from striate.runs import stage, training
step = stage.RunLog.step
def end(self, entry):
    step(self, entry)
    print(time.time(), time.process_time(), flush=True)
    os._exit(0)
stage.RunLog.step = end
from striate.runs.cli import main
main(sys.argv[1:])
"""
HELP = """
import sys, time
from striate.runs.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(time.time(), time.process_time())
"""


def timed(code: str, *arguments: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU time, medians of three."""
    found = []
    for _ in range(3):
        began = time.time()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        end, used = map(float, done.stdout.split("\n")[-2].split())
        found.append((end - began, used))
    return median(clock for clock, _ in found), median(used for _, used in found)


def main() -> None:
    import torch
    from train import SHAPES, build, write_records

    shape = replace(SHAPES["tiny"], batch=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vlm = build(shape, torch.device("cpu"), torch.float32)
        vlm.model.save_pretrained(folder / "model")
        vlm.processor.save_pretrained(folder / "model")
        data = write_records(folder, shape, 8)
        os.chdir(folder)
        words = ["tune", "model", "--data", str(data), "--out", "run", "--batch", "4", "--method", "full"]
        print("striate tune --help: {:.2f} s, {:.2f} s of CPU time".format(*timed(HELP, "tune", "--help")))
        clock, used = timed(STEP, *words, "--steps", "1", "--resume", "auto")
        print(f"striate tune to the end of its first step: {clock:.2f} s, {used:.2f} s of CPU time")


if __name__ == "__main__":
    main()

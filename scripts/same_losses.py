"""Compare the losses of a 20-step tune, in float32, between this checkout and another commit.

    python scripts/same_losses.py REV

Both train the same tiny model on the same records, by full fine-tuning and with LoRA. Exits 1 if a loss differs by more
than a relative 1e-6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-6
TUNE = ("--region", "1,3", "--steps", "20", "--batch", "4", "--micro-batch", "2", "--learning-rate", "1e-3",
        "--projector-learning-rate", "1e-3", "--dtype", "float32", "--device", "cpu")  # fmt: skip
METHODS = {"full": ("--method", "full"), "lora": ("--method", "lora", "--rank", "4", "--dropout", "0")}


def losses(source: Path, model: Path, data: Path, out: Path, *options: str) -> list[float]:
    """The loss of each step, by the code in `source`."""
    program = [sys.executable, "-m", "striate", "tune", str(model), "--data", str(data), "--out", str(out), *options]
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(source)})
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def main(revision: str) -> int:
    """Print the largest difference for each method; the exit status."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    from pico import pico_llava
    from training import write_data

    different = False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run(["git", "worktree", "add", "--detach", str(place / "tree"), revision], check=True, cwd=ROOT)
        try:
            (place / "data").mkdir()
            model, data = pico_llava(place / "model"), write_data(place / "data")
            for method, options in METHODS.items():
                then = losses(place / "tree" / "src", model, data, place / f"{method}-then", *TUNE, *options)
                now = losses(ROOT / "src", model, data, place / f"{method}-now", *TUNE, *options)
                off = max(abs(a - b) / abs(a) for a, b in zip(then, now, strict=True))
                print(f"{method}: {len(now)} steps, losses differ by {off:.1e} at most")
                different |= off > TOLERANCE
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place / "tree")], check=True, cwd=ROOT)
    return int(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

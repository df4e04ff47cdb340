"""Tiny checkpoints, written by the tested version of transformers, under older ones: `make compat`.

    python scripts/compat.py .venv/compat 5.15.0 5.17.0 5.19.0      # prints the table of docs/hardware.md

Each version is installed into a folder of its own, which stands before the environment's packages. There every family
is loaded and run on the inputs that the tested version ran on: the logits have to be the same. LLaVA is also tuned, in
full and with LoRA: the losses have to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

OWN = ("transformers", "tokenizers", "huggingface_hub")  # not held to the versions of constraints.txt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the versions are installed, a folder each")
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        print(json.dumps(check(args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        written = Path(name)
        write(written)
        found = {version: run_check(written, install(args.folder / version, version)) for version in args.versions}
    rows = list(dict.fromkeys(row for column in found.values() for row in column))
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for row in rows:
        print(f"| {row} | {' | '.join(column.get(row, 'not run') for column in found.values())} |")


def install(folder: Path, version: str) -> Path:
    """The folder with that version of transformers and what it needs; everything else is as in constraints.txt."""
    if not (folder / "transformers").is_dir():
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        kept = [line for line in lines if line.partition("==")[0] not in OWN]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(kept))
            constraints.flush()
            options = ["--quiet", "--disable-pip-version-check", "--constraint", constraints.name]
            line = [*options, "--target", str(folder), f"transformers=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "install", *line], check=True, stderr=subprocess.DEVNULL)
    return folder


def run_check(written: Path, packages: Path) -> dict[str, str]:
    """`check` in a process that has these packages; one line of reason if it does not come to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT / "src")])}
    line = [sys.executable, __file__, "--check", str(written)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"all": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(folder: Path) -> None:
    """A checkpoint of every family, with inputs and logits, records to train on, and the losses of two trainings."""
    import pico
    import pytest
    from asking import in_family
    from tracing import family_batch
    from training import write_data

    for name in pico.FAMILIES:
        try:
            vlm = in_family(name)
        except pytest.skip.Exception:  # its processor needs torchvision
            continue
        inputs = family_batch(vlm, name).inputs
        vlm.model.eval().save_pretrained(folder / name)
        torch.save({"inputs": inputs, "logits": logits(vlm, inputs)}, folder / name / "expected.pt")
    pico.pico_llava(folder / "tuned")
    write_data(folder)
    losses = {method: tune(folder, "tested", method) for method in ("full", "lora")}
    (folder / "losses.json").write_text(json.dumps(losses))


@torch.inference_mode()
def logits(vlm: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return vlm.model(**inputs, use_cache=False).logits


def tune(folder: Path, run: str, method: Any) -> list[float]:
    """The losses of a short training of LLaVA."""
    from striate.runs.training import tune
    from striate.train import TrainOptions

    options = TrainOptions(batch=4, micro_batch=2, steps=3, learning_rate=1e-3, dtype="float32", device="cpu")
    out = folder / f"{run}-{method}"
    done = tune(folder / "tuned", data=folder / "train.json", out=out, region="1,3", method=method, options=options)
    return [entry["loss"] for entry in done.history()]


def check(folder: Path) -> dict[str, str]:
    """What became of each family and of each training under the transformers of this process."""
    import transformers

    import striate

    def same_logits(name: str) -> bool:
        expected = torch.load(folder / name / "expected.pt", weights_only=True)
        vlm = striate.load(folder / name, device="cpu")
        return torch.allclose(logits(vlm, expected["inputs"]), expected["logits"], rtol=1e-4, atol=1e-5)

    def same_losses(method: str) -> bool:
        found = torch.tensor(tune(folder, transformers.__version__, method))
        return torch.allclose(found, torch.tensor(expected_losses[method]), rtol=1e-4)

    expected_losses = json.loads((folder / "losses.json").read_text())
    families = sorted(path.parent.name for path in folder.glob("*/expected.pt"))
    return {name: outcome(same_logits, name) for name in families} | {
        f"llava, tune {method}": outcome(same_losses, method) for method in expected_losses
    }


def outcome(work: Callable[[str], bool], name: str) -> str:
    try:
        return "same" if work(name) else "differs"
    except Exception as error:  # whatever a version raises goes into the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


if __name__ == "__main__":
    main()

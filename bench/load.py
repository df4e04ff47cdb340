"""CPU memory that each of two processes takes to load and shard a model: at most, from before it is opened on.

    python bench/load.py --out runs/load          # a checkpoint of 1.5 GB in bfloat16

The memory is what a process cannot give back (anonymous, `RssAnon`), sampled every 5 ms; pages of the checkpoint that
the kernel has mapped are shared by all processes and go when memory is short.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from train import SHAPES, build, write_records

from striate.runs.training import tune
from striate.train import TUNE

TEXT = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000}  # fmt: skip


class ShardedError(Exception):
    """The model is sharded; the measurement ends here."""


def anonymous() -> float:
    """This process's anonymous memory, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024 / 1e9


def measure(out: Path, dtype: str) -> None:
    """One process: open, shard, and print the most memory on the way and what is left at the end."""
    before, most = anonymous(), [0.0]

    def watch() -> None:
        while True:
            most[0] = max(most[0], anonymous())
            time.sleep(0.005)

    def stop(*_: object, **__: object) -> None:
        raise ShardedError

    vars(import_module("striate.train.fit"))["verify_fast_paths"] = stop
    threading.Thread(target=watch, daemon=True).start()
    options = replace(TUNE, batch=2, micro_batch=1, steps=1, shard=True, device="cpu", dtype=dtype)
    run = out / f"run-{os.environ['MASTER_PORT']}"
    try:
        tune(out / "model", data=out / "train.json", out=run, method="full", options=options)
    except ShardedError:
        held = anonymous()
        print(f"rank {os.environ['RANK']}: at most {most[0] - before:.2f} GB, {held - before:.2f} GB once sharded")
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args.out, args.dtype)
        return
    shape = replace(SHAPES["tiny"], text=SHAPES["tiny"].text | TEXT)
    if not (args.out / "train.json").is_file():
        args.out.mkdir(parents=True)
        vlm = build(shape, torch.device("cpu"), torch.bfloat16)
        vlm.model.save_pretrained(args.out / "model")
        vlm.processor.save_pretrained(args.out / "model")
        write_records(args.out, shape, 4)
        del vlm
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--out", str(args.out), "--dtype", args.dtype],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.wait()


if __name__ == "__main__":
    main()

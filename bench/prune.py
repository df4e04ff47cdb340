"""What cutting layers out of a checkpoint costs, against copying its files.

    python bench/prune.py --out prune.json

The checkpoint is a synthetic LLaVA in bfloat16, random bytes for weights, in shards; every fourth layer goes. Surgery
and copying take turns; times are medians after a turn that does not count, until all is on the disk. Targets for 2 GB:
at most 1.5 times the time of copying, and at most 0.5 GB of memory more than the largest tensor takes. Probe and proof
are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from striate.prune import Numbering, Surgery
from striate.region import Region
from striate.train.memory import PeakMemory
from striate.vlm import Vlm
from striate.weights import INDEX

TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
}  # fmt: skip


def skeleton(gigabytes: float, depth: int) -> Vlm:
    """A LLaVA of about that size in bfloat16, without memory of its own."""
    # A layer has about 12 width^2 weights (4 in attention, 8 in the MLP), embeddings and head 2 x vocabulary x width.
    width = 64 * max(1, round(math.sqrt(gigabytes * 1e9 / 2 / (12 * depth)) / 64))
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": depth,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": 8192,
    }  # fmt: skip
    with torch.device("meta"):
        config = AutoConfig.for_model("llava", text_config=text, vision_config=TOWER, image_token_id=6)
        return Vlm.of(AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16))


def write_checkpoint(vlm: Vlm, folder: Path, *, shard_bytes: int) -> dict[str, int]:
    """Random bytes under the model's names, shard by shard; returns sizes in bytes."""
    vlm.model.config.save_pretrained(folder)
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in vlm.model.state_dict().items():
        if sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, place = {}, 0
        for name, tensor in shard.items():
            offsets = [place, place + tensor.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
            weight_map[name], place = file.name, offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, place, 1 << 24):
                out.write(os.urandom(min(1 << 24, place - start)))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = [tensor.nbytes for shard in shards for tensor in shard.values()]
    return {"checkpoint": sum(sizes), "largest_tensor": max(sizes), "shards": len(shards)}


def take_turns(works: dict[str, Callable[[Path], None]], place: Path, *, turns: int) -> dict[str, dict[str, Any]]:
    """Median seconds, and the most memory above what was held before (GB), of each piece of work."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    above: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            target = place / name
            memory = PeakMemory(torch.device("cpu"))
            memory.start()
            rest, began = memory.gigabytes(), time.perf_counter()
            work(target)
            os.sync()  # else the one pays for what the other left to be written
            if turn:
                seconds[name].append(time.perf_counter() - began)
                above[name].append(memory.gigabytes() - rest)
            shutil.rmtree(target)
    return {
        name: {"seconds": median(seconds[name]), "all_seconds": seconds[name], "above_rest_gb": max(above[name])}
        for name in works
    }


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--depth", type=int, default=32, help="decoder layers")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0, help="most of one file")
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place, source = Path(name), Path(name) / "source"
        source.mkdir()
        vlm = skeleton(options.gigabytes, options.depth)
        sizes = write_checkpoint(vlm, source, shard_bytes=int(options.shard_gigabytes * 1e9))
        numbers = Numbering(Region(tuple(range(1, options.depth, 4)), options.depth))
        surgery = Surgery.of(vlm, source, numbers)
        works: dict[str, Callable[[Path], None]] = {
            "copy": lambda target: shutil.copytree(source, target) and None,
            "surgery": lambda target: surgery.write(source, target),
        }
        found = take_turns(works, place, turns=options.turns)
    report = {
        "machine": {"processor": platform.processor() or platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "bytes": sizes,
        "layers": {"depth": options.depth, "cut": len(numbers.removed)},
        **found,
        "time_ratio": found["surgery"]["seconds"] / found["copy"]["seconds"],
        "above_largest_tensor_gb": found["surgery"]["above_rest_gb"] - sizes["largest_tensor"] / 1e9,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

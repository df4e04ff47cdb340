"""What pruned models cost to serve, against the whole one, in one run.

    python bench/serve.py runs/easy-vqa/uniform runs/pruned-4 runs/pruned-8 --data test.json --out serve.json

The models take turns on the same records; times are medians after a turn that does not count. Time to first token is
that of one generated token, tower and prompt included; decoding is what each further token takes, `--tokens` of them,
with a cache. Bytes are those of the weight files, and of the cache after the prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from striate.data import Batch, collate, encode, read
from striate.vlm import Vlm, load
from striate.vlm.reading import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="run or model folders, the whole model first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=8, help="records answered together")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    models = {str(path): load(path, dtype=args.dtype, device=args.device) for path in args.models}
    first = models[str(args.models[0])]
    examples = [encode(one, first.processor, generation=True) for one in list(read(args.data, images=args.images))]
    batch = collate(examples[: args.batch], pad_id=first.pad_token_id, side="left").to(first.device, first.model.dtype)
    found = measure(models, batch, args.tokens, args.turns)
    whole = found[str(args.models[0])]
    for row in found.values():
        row["ratios"] = {name: row[name] / whole[name] for name in whole if name != "ratios"}
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "device": str(first.device)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": {"records": len(batch.labels), "prompt_tokens": batch.labels.shape[1], "new_tokens": args.tokens},
        "models": found,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["models"], indent=1))


def measure(models: dict[str, Vlm], batch: Batch, tokens: int, turns: int) -> dict[str, dict[str, Any]]:
    """Medians and sizes by model."""
    first: dict[str, list[float]] = {name: [] for name in models}
    decoding: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, vlm in models.items():
            short, long = seconds(vlm, batch, 1), seconds(vlm, batch, 1 + tokens)
            if turn:
                first[name].append(short)
                decoding[name].append(long - short)
    return {
        name: {
            "layers": vlm.depth,
            "first_token_seconds": median(first[name]),
            "decode_tokens_per_second": len(batch.labels) * tokens / median(decoding[name]),
            "checkpoint_bytes": sum(file.stat().st_size for file in Path(model_folder(name)).glob("*.safetensors")),
            "cache_bytes": cache_bytes(vlm, batch),
        }
        for name, vlm in models.items()
    }


@torch.inference_mode()
def seconds(vlm: Vlm, batch: Batch, tokens: int) -> float:
    """Time to generate exactly that many tokens for every record."""
    began = now(vlm.device)
    vlm.model.generate(
        **batch.inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=vlm.pad_token_id
    )
    return now(vlm.device) - began


@torch.inference_mode()
def cache_bytes(vlm: Vlm, batch: Batch) -> int:
    """Keys and values of the prompt, over all layers."""
    cache = vlm.model(**batch.inputs, use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()

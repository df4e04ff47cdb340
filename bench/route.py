"""What a route saves: image tokens that pass through a quarter of the layers, against the same model without a route.

    OMP_NUM_THREADS=1 python bench/route.py --out bench/results/route.json               # SmolLM2-135M's shape
    python bench/route.py --shape 7b --device cuda --out bench/results/route-gpu.json    # a 7B shape, on a GPU

Random weights; every record has 576 image tokens and 128 of text, half of which are an answer. Plain and routed take
turns in one process; a figure is the median of its turns. Beside each ratio stands that of the arithmetic (FLOPs of
all matrix products), which a machine that did nothing else would reach.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import train as shapes
import transformers
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from striate.data import IGNORED, Batch
from striate.region import Region
from striate.route import multiply_adds, route
from striate.studies.cost.tally import FORMULAS
from striate.train import trainable_parameters
from striate.train.loss import FastPaths, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import Vlm, select

IMAGE, TEXT, ANSWER = 576, 128, 64
BEFORE = 32  # text tokens in front of the image
TOWER = {"135m": {"image_size": 192, "patch_size": 8}, "7b": {"image_size": 336, "patch_size": 14}}  # 24 x 24 patches
REGION = "uniform:25%"
CPU = {operation: partial(formula) for operation, formula in FORMULAS.items() if operation not in flop_registry}
for formula in CPU.values():
    vars(formula)["_get_raw"] = True  # it takes tensors, as those of the registry do


def model(shape: str, device: torch.device, dtype: torch.dtype, depth: int | None) -> Vlm:
    """A LLaVA of that shape with random weights, whose tower gives 576 features."""
    chosen = shapes.SHAPES[shape]
    return shapes.build(replace(chosen, tower={**chosen.tower, **TOWER[shape]}), device, dtype, depth=depth)


def batch_for(vlm: Vlm, records: int) -> Batch:
    """Records of one image each, all of one length."""
    torch.manual_seed(1)
    ids = torch.randint(10, 2000, (records, IMAGE + TEXT))
    ids[:, BEFORE : BEFORE + IMAGE] = vlm.image_token_id or 0
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    side = vlm.model.config.vision_config.image_size
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(records, 3, side, side),
    }
    batch = Batch(inputs, labels, ids == vlm.image_token_id, tuple(map(str, range(records))))
    return batch.to(vlm.device, vlm.model.dtype)


def prefill(vlm: Vlm, batch: Batch, cast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """The prompts up to the first token's logits, with a cache."""
    with torch.no_grad(), cast():
        vlm.model(**batch.inputs, use_cache=True, logits_to_keep=1)


def step(vlm: Vlm, batch: Batch, cast: Callable[[], AbstractContextManager[None]]) -> None:
    """Forward and backward pass of striate's training."""
    vlm.model.zero_grad()
    with record_by_record(vlm), cast():
        answer_losses(vlm, vlm.model, batch, fast_paths=FastPaths(packing=True, chunking=True)).mean().backward()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long it takes: on a CPU its time on the processor, which others on the machine do not take part in."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def flops(work: Callable[[], None]) -> int:
    """Of all matrix products."""
    with FlopCounterMode(display=False, custom_mapping=CPU) as counter:
        work()
    return counter.get_total_flops()


def kept(vlm: Vlm, work: Callable[[], None]) -> int:
    """Bytes of what is kept for the backward pass, without parameters and what is kept twice."""
    own = {p.untyped_storage().data_ptr() for p in (*vlm.model.parameters(), *vlm.model.buffers())}
    sizes: dict[int, int] = {}
    held = []

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or another would come to lie where it was
        return tensor

    backward = torch.Tensor.backward
    try:
        torch.Tensor.backward = lambda *_, **__: None  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            work()
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    return sum(sizes.values())


def compare(
    work: Callable[[], None], first: Callable[[], None], routed: Callable[[], Any], device: torch.device, turns: int
) -> dict[str, Any]:
    """Plain and routed, turn by turn, behind one of each that does not count; `first` is what a route learns from."""
    found: dict[str, list[float]] = {"plain": [], "routed": []}
    for turn in range(turns + 1):
        for name, context in (("plain", nullcontext), ("routed", routed)):
            with context():
                first()
                took = seconds(work, device)
            if turn:
                found[name].append(took)
    arithmetic = {}
    for name, context in (("plain", nullcontext), ("routed", routed)):
        with context():
            arithmetic[name] = flops(work)
    return {
        "seconds": {name: median(times) for name, times in found.items()},
        "speedup": median(plain / short for plain, short in zip(*found.values(), strict=True)),
        "flops": arithmetic,
        "arithmetic": arithmetic["plain"] / arithmetic["routed"],
        "all_seconds": found,
    }


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Prefill and training step in one precision."""
    device = torch.device(options.device)
    vlm = model(options.shape, device, dtype, options.depth)
    region = Region.parse(REGION, vlm.depth)
    routed = partial(route, vlm, region)
    batch = batch_for(vlm, options.batch)
    first = partial(prefill, vlm, batch_for(vlm, 1))
    found = {"prefill": compare(partial(prefill, vlm, batch), first, routed, device, options.turns)}
    trainable_parameters(vlm, select(vlm, region))
    cast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    training = partial(step, vlm, batch, cast)
    found["step"] = compare(training, partial(first, cast), routed, device, options.turns)
    plain = kept(vlm, training)
    with routed():
        found["step"]["kept_gb"] = {"plain": plain / 1e9, "routed": kept(vlm, training) / 1e9}
    forward = [multiply_adds(vlm, one, image=IMAGE, text=TEXT) for one in (Region.parse("all", vlm.depth), region)]
    found["multiply_adds_a_record"] = dict(zip(("plain", "routed"), forward, strict=True))
    return found


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depth", type=int, help="decoder layers; default: the shape's")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {"region": REGION, "image": IMAGE, "text": TEXT, "answer": ANSWER, "batch": options.batch,
                     "turns": options.turns, "shape": options.shape},
    }  # fmt: skip
    for dtype in options.dtypes:
        report[dtype] = found = measure(options, getattr(torch, dtype))
        for name in ("prefill", "step"):
            one = found[name]
            print(f"{dtype} {name:8} {one['seconds']}: {one['speedup']:.2f} x, arithmetic {one['arithmetic']:.2f} x, "
                  f"kept {one.get('kept_gb', '')}", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

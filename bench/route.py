"""What a route saves: image tokens that pass through a quarter of the layers, against the same model without a route.

    OMP_NUM_THREADS=1 python bench/route.py --out bench/results/route.json               # SmolLM2-135M's shape
    python bench/route.py --shape 7b --device cuda --out bench/results/route-gpu.json    # a 7B shape, on a GPU
    python bench/route.py --quick                                                        # does it run?

Random weights; every record has 576 image tokens and 128 of text, half of which are an answer (about as many where the
Trainer takes part: bench/train.py). Plain and routed take turns in one process, the recipe of LoRA on all layers and
striate's in processes of their own; a figure is the median of its turns. Beside each ratio stands that of the
arithmetic (FLOPs of all matmuls), which a machine that did nothing else would reach.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import train as shapes
import transformers
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from striate.data import IGNORED, Batch
from striate.prune.cutting import Numbering, cut
from striate.region import Region
from striate.routing import multiply_adds, route
from striate.studies.cost.section import FORMULAS
from striate.train import trainable_parameters
from striate.train.loss import FastPaths, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import Vlm, select

IMAGE, TEXT, ANSWER = 576, 128, 64
BEFORE = 32  # text tokens in front of the image
REGION = "uniform:25%"
CPU = {operation: partial(formula) for operation, formula in FORMULAS.items() if operation not in flop_registry}
for formula in CPU.values():
    vars(formula)["_get_raw"] = True  # it takes tensors, as those of the registry do


def model(shape: str, device: torch.device, dtype: torch.dtype, depth: int | None) -> Vlm:
    """A LLaVA of that shape with random weights, whose tower gives 576 features."""
    return shapes.build(shapes.SHAPES[shape], device, dtype, depth=depth)


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


@dataclass(frozen=True)
class Variant:
    """One of two ways to the same: `work` is timed within `context`, behind `first`, from which a route learns."""

    work: Callable[[], None]
    first: Callable[[], None]
    context: Callable[[], Any] = nullcontext


def compare(plain: Variant, routed: Variant, device: torch.device, turns: int) -> dict[str, Any]:
    """Both, turn by turn, behind one of each that does not count."""
    variants = {"plain": plain, "routed": routed}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, one in variants.items():
            with one.context():
                one.first()
                took = seconds(one.work, device)
            if turn:
                found[name].append(took)
    arithmetic = {}
    for name, one in variants.items():
        with one.context():
            arithmetic[name] = flops(one.work)
    return {
        "seconds": {name: median(times) for name, times in found.items()},
        "speedup": median(before / after for before, after in zip(*found.values(), strict=True)),
        "flops": arithmetic,
        "arithmetic": arithmetic["plain"] / arithmetic["routed"],
        "all_seconds": found,
    }


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Prefill, first token and training step in one precision, in this process."""
    device = torch.device(options.device)
    vlm = model(options.shape, device, dtype, options.depth)
    region = Region.parse(REGION, vlm.depth)
    batch, one = batch_for(vlm, options.batch), batch_for(vlm, 1)
    first = partial(prefill, vlm, one)
    plain = Variant(partial(prefill, vlm, batch), first)
    routed = partial(route, vlm, region)
    found = {"prefill": compare(plain, replace(plain, context=routed), device, options.turns)}
    small, left = pruned(options, dtype, region)
    routed_small = Variant(partial(prefill, small, batch), partial(prefill, small, one), partial(route, small, left))
    found["first token"] = compare(plain, routed_small, device, options.turns)
    del small, routed_small
    trainable_parameters(vlm, select(vlm, region))
    cast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    training = Variant(partial(step, vlm, batch, cast), partial(first, cast))
    found["step"] = compare(training, replace(training, context=routed), device, options.turns)
    kept_plain = kept(vlm, training.work)
    with routed():
        found["step"]["kept_gb"] = {"plain": kept_plain / 1e9, "routed": kept(vlm, training.work) / 1e9}
    forward = [multiply_adds(vlm, one, image=IMAGE, text=TEXT) for one in (Region.parse("all", vlm.depth), region)]
    found["multiply_adds_a_record"] = dict(zip(("plain", "routed"), forward, strict=True))
    return found


def pruned(options: argparse.Namespace, dtype: torch.dtype, region: Region) -> tuple[Vlm, Region]:
    """The model without 4 of its 30 layers, or as large a share, and the route in what is left."""
    small = model(options.shape, torch.device(options.device), dtype, options.depth)
    numbers = Numbering(Region(region.complement.layers[-max(1, round(4 / 30 * small.depth)) :], small.depth))
    cut(small, numbers)
    return small, numbers.of(region)


def against_lora(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """A step of the Trainer with LoRA r 128 on all layers, with and without recomputation, and striate's
    on all layers, and on the region without and with a route, each in processes of its own, turn by turn."""
    about = shapes.About(
        options.shape, options.device, dtype, options.steps, options.batch, "", depth=options.depth
    )  # fmt: skip
    names = ["all", "all-recomputed", "striate-all", "striate", "striate-routed"]
    *_, found = shapes.take_turns(names, about, options.turns, limit=None, more=[])
    shapes.compare(found)
    return found


def lora_flops(options: argparse.Namespace, dtype: torch.dtype) -> int:
    """Of a step with LoRA on all layers."""
    device = torch.device(options.device)
    vlm = model(options.shape, device, dtype, options.depth)
    network, batch = shapes.add_adapters(vlm, "all"), batch_for(vlm, options.batch)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            network(**batch.inputs, labels=batch.labels).loss.backward()

    return flops(work)


def rows(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The table: each figure, its target, and what the arithmetic alone would give."""
    lora = found["against lora"]
    best = min((lora[name] for name in ("all", "all-recomputed")), key=lambda one: one["seconds_per_step"])
    ours, first = lora["striate-routed"], found["first token"]
    values = {
        "prefill, times as fast": (found["prefill"]["speedup"], 2.0, found["prefill"]["arithmetic"]),
        "training step, times as fast": (found["step"]["speedup"], 1.8, found["step"]["arithmetic"]),
        "step against LoRA on all layers, times as fast": (
            best["seconds_per_step"] / ours["seconds_per_step"], 7.0,
            found["lora flops"] / found["step"]["flops"]["routed"],
        ),
        "peak memory of training against the same": (ours["peak_gb"] / best["peak_gb"], 0.3, None),
        "time to first token, pruned and routed": (1 / first["speedup"], 0.45, 1 / first["arithmetic"]),
    }  # fmt: skip
    return {name: dict(zip(("measured", "target", "arithmetic"), row, strict=True)) for name, row in values.items()}


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", choices=["135m-576", "7b"], default="135m-576")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="against LoRA, per turn; the first does not count")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depth", type=int, help="decoder layers; default: the shape's")
    parser.add_argument("--quick", action="store_true", help="four layers, one record, one turn: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.depth, options.batch, options.turns, options.steps = 4, 1, 1, 2
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {"region": REGION, "image": IMAGE, "text": TEXT, "answer": ANSWER, "batch": options.batch,
                     "turns": options.turns, "shape": options.shape, "depth": options.depth},
    }  # fmt: skip
    for dtype in options.dtypes:
        report[dtype] = found = measure(options, getattr(torch, dtype))
        found["lora flops"] = lora_flops(options, getattr(torch, dtype))
        found["against lora"] = against_lora(options, dtype)
        found["rows"] = rows(found)
        for name, row in found["rows"].items():
            print(f"{dtype} {name:48}", *(f"{key} {value:.2f}" for key, value in row.items() if value), flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

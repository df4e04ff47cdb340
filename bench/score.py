"""What the layer scores cost, against plain forward passes over the same batches of the same run.

    python bench/score.py --out score.json

The model is a LLaVA with the language model of SmolLM2-135M and a tiny tower, random weights in bfloat16; a sample has
64 image tokens and about 48 of text. Plain passes and scores take turns; times are medians after a turn that does not
count. Plain passes make logits at one position only: with all logits they would take longer, and the ratios would
flatter. Targets: activation scores at most 1.25 times the time and 1.3 times the peak memory of plain passes; causal
scores at most 0.6 times as many passes as the model has layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from striate.data import IGNORED, Batch
from striate.scores.states import METRICS, States
from striate.trace import forward
from striate.train.memory import PeakMemory
from striate.vlm import Vlm

IMAGE_TOKENS, TEXT_TOKENS, ANSWER_TOKENS, IMAGE, PAD = 64, (40, 56), 8, 6, 0
TEXT = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
}  # fmt: skip


def assemble(depth: int, device: torch.device) -> Vlm:
    """A LLaVA of that many decoder layers, random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llava", text_config=TEXT | {"num_hidden_layers": depth}, vision_config=TOWER, image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    return Vlm.of(AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval().to(device))


def batches(num_samples: int, size: int, device: torch.device) -> list[Batch]:
    """Samples of one image and of text of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*TEXT_TOKENS, (num_samples,), generator=generator).tolist()
    return [
        _batch(lengths[start : start + size], generator).to(device, torch.bfloat16)
        for start in range(0, num_samples, size)
    ]


def _batch(lengths: list[int], generator: torch.Generator) -> Batch:
    shape = len(lengths), 1 + IMAGE_TOKENS + max(lengths)
    tokens = torch.randint(IMAGE + 1, TEXT["vocab_size"], shape, generator=generator)
    tokens[:, 1 : 1 + IMAGE_TOKENS] = IMAGE
    places = torch.arange(shape[1]).expand(shape)
    ends = 1 + IMAGE_TOKENS + torch.tensor(lengths)[:, None]
    tokens = tokens.where(places < ends, PAD)
    labels = tokens.where((places < ends) & (places >= ends - ANSWER_TOKENS), IGNORED)
    pixels = torch.randn(len(lengths), 3, TOWER["image_size"], TOWER["image_size"], generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": (places < ends).long(), "pixel_values": pixels}
    return Batch(inputs, labels, tokens == IMAGE, tuple(map(str, range(len(lengths)))))


def take_turns(works: dict[str, Callable[[], None]], *, turns: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds and peak memory (GB) of each piece of work; `above_rest`: without what was held before it."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            memory = PeakMemory(device)
            memory.start()
            rest = memory.gigabytes()
            began = _now(device)
            work()
            if turn:
                seconds[name].append(_now(device) - began)
                peaks[name].append((memory.gigabytes(), memory.gigabytes() - rest))
    return {
        name: {
            "seconds": median(seconds[name]),
            "all_seconds": seconds[name],
            "peak_gb": max(peak for peak, _ in peaks[name]),
            "above_rest_gb": max(above for _, above in peaks[name]),
        }
        for name in works
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def activation_scores(vlm: Vlm, taken: list[Batch], *, turns: int) -> dict[str, Any]:
    """All scores of one pass, and each alone, against plain passes."""

    def plain() -> None:
        for batch in taken:
            forward(vlm, batch)

    def measure(*names: str) -> None:
        states = States(vlm, names)
        for batch in taken:
            states.add(batch)
        states.scores()

    works: dict[str, Callable[[], None]] = {"plain": plain, "all": lambda: measure(*METRICS)}
    works["without_attention"] = lambda: measure(*(name for name in METRICS if name != "image_attention"))
    found = take_turns(works, turns=turns, device=vlm.device)
    for work in found.values():
        work["time_ratio"] = work["seconds"] / found["plain"]["seconds"]
        work["memory_ratio"] = work["peak_gb"] / found["plain"]["peak_gb"]
    return found


def causal_scores(vlm: Vlm, batch: Batch, *, turns: int) -> dict[str, Any]:
    """Each causal score over one batch, in plain passes per layer of the model."""
    from striate.scores.causal import METRICS as CAUSAL
    from striate.scores.causal import Causal

    with _backbone(vlm) as folder:

        def measure(*names: str) -> None:
            taken = Causal(vlm, names, backbone=folder)
            taken.add(batch)
            taken.scores()

        works: dict[str, Callable[[], None]] = {"plain": lambda: forward(vlm, batch)}
        works |= {name: lambda name=name: measure(name) for name in CAUSAL}  # type: ignore[misc]
        works["all"] = lambda: measure(*CAUSAL)
        found = take_turns(works, turns=turns, device=vlm.device)
    for work in found.values():
        work["passes"] = work["seconds"] / found["plain"]["seconds"]
        work["passes_per_layer"] = work["passes"] / vlm.depth
    return found


@contextmanager
def _backbone(vlm: Vlm) -> Iterator[Path]:
    """A folder with a language model of the same shape."""
    with tempfile.TemporaryDirectory() as folder:
        config = vlm.model.config.get_text_config(decoder=True)
        transformers.utils.logging.disable_progress_bar()
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        yield Path(folder)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--depth", type=int, default=30, help="decoder layers")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="samples a forward pass")
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--causal-turns", type=int, default=3, help="the same for causal scores; 0 leaves them out")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    vlm, taken = assemble(options.depth, device), batches(options.samples, options.batch, device)
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": {"text": TEXT | {"num_hidden_layers": options.depth}, "tower": TOWER, "dtype": "bfloat16"},
        "data": {"samples": options.samples, "batch": options.batch, "tokens": list(taken[0].labels.shape)},
        "activations": activation_scores(vlm, taken, turns=options.turns),
    }
    if options.causal_turns:
        report["causal"] = causal_scores(vlm, taken[0], turns=options.causal_turns)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    _print(report)


def _print(report: dict[str, Any]) -> None:
    for name, work in report["activations"].items():
        print(f"{name:20} {work['seconds']:8.2f} s  {work['time_ratio']:.2f} x  memory {work['memory_ratio']:.2f} x")
    for name, work in report.get("causal", {}).items():
        print(f"{name:20} {work['seconds']:8.2f} s  {work['passes_per_layer']:.2f} passes per layer")


if __name__ == "__main__":
    main()

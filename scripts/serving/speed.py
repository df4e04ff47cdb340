"""How fast vLLM answers with checkpoints, in one run: a whole model against pruned ones.

    python scripts/serving/speed.py runs/whole runs/pruned-4 runs/pruned-8 --image sign.png \\
        --question "What is written here?" --out bench/results/serving.json

An engine for each model, all in this process; one works at a time, on one request. In each turn every model answers
once, with a fixed number of tokens, in an order that rotates; the first turn does not count. Caches of prompts and
images are off. Ratios are to the first model within a turn, so that what slows the machine down for longer than a turn
cancels out; all figures are medians over the turns. It writes the table of docs/serving.md, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import api
import tables
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from striate.errors import UserError

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engines in this process


@dataclass(frozen=True)
class Answer:
    """The times of one answer: seconds to the first token, and tokens per second by the median time between two."""

    first_token_seconds: float
    decode_tokens_per_second: float


MEASURES = tuple(Answer.__annotations__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="run folders or checkpoints, the whole model first")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--dtype", default="auto", help="as in vLLM; default: as stored")
    parser.add_argument("--enforce-eager", action="store_true", help="as in vLLM: do not compile")
    args = parser.parse_args()
    try:
        layers = {model: depth(model) for model in args.models}
        engine = api.engine()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    answers = take_turns(args)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in (engine, "torch", "transformers")},
        "settings": {name: getattr(args, name) for name in ("dtype", "enforce_eager", "tokens", "turns")},
        "models": {str(model): {"layers": layers[model]} | summarize(answers, model) for model in args.models},
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_table(report)
    return 0


def depth(model: Path) -> int:
    """Decoder layers. Raises `UserError` if there is no checkpoint."""
    config = AutoConfig.from_pretrained(api.checkpoint(model))
    return config.get_text_config(decoder=True).num_hidden_layers


def take_turns(args: argparse.Namespace) -> dict[Path, list[Answer]]:
    """The answers of each model, one per turn."""
    engines = {model: load(api.checkpoint(model), args) for model in args.models}
    prompt = encode(api.checkpoint(args.models[0]), args.image, args.question)
    answers: dict[Path, list[Answer]] = {model: [] for model in args.models}
    for turn in range(args.turns + 1):
        shift = turn % len(args.models)
        for model in args.models[shift:] + args.models[:shift]:
            answer = ask(engines[model], prompt, str(turn), args.tokens)
            if turn:
                answers[model].append(answer)
        print(f"turn {turn} of {args.turns}", flush=True)
    return answers


def load(checkpoint: Path, args: argparse.Namespace) -> Any:
    """vLLM's engine, which computes the tower and the whole prompt each time."""
    from vllm import LLM

    return LLM(
        str(checkpoint), dtype=args.dtype, enforce_eager=args.enforce_eager, max_model_len=512, max_num_seqs=1, seed=0,
        limit_mm_per_prompt={"image": 1}, enable_prefix_caching=False, mm_processor_cache_gb=0,
    ).llm_engine  # fmt: skip


def encode(checkpoint: Path, image: Path, question: str) -> dict[str, Any]:
    """The prompt by the chat template, and the image, as vLLM takes them."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(messages, add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": {"image": Image.open(image).convert("RGB")}}


def ask(engine: Any, prompt: dict[str, Any], request: str, tokens: int) -> Answer:
    """One greedy answer of exactly so many tokens, one per step of the engine."""
    from vllm import SamplingParams

    times = [time.perf_counter()]
    engine.add_request(request, prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    while engine.has_unfinished_requests():
        if engine.step():
            times.append(time.perf_counter())
    assert len(times) == 1 + tokens, "a step with more or less than one token"
    return Answer(times[1] - times[0], 1 / median(later - earlier for earlier, later in pairwise(times[1:])))


def summarize(answers: dict[Path, list[Answer]], model: Path) -> dict[str, Any]:
    """Medians of a model, of its ratios to the first one, and all values."""
    first = next(iter(answers.values()))
    values = {name: [getattr(one, name) for one in answers[model]] for name in MEASURES}
    ratios = {
        name: median(value / getattr(other, name) for value, other in zip(values[name], first, strict=True))
        for name in MEASURES
    }
    return {name: median(values[name]) for name in MEASURES} | {"ratios": ratios, "all": values}


def write_table(report: dict[str, Any]) -> None:
    """The table of docs/serving.md: one line per model."""
    rows = [("layers", "time to first token", "ratio", "tokens per second", "ratio")]
    for row in report["models"].values():
        first, decode = (row[name] for name in MEASURES)
        ratios = [f"{row['ratios'][name]:.2f}" for name in MEASURES]
        rows.append((str(row["layers"]), f"{1000 * first:.0f} ms", ratios[0], f"{decode:.1f}", ratios[1]))
    tables.write_table("speed.py", ", ".join(f"{name} {number}" for name, number in report["versions"].items()), rows)


if __name__ == "__main__":
    sys.exit(main())

"""How fast vLLM serves checkpoints, in one run: a whole model against pruned ones.

    python scripts/serving/speed.py runs/whole runs/pruned-4 runs/pruned-8 --image sign.png \\
        --question "What is written here?" --out bench/results/serving.json

A server for each model, on loopback; all stay up, and one is asked at a time, by OpenAI's client. In each turn every
model answers once, with a fixed number of tokens, in an order that rotates; the first turn does not count. Caches of
prompts and images are off. Ratios are to the first model within a turn, so that what slows the machine down for longer
than a turn cancels out; all figures are medians over the turns. It writes the table of docs/serving.md, too. Options
that it does not know are those of `vllm serve`, such as --dtype or --enforce-eager (no compilation).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import api
import tables
from transformers import AutoConfig

from striate.errors import UserError

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else every server pins its threads to the same cores

OPTIONS = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
"""Options of the servers: the tower and the whole prompt are computed each time."""


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
    args, options = parser.parse_known_args()
    try:
        layers = {model: depth(model) for model in args.models}
        answers = take_turns(args, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in (api.engine(), "torch", "transformers")},
        "settings": {"new_tokens": args.tokens, "turns": args.turns, "requests": 1, "vllm": [*OPTIONS, *options]},
        "models": {str(model): {"layers": layers[model]} | summarize(answers, model) for model in args.models},
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_table(report)
    return 0


def depth(model: Path) -> int:
    """Decoder layers. Raises `UserError` if there is no checkpoint."""
    config = AutoConfig.from_pretrained(api.checkpoint(model))
    return config.get_text_config(decoder=True).num_hidden_layers


def take_turns(args: argparse.Namespace, options: list[str]) -> dict[Path, list[Answer]]:
    """The answers of each model, one per turn; raises `UserError` as `api.served`."""
    answers: dict[Path, list[Answer]] = {model: [] for model in args.models}
    with ExitStack() as servers:
        urls = {model: servers.enter_context(api.served(model, *OPTIONS, *options)) for model in answers}
        clients = {model: api.client(url) for model, url in urls.items()}
        for turn in range(args.turns + 1):
            shift = turn % len(args.models)
            for model in args.models[shift:] + args.models[:shift]:
                answer = ask(clients[model], str(model), api.message(args.image, args.question), args.tokens)
                if turn:
                    answers[model].append(answer)
            print(f"turn {turn} of {args.turns}", flush=True)
    return answers


def ask(client: Any, model: str, message: Any, tokens: int) -> Answer:
    """One streamed answer of exactly so many tokens, each a piece of the stream; before them, with the first token,
    comes a piece that only names the role."""
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model=model, messages=[message], temperature=0, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
    )
    times = [time.perf_counter() for _ in stream]
    return Answer(times[0] - began, 1 / median(later - earlier for earlier, later in pairwise(times[1:])))


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

"""Prove that checkpoints written by striate are served by vLLM as transformers answers with them.

    make serving                                            # the environment, then all of it: docs/serving.md
    python scripts/serving/prove.py --out runs/serving      # in an environment with vllm and striate
    python scripts/serving/prove.py --out runs/serving --families llava gemma3

For each family a tiny model of the real class is tuned in a region with all weights and with LoRA, and the latter is
pruned by two layers. transformers and vLLM answer the same records greedily in float32, one record at a time. Each
family runs in a process of its own; what it found is in OUT/FAMILY/proof.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import api
import models
import tables
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from striate.errors import UserError
from striate.runs.pruning import prune
from striate.runs.training import tune
from striate.train import TrainOptions

RECORDS, NEW_TOKENS = 16, api.NEW_TOKENS
API = "llava"
"""The family that is asked through OpenAI's API, too."""
REGION, CUT = "0,1,5", "3,4"
TOLERANCE = 1e-3
"""Of log-probabilities in float32, which two programs sum in another order."""
CAUSAL = ("gemma3",)
"""Families whose image tokens see each other in transformers, but not in vLLM's attention on CPUs: transformers is
asked without `token_type_ids`, and then attends as vLLM does."""
NAMES = {"full": "tuned in a region", "lora": "LoRA, merged", "pruned": "and two layers cut"}
KINDS = tuple(NAMES)
PROOF = "proof.json"
OPTIONS = TrainOptions(
    batch=8, steps=4, learning_rate=5e-4, projector_learning_rate=5e-4, dtype="float32", device="cpu", seed=0
)


@dataclass(frozen=True)
class Answer:
    """What an engine answers to a record: the tokens of prompt and answer, and the log-probability of each answer's
    token, with the gap to the second most likely one."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    gaps: list[float]


@dataclass(frozen=True)
class Comparison:
    """Two engines on the records of a checkpoint.

    `equal` counts the records whose tokens are the same, `ties` those whose first different token has a gap of less
    than the tolerance to the next one. `largest` is the largest difference of log-probabilities of the same tokens.
    `distinct` counts the different answers, which says how much the records tell.
    """

    records: int
    prompts: int
    equal: int
    ties: int
    largest: float
    distinct: int

    @property
    def proven(self) -> bool:
        """Whether every answer is equal up to ties, and every log-probability within the tolerance."""
        return self.prompts == self.records == self.equal + self.ties and self.largest <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=models.MARKS, default=[*models.MARKS])
    parser.add_argument("--here", action="store_true", help="in this process, for one family")
    args = parser.parse_args()
    try:
        api.engine()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.here:
        prove(args.families[0], args.out)
        return 0
    for family in args.families:
        (args.out / family / PROOF).unlink(missing_ok=True)
        subprocess.run([sys.executable, __file__, "--out", str(args.out), "--here", "--families", family])
    proofs = {file.parent.name: json.loads(file.read_bytes()) for file in sorted(args.out.glob(f"*/{PROOF}"))}
    write_table([*proofs.values()])
    failed = [
        family
        for family in args.families
        if family not in proofs or not all(proofs[family][kind]["proven"] for kind in KINDS)
    ]
    if API in args.families and not check_api(args.out / API):
        failed.append(f"{API} through the server")
    print(f"failed: {', '.join(failed)}" if failed else "all answers are the same")
    return int(bool(failed))


def write_table(proofs: list[dict[str, Any]]) -> None:
    """The table of docs/serving.md: one line per family and checkpoint."""
    header = ("family", "checkpoint", "same prompt", "same answer", "ties", "different answers", "largest difference")
    rows: list[Sequence[str]] = [header]
    for proof in proofs:
        family = f"{proof['family']}, causal" if proof["family"] in CAUSAL else proof["family"]
        for kind, name in NAMES.items():
            row = proof[kind]
            if "error" in row:
                rows.append([family, name, row["error"].splitlines()[0], "", "", "", ""])
                continue
            of = f" of {row['records']}"
            cells = [f"{row['prompts']}{of}", f"{row['equal']}{of}", row["ties"], row["distinct"]]
            rows.append([family, name, *map(str, cells), f"{row['largest']:.0e}"])
    versions = ", ".join(sorted({f"{name} {number}" for proof in proofs for name, number in proof["versions"].items()}))
    tables.write_table("prove.py", versions, rows)


def prove(family: str, out: Path) -> None:
    """Write OUT/FAMILY/proof.json."""
    folder = out / family
    data = models.write_records(folder / "data", RECORDS)
    packages = ("transformers", "torch", api.engine())
    found: dict[str, Any] = {"family": family, "versions": {name: version(name) for name in packages}}
    for kind, checkpoint in checkpoints(family, folder, data).items():
        expected = ask_transformers(checkpoint, data)
        try:
            comparison = compare(expected, ask_vllm(checkpoint, data))
            found[kind] = asdict(comparison) | {"proven": comparison.proven}
        except Exception as error:  # whatever the engine trips over is what this finds out
            traceback.print_exc()
            found[kind] = {"error": f"{type(error).__name__}: {error}", "proven": False}
        print(family, kind, found[kind], flush=True)
    (folder / PROOF).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def check_api(folder: Path) -> bool:
    """Ask the pruned checkpoint through OpenAI's API; whether it answers as transformers does."""
    checkpoint, data = folder / "pruned" / "checkpoint", folder / "data" / "records.json"
    tokens = ask_transformers(checkpoint, data)[0].tokens
    expected = AutoProcessor.from_pretrained(checkpoint).decode(tokens, skip_special_tokens=True)
    try:
        found = api.ask(checkpoint, data.parent / "0.png", records(data)[0][1])
    except UserError as error:
        print(error)
        return False
    print(f"the server answers {found!r}, transformers {expected!r}", flush=True)
    return found == expected


def checkpoints(family: str, folder: Path, data: Path) -> dict[str, Path]:
    """The checkpoint of each kind, written by striate's verbs unless it is there."""
    runs = {kind: folder / kind for kind in KINDS}
    if not (folder / "base" / "config.json").is_file():
        models.save(family, folder / "base")
    for method in ("full", "lora"):
        if not (runs[method] / "run.json").is_file():
            tune(
                folder / "base", data=data, out=runs[method], region=REGION, method=method, rank=8, alpha=16,
                options=OPTIONS,
            )  # fmt: skip
    if not (runs["pruned"] / "run.json").is_file():
        prune(runs["lora"], out=runs["pruned"], layers=CUT, data=data, options=OPTIONS)
    return {kind: run / "checkpoint" for kind, run in runs.items()}


@torch.inference_mode()
def ask_transformers(checkpoint: Path, data: Path) -> list[Answer]:
    """Answers of plain transformers, without anything of striate."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint)
    answers = []
    for image, question in records(data):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        if model.config.model_type in CAUSAL:
            inputs.pop("token_type_ids", None)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
        )
        length = inputs["input_ids"].shape[1]
        tokens = output.sequences[0, length:].tolist()
        best = torch.stack(output.logits)[:, 0].float().log_softmax(-1).topk(2).values  # T 2
        gaps = (best[:, 0] - best[:, 1]).tolist()
        answers.append(Answer(inputs["input_ids"][0].tolist(), tokens, best[:, 0].tolist(), gaps))
    return answers


def ask_vllm(checkpoint: Path, data: Path) -> list[Answer]:
    """Answers of vLLM's offline engine to the same conversations."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint), dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=1, seed=0,
        limit_mm_per_prompt={"image": 1, "video": 0}, enable_prefix_caching=False,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=2)
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}],
            }
        ]
        for image, question in records(data)
    ]
    answers = []
    for output in engine.chat(conversations, greedy, use_tqdm=False):
        best = [sorted((one.logprob for one in step.values()), reverse=True) for step in output.outputs[0].logprobs]
        tokens = list(output.outputs[0].token_ids)
        log_probs, gaps = [two[0] for two in best], [two[0] - two[1] for two in best]
        answers.append(Answer(list(output.prompt_token_ids), tokens, log_probs, gaps))
    return answers


def compare(expected: list[Answer], found: list[Answer]) -> Comparison:
    """Count equal answers, and measure the differences of log-probabilities up to the first different token."""
    equal = ties = 0
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        pairs = list(zip(one.tokens, other.tokens, strict=False))
        same = next((at for at, (left, right) in enumerate(pairs) if left != right), len(pairs))
        differences = [
            abs(left - right) for left, right in zip(one.log_probs[:same], other.log_probs[:same], strict=True)
        ]
        largest = max(largest, *differences, 0.0)
        equal += one.tokens == other.tokens
        ties += same < len(pairs) and one.gaps[same] <= TOLERANCE
    prompts = sum(one.prompt == other.prompt for one, other in zip(expected, found, strict=True))
    distinct = len({tuple(one.tokens) for one in expected})
    return Comparison(len(expected), prompts, equal, ties, largest, distinct)


def records(data: Path) -> list[tuple[Image.Image, str]]:
    """Image and question of each record."""
    rows = json.loads(data.read_bytes())
    questions = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows]
    images = [Image.open(data.parent / row["image"]).convert("RGB") for row in rows]
    return list(zip(images, questions, strict=True))


if __name__ == "__main__":
    sys.exit(main())

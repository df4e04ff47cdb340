"""A short tune of what is left after a cut, so that it gets used to the gap (Gromov et al. 2024, section 3.2)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from striate.prune.card import healed_note
from striate.prune.plan import Pruning
from striate.prune.surgery import MAP, WEIGHT_FILES
from striate.region import FILE as REGION_FILE
from striate.run import Run
from striate.train import TrainOptions, tune

CARD = "README.md"
What = Literal["region", "neighbours", "projector"]


def healed(
    run: Run, pruning: Pruning, *, data: Path, images: Path | None, allow_urls: bool, what: What, progress: bool,
    teacher: Path | None, distillation: float, options: TrainOptions,
) -> None:  # fmt: skip
    """Tune the run's checkpoint in place; until that is done, the unhealed one stays where it is."""
    regions = {"region": str(pruning.region), "neighbours": str(pruning.numbers.neighbours), "projector": "none"}
    taught: dict[str, Any] = {} if teacher is None else {"teacher": str(teacher), "distillation": distillation}
    tuned = tune(
        run.checkpoint, data=data, out=run.path / "heal", images=images, allow_urls=allow_urls, region=regions[what],
        progress=progress, options=options, **taught,
    )  # fmt: skip
    for file in run.checkpoint.iterdir():  # whatever else came with the model, and what says how it was cut
        if file.is_file() and not WEIGHT_FILES.fullmatch(file.name):
            own = file.name in (CARD, MAP, REGION_FILE)
            if own or not (tuned.checkpoint / file.name).exists():
                shutil.copyfile(file, tuned.checkpoint / file.name)
    with (tuned.checkpoint / CARD).open("a", encoding="utf-8") as card:
        card.write(healed_note(tuned.info))
    _take_over(run, tuned)


def _take_over(run: Run, tuned: Run) -> None:
    """The healed checkpoint, its log and what it left out become the run's own."""
    for entry in tuned.history():
        run.log(entry)
    for entry in tuned.skipped():
        run.skip(entry)
    run.update(training=tuned.info["training"], healed=tuned.info["options"])
    unhealed = run.path / ".unhealed"
    run.checkpoint.rename(unhealed)
    tuned.checkpoint.rename(run.checkpoint)
    shutil.rmtree(unhealed)
    shutil.rmtree(tuned.path)

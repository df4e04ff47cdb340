"""Healing: a short tune after layers were removed (Gromov et al. 2024, section 3.2)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from striate.prune.plan import Pruning
from striate.prune.surgery import MAP, WEIGHT_FILES
from striate.region import FILE as REGION_FILE
from striate.routing import read_route
from striate.runs.card import CARD, add_text
from striate.runs.pruning_card import healing_text
from striate.runs.run import Run
from striate.runs.training import tune
from striate.train import TrainOptions
from striate.vlm.reading import check_config

HealLayers = Literal["region", "neighbors", "projector"]


def heal_checkpoint(
    run: Run, pruning: Pruning, *, data: Path, images: Path | None, layers: HealLayers,
    progress: bool, options: TrainOptions,
) -> None:  # fmt: skip
    """Tune the run's checkpoint, and replace it by the healed one at the end."""
    regions = {"region": str(pruning.region), "neighbors": str(pruning.numbers.neighbors), "projector": "none"}
    route = read_route(check_config(str(run.checkpoint)))
    tuned = tune(
        run.checkpoint, data=data, out=run.path / "heal", images=images, region=regions[layers],
        route=None if route is None else str(route),
        progress=progress, options=options,
    )  # fmt: skip
    for file in run.checkpoint.iterdir():  # the model's other files, and the description of the cut
        if file.is_file() and not WEIGHT_FILES.fullmatch(file.name):
            own = file.name in (CARD, MAP, REGION_FILE)
            if own or not (tuned.checkpoint / file.name).exists():
                shutil.copyfile(file, tuned.checkpoint / file.name)
    add_text(tuned.checkpoint, run.info, healing_text(tuned.info))
    _merge_into(run, tuned)


def _merge_into(run: Run, tuned: Run) -> None:
    """Move the healed checkpoint, its log and its skipped records into the run."""
    for entry in tuned.history():
        run.log(entry)
    for entry in tuned.skipped():
        run.skip(entry)
    for text in tuned.info.get("warnings", ()):
        run.warn(text)
    run.update(training=tuned.info["training"], healed=tuned.info["options"])
    unhealed = run.path / ".unhealed"
    run.checkpoint.rename(unhealed)
    tuned.checkpoint.rename(run.checkpoint)
    shutil.rmtree(unhealed)
    shutil.rmtree(tuned.path)

"""The verb `explore`: what a model does with the images of a few records, layer by layer, as one HTML page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from striate.console import console
from striate.errors import UserError
from striate.exploration import explore_questions, steps
from striate.exploration.asking import draw
from striate.region import FILE as REGION
from striate.region import Region
from striate.runs.options import Only
from striate.runs.reading import ReadOptions
from striate.runs.run import INFO, Run
from striate.studies.explore.page import page
from striate.studies.html import check_writable, write
from striate.vlm import Vlm

EXPLORE = ReadOptions(samples=6)


def explore(
    model: str | Path,
    *,
    data: Path,
    images: Path | None = None,
    out: Path | None = None,
    region: str | None = None,
    backbone: str | None = None,
    progress: bool = False,
    options: Annotated[ReadOptions, Only("samples max_length seed on_bad_record device dtype allow_urls")] = EXPLORE,
) -> Path:
    """Show what each layer of a model does with the images of a few records, in one HTML page that needs no network.

    The page shows where each token of question and answer looks, the nearest words of each patch and token after each
    layer, how far the layer moves image and text tokens, and the answer when layers are bypassed, when image tokens
    pass them by, or when they are reverted. The numbers are in a JSON file beside it.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with questions; those with an image come first.
        images: the folder that image paths are relative to; default: the folder of the data.
        out: the HTML file to write; default: explore.html in the run folder that `model` is, else in this folder.
        region: the layers to mark, and to bypass together; default: those that the model was tuned in.
        backbone: the language model before visual training, to revert layers to.
        progress: show a progress bar.
        options: how records and the model are read.

    Returns:
        The file.

    Raises:
        UserError: no record has a question, a record is bad, the region or the backbone does not fit the model, `out`
            exists and is not a page of striate.
    """
    page_of_run = Run(Path(model)).exploration
    out = Path(out or (page_of_run if page_of_run.with_name(INFO).is_file() else page_of_run.name))
    check_writable(out)  # before the work
    records = options.records(data, images)
    questions, skipped = draw(records, options.samples, options.seed)
    vlm = options.model(model)
    marked = _region(vlm, model, region)
    has_images = any(question.images for question in questions)
    total = len(questions) * steps(vlm.depth, marked, image=has_images, backbone=backbone is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("layer by layer", total=total)
        exploration = explore_questions(
            vlm, questions, region=marked, backbone=backbone, max_length=options.max_length,
            stop=options.on_bad_record == "stop", skipped=skipped, notes=records.notes,
            on_step=lambda: bar.advance(task),
        )  # fmt: skip
    # A page is sent to others: the name of the folder, not where it lies.
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    exploration = replace(exploration, model=name)
    write(page(exploration, numbers=out.with_suffix(".json").name), out)
    text = json.dumps(exploration.to_json(), ensure_ascii=False, separators=(",", ":"))
    try:
        out.with_suffix(".json").write_text(text + "\n", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out.with_suffix('.json')} cannot be written: {error.strerror}") from None
    return out


def _region(vlm: Vlm, model: str | Path, text: str | None) -> Region | None:
    """The region of that form, else the one that is saved with the run or the checkpoint, else none."""
    if text is not None:
        return Region.parse(text, vlm.depth)
    saved = Run(Path(model)).region
    if saved is None and Path(vlm.source, REGION).is_file():
        saved = Region.load(Path(vlm.source))
    return saved if saved and saved.depth == vlm.depth else None

"""The verb `explore`: what a model does with the images of a few records, layer by layer, as one HTML page."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from striate.console import console
from striate.errors import UserError, at_least, flag, need
from striate.exploration import explore_questions, steps
from striate.exploration.asking import draw
from striate.region import FILE as REGION
from striate.region import Region
from striate.routing import read_route
from striate.runs.options import Only
from striate.runs.reading import ReadOptions
from striate.runs.run import INFO, Run
from striate.scores.backbone import Backbone
from striate.studies.explore.page import page
from striate.studies.explore.session import Session, Subject
from striate.studies.html import check_writable, write
from striate.vlm import Vlm
from striate.vlm.reading import model_folder

EXPLORE = ReadOptions(samples=6, on_bad_record="skip")


def explore(
    model: str | Path,
    *,
    data: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
    region: str | None = None,
    backbone: str | None = None,
    live: bool = False,
    against: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    progress: bool = False,
    options: Annotated[ReadOptions, Only("samples seed device dtype")] = EXPLORE,
) -> Path | None:
    """Show what each layer of a model does with the images of a few records, in one HTML page that needs no network.

    The page shows where each token of question and answer looks, the nearest words of each patch and token after each
    layer, how far the layer moves image and text tokens, and the answer when layers are bypassed, when image tokens
    pass them by, or when they are reverted. The numbers are in a JSON file beside it. With --live the page is served
    on this machine: drop an image, ask, and change layers.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with questions; those with an image come first; required without --live.
        images: the folder that image paths are relative to; default: the folder of the data.
        out: the HTML file to write; default: explore.html in the run folder that `model` is, else in this folder.
        region: the layers to mark, and to bypass together; default: those that the model was tuned in.
        backbone: the language model before visual training, to revert layers to.
        live: serve a page to ask about images of one's own, with layers bypassed, reverted or routed.
        against: with --live, another model that is asked the same.
        host: with --live, the address to listen on; default: 127.0.0.1, which only this machine reaches.
        port: with --live, the port to listen on.
        progress: show a progress bar.
        options: how records and the model are read.

    Returns:
        The file; None with `live`.

    Raises:
        UserError: no record can be asked, the region or the backbone does not fit the model, `out` exists and is not a
            page of striate, the port is in use.
    """
    if live:
        given = {"data": data, "images": images, "out": out}
        if names := [flag(name) for name, value in given.items() if value is not None]:
            raise UserError(f"--live takes images in the browser, not {', '.join(names)}: leave out one or the other")
        _serve(model, region, backbone, against, host, port, options)
        return None
    if data is None:
        raise UserError("--data is required: records with questions; or --live, to ask about images of your own")
    if against:
        raise UserError("--against goes with --live")
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
    exploration = replace(exploration, model=_name(model))
    write(page(exploration, numbers=out.with_suffix(".json").name), out)
    text = json.dumps(exploration.to_json(), ensure_ascii=False, separators=(",", ":"))
    try:
        out.with_suffix(".json").write_text(text + "\n", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out.with_suffix('.json')} cannot be written: {error.strerror}") from None
    return out


def _serve(
    model: str | Path, region: str | None, backbone: str | None, against: Path | None, host: str, port: int,
    options: ReadOptions,
) -> None:  # fmt: skip
    """The page of `live.py` about one model or two; what can go wrong is checked before they are loaded."""
    need("gradio", "--live", extra="explore")
    _check_port(host, port)
    for one in [model] if against is None else [model, against]:
        model_folder(one)  # raises an error if it has no checkpoint
    from striate.studies.explore.live import serve  # late: gradio takes seconds

    vlm = options.model(model)
    reverting = None if backbone is None else Backbone(vlm, backbone)
    subjects = [Subject(_name(model), vlm, _region(vlm, model, region), read_route(vlm.model.config), reverting)]
    if against:
        other = options.model(against)
        subjects.append(Subject(_name(against), other, _region(other, against, None), read_route(other.model.config)))
    serve(Session(subjects, max_length=options.max_length), host=host, port=port)


def _check_port(host: str, port: int) -> None:
    """Raise `UserError` where nothing can listen there."""
    at_least(1, port=port)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "ports are below 65536"
        raise UserError(f"cannot listen on {host}:{port} ({reason}): choose another --port or --host") from None


def _name(model: str | Path) -> str:
    """A page is sent to others: the name of the folder, not where it lies."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _region(vlm: Vlm, model: str | Path, text: str | None) -> Region | None:
    """The region of that form, else the one that is saved with the run or the checkpoint, else none."""
    if text is not None:
        return Region.parse(text, vlm.depth)
    saved = Run(Path(model)).region
    if saved is None and Path(vlm.source, REGION).is_file():
        saved = Region.load(Path(vlm.source))
    return saved if saved and saved.depth == vlm.depth else None

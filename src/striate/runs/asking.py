"""The verb `ask`: one question about images, to one model or two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from striate import routing
from striate.console import console
from striate.errors import UserError, at_least
from striate.evaluation import Reply
from striate.evaluation import ask as ask_model
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.roundtrip import free_memory
from striate.vlm import Vlm, load
from striate.vlm.reading import model_folder


def ask(
    model: str | Path,
    *,
    question: str,
    image: Sequence[Path] = (),
    against: Path | None = None,
    route: str | None = None,
    max_new_tokens: int = 256,
    device: str | None = None,
) -> None:
    """Ask a model a question about images, and print its answer as it is generated.

    The model is loaded in the dtype it is stored in; the answer is greedy.

    Args:
        model: a model folder, a run folder or a hub id.
        question: what to ask; on the command line the last word, or the one after the model.
        image: image files that the question is about, in this order; default: none.
        against: another model that is asked the same, next.
        route: the layers that image tokens pass through, in any form of a region; same: the region and layer 0; none:
            all layers; default: the route of the checkpoint.
        max_new_tokens: most tokens per answer.
        device: device to run on, such as cpu or cuda:0; default: the GPU if there is one.

    Raises:
        UserError: the model does not exist or has no checkpoint, an image cannot be read, or the route does not fit.
    """
    at_least(1, max_new_tokens=max_new_tokens)
    if missing := next((path for path in image if not Path(path).is_file()), None):
        raise UserError(f"--image {missing}: no such file")
    if os.path.isfile(question):  # unlike Path, it takes texts of any length
        raise UserError(f"{question} is a file: the question is missing after it")
    models = [model] if against is None else [model, against]
    for one in models:
        model_folder(one)  # raises an error if it has no checkpoint, before the first answer
    replies = [_answer(one, route, device, question, image, max_new_tokens, named=len(models) > 1) for one in models]
    if len({reply.text for reply in replies}) < len(replies):
        console().print("both answers are the same", style="dim")


def _answer(
    model: str | Path, route: str | None, device: str | None, question: str, images: Sequence[Path],
    max_new_tokens: int, *, named: bool,
) -> Reply:  # fmt: skip
    """Print the model's name if it is `named`, its answer, and what it took."""
    output = console()
    vlm = _open(model, route, device)
    if named:
        output.print(str(model), style="bold")
    reply = ask_model(
        vlm, question, images=[Path(one) for one in images], max_new_tokens=max_new_tokens,
        stream=lambda piece: output.print(piece, end=""),
    )  # fmt: skip
    output.print()
    output.print(summary(reply, vlm), style="dim")
    del vlm
    free_memory()
    return reply


def summary(reply: Reply, vlm: Vlm) -> str:
    """What an answer took, in one line."""
    speed = f", {reply.tokens_per_second:.1f} tokens/s" if reply.tokens_per_second else ""
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    return (
        f"{reply.first_seconds:.2f} s to the first token, {reply.new_tokens} tokens{speed}; prompt of "
        f"{reply.prompt_tokens:,} tokens, {reply.image_tokens:,} of images; {dtype} on {vlm.device}"
    )


def _open(model: str | Path, route: str | None, device: str | None) -> Vlm:
    """The model, with the route that was asked for or that of its checkpoint."""
    if route is None:
        return routing.load(model, device=device)
    vlm: Any = load(model, device=device)
    region = Path(vlm.source) / REGION_FILE
    trained = Region.parse(str(region), vlm.depth) if region.is_file() else Region((), vlm.depth)
    if route == "same" and not trained.layers:
        raise UserError(f"--route same: {model} has no region in its {REGION_FILE}; name the layers")
    if chosen := routing.resolve(route, trained):
        routing.route(vlm, chosen)
    return vlm

"""Lesions: the answer and its likelihood when layers are bypassed, for all tokens or for image tokens, or reverted.

`lesions` measures all of them on one answer; an `Intervention` is one that a user sets and asks the model under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from striate.errors import UserError
from striate.evaluation.answers import answer_texts
from striate.exploration.asking import Asked, answer_tokens, answers_alike
from striate.prune.cutting import bypass
from striate.region import Region
from striate.routing import route, running_route
from striate.scores.backbone import Backbone
from striate.scores.replay import Replay
from striate.vlm import Vlm
from striate.vlm.modes import change_layers

BYPASS, IMAGE, REVERT = "bypass", "image", "revert"
Context = Callable[[Region], AbstractContextManager[None]]


@dataclass(frozen=True)
class Lesion:
    """What a lesion does to an answer.

    `kind`: "bypass" (the layers pass all tokens on unchanged), "image" (only image tokens, as a route does), "revert"
    (the layers have the backbone's weights). `log_prob` [N]: log-probabilities of the unchanged model's answer tokens,
    in nats. `answer`: the greedy answer of the changed model.
    """

    name: str
    layers: Region
    kind: str
    log_prob: tuple[float, ...]
    answer: str
    changed: bool


def groups(depth: int, region: Region | None = None) -> dict[str, Region]:
    """The layers of each lesion, by name: every layer alone, the region and its complement, three blocks.

    The blocks have as many layers as the region, or a quarter of all.
    """
    found = {f"layer {layer}": Region((layer,), depth) for layer in range(depth)}
    size = max(1, round(depth / 4))
    if region and len(region) < depth:
        found |= {"region": region, "outside the region": region.complement}
        size = len(region)
    return found | {f"{place} block": Region.parse(f"{place}:{size}", depth) for place in ("first", "middle", "last")}


def kinds(*, image: bool, backbone: bool) -> list[str]:
    """The kinds of lesions of a record with or without image tokens, of a model with or without a backbone."""
    return [BYPASS, *([IMAGE] if image else []), *([REVERT] if backbone else [])]


@torch.no_grad()
def lesions(
    vlm: Vlm, replay: Replay, asked: Asked, layers: Mapping[str, Region], *, backbone: Backbone | None = None
) -> Iterator[Lesion]:
    """Every kind of lesion in all groups of layers, on the answer of a clean pass.

    The likelihood takes one pass from the lowest changed layer on: about depth / 2 passes for all single layers. An
    answer is generated only where the likelihoods show that it is another.
    """
    contexts: dict[str, Context] = {
        BYPASS: lambda region: bypass(vlm, region),
        IMAGE: lambda region: _pass_images_by(vlm, region, asked),
        REVERT: lambda region: _revert(backbone, region),
    }
    has_images = bool(asked.batch.image_mask.any()) and "cross_attention_mask" not in asked.batch.inputs
    for kind in kinds(image=has_images, backbone=backbone is not None):
        for name, region in layers.items():
            with contexts[kind](region):
                logits = replay.run(min(region))
                changed = not answers_alike(vlm, asked, logits)
                answer = _answer(vlm, asked) if changed else asked.text
            log_prob = -asked.targets.nll(logits)
            yield Lesion(name, region, kind, tuple(log_prob.tolist()), answer, changed)


def _answer(vlm: Vlm, asked: Asked) -> str:
    (text,) = answer_texts(vlm, [answer_tokens(vlm, asked.prompt)])
    return text


def _pass_images_by(vlm: Vlm, region: Region, asked: Asked) -> AbstractContextManager[None]:
    """Context in which image tokens leave the layers as they entered them; text tokens still read them there."""
    image, length = asked.batch.image_mask, asked.prompt.image_mask.shape[1]

    def keep(entering: Tensor, leaving: Tensor) -> Tensor:
        if entering.shape[1] < length:  # a decoding step
            return leaving
        return torch.where(image[:, : entering.shape[1], None], entering, leaving)

    return change_layers((vlm.layers[layer] for layer in region), keep)


def _revert(backbone: Backbone | None, region: Region) -> AbstractContextManager[None]:
    assert backbone is not None
    return backbone.layer(region.layers[0]) if len(region) == 1 else backbone.revert(region)


@dataclass(frozen=True)
class Intervention:
    """Layers that all tokens bypass, layers that have the backbone's weights, and the route of image tokens.

    `route` None: image tokens pass through all layers.

    Raises:
        UserError: a layer is both bypassed and reverted.
    """

    bypassed: Region
    reverted: Region
    route: Region | None = None

    def __post_init__(self) -> None:
        if both := self.bypassed & self.reverted:
            raise UserError(f"bypassed and reverted: {_layers(both)}; choose one of the two")

    def __str__(self) -> str:
        """What is not as in the plain model, in a few words."""
        parts = [
            f"{_layers(self.bypassed)} bypassed" if self.bypassed else "",
            f"{_layers(self.reverted)} reverted" if self.reverted else "",
            f"image tokens only through {_layers(self.route)}" if self.route is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "all layers"


@contextmanager
def intervene(vlm: Vlm, intervention: Intervention, backbone: Backbone | None = None) -> Iterator[None]:
    """Context in which the model is changed so; its own route, if it has one, is replaced.

    Raises:
        UserError: layers are to be reverted without a backbone, or the route does not fit the model.
    """
    if intervention.reverted and backbone is None:
        raise UserError("reverting layers needs a backbone: --backbone is required")
    if own := running_route(vlm.model):
        own.remove()
    try:
        with ExitStack() as changes:
            if intervention.route is not None:
                changes.enter_context(route(vlm, intervention.route))
            if backbone:
                changes.enter_context(backbone.revert(intervention.reverted))
            changes.enter_context(bypass(vlm, intervention.bypassed))
            yield
    finally:
        if own:
            own.turn_on(own.region)


def _layers(region: Region) -> str:
    return f"layer{'s' if len(region) > 1 else ''} {region}"

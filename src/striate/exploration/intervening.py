"""Interventions: a model asked while layers are bypassed or reverted, or while image tokens take another route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from striate.errors import UserError
from striate.prune.bypassing import bypass
from striate.region import Region
from striate.routing import route, unroute
from striate.scores.backbone import Backbone
from striate.vlm import Vlm


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
    own = unroute(vlm.model)
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
            route(vlm, own)


def _layers(region: Region) -> str:
    return f"layer{'s' if len(region) > 1 else ''} {region}"

"""What the answers lose when image tokens pass through the region alone, before any training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import torch

from striate import routing
from striate.data import Batch
from striate.errors import UserError, first_line
from striate.region import Region
from striate.scores.likelihood import AnswerTokens
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

NOISE = 2.0
"""Standard errors within which a loss counts as none."""


@dataclass(frozen=True)
class RouteLoss:
    """Mean rise of the answers' loss with the route `same`, in nats per answer token, its standard error, and the
    number of records; or `why` it was not measured."""

    rise: float = 0.0
    stderr: float = 0.0
    n: int = 0
    why: str = ""

    @property
    def harmless(self) -> bool:
        """Whether the rise is within noise, or the loss falls."""
        return self.n > 1 and self.rise <= NOISE * self.stderr


def route_loss(vlm: Vlm, region: Region, batches: Callable[[], Generator[Batch]]) -> RouteLoss:
    """The rise of the answers' loss when image tokens pass through `region` and layer 0 alone."""
    route = routing.resolve("same", region)
    if route is None or len(route) == vlm.depth:
        return RouteLoss(why="the region is the whole model")
    rises = []
    try:
        with closing(batches()) as stream, torch.no_grad(), eval_mode(vlm.model):
            for batch in stream:
                answers = AnswerTokens.of(batch)
                plain = answers.means(answers.nll(answers.logits(vlm, batch)))
                with routing.route(vlm, route):
                    routed = answers.means(answers.nll(answers.logits(vlm, batch)))
                rises.append((routed - plain)[batch.image_mask.any(dim=1)])
    except UserError as error:  # a family that cannot be routed
        return RouteLoss(why=first_line(error))
    found = torch.cat(rises).cpu()
    if len(found) < 2:
        return RouteLoss(why=f"{len(found)} record with an image is too few")
    return RouteLoss(float(found.mean()), float(found.std() / len(found) ** 0.5), len(found))

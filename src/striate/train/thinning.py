"""Images with some of their tokens in most early steps: less work a step, and the decoder learns otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from striate.data import Batch
from striate.errors import UserError

EARLY = 0.8  # share of the steps, from the first, that may be thinned
WHOLE_EVERY = 10  # so many early steps, one shows all tokens, lest the model forget how to read them


@dataclass(frozen=True)
class Thinning:
    """Which image tokens the decoder is shown: a `share` of them, in (0, 1], drawn by seed, step and batch.

    After DualSpeed (arXiv 2602.03815), whose fast steps see some tokens and whose slow steps see all; here the last
    steps are slow ones, too, and nothing is distilled.
    """

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"image_tokens {self.share}: a share above 0 and up to 1 was expected")

    def in_step(self, batches: list[Batch], step: int, last: int) -> list[Batch]:
        """The batches of one optimiser step, counted from 0, of `last`."""
        if self.share == 1 or step >= EARLY * last or step % WHOLE_EVERY == 0:
            return batches
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        return [self.of(batch, generator) for batch in batches]

    def of(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the rest of its image tokens unseen."""
        drawn = torch.rand(batch.image_mask.shape, generator=generator).to(batch.image_mask.device)
        return replace(batch, unseen=batch.image_mask & (drawn >= self.share))

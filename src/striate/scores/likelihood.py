"""The answer tokens of a batch, their negative log-likelihood, and perplexity with its standard error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from striate.data import Batch
from striate.errors import UserError
from striate.vlm import Vlm


@dataclass(frozen=True)
class AnswerTokens:
    """The N answer tokens of a batch of B samples, row after row.

    `positions` [B, T] is true where the logits predict an answer token: one to the left of it. `tokens` [N] are the
    answer tokens, `counts` their number per sample, `ids` the samples' names, for error messages.
    """

    positions: Tensor
    tokens: Tensor
    counts: tuple[int, ...]
    ids: tuple[str, ...]

    @classmethod
    def of(cls, batch: Batch) -> AnswerTokens:
        """Read the labels of a batch.

        Raises:
            UserError: a sample has no answer token to predict.
        """
        positions, tokens = batch.targets()
        counts = tuple(positions.sum(dim=1).tolist())
        if 0 in counts:
            name = batch.ids[counts.index(0)]
            raise UserError(f"record {name!r} has no answer, and a loss needs one: leave it out or give it an answer")
        return cls(positions, tokens, counts, batch.ids)

    def logits(self, vlm: Vlm, batch: Batch) -> Tensor:
        """The model's logits [N, V] at the answer positions, in one forward pass."""
        with vlm.head_at(self.positions):
            return vlm.model(**batch.inputs, use_cache=False).logits[0]

    def nll(self, logits: Tensor) -> Tensor:
        """Negative log-likelihood [N] of the answer tokens, in nats, from logits [N, V]."""
        return F.cross_entropy(logits.float(), self.tokens, reduction="none")

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum over each sample's answer tokens: [N] -> [B], in double precision."""
        return torch.stack([part.sum() for part in per_token.double().split(self.counts)])

    def means(self, per_token: Tensor) -> Tensor:
        """Mean over each sample's answer tokens: [N] -> [B], in double precision."""
        return torch.stack([part.mean() for part in per_token.double().split(self.counts)])

    def check(self, per_sample: Tensor) -> None:
        """Refuse a non-finite loss.

        Raises:
            UserError: an entry of `per_sample` [B] is NaN or Inf; names the record.
        """
        bad = (~per_sample.isfinite()).nonzero()
        if len(bad):
            name, value = self.ids[int(bad[0])], float(per_sample[int(bad[0])])
            raise UserError(
                f"the unchanged model's loss on record {name!r} is {value}: check the checkpoint for NaN, "
                "or try --dtype float32"
            )


def perplexity(nll: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity over all answer tokens of S samples, and its standard error.

    `nll` [S, ...] is each sample's summed negative log-likelihood in nats, `tokens` [S] its number of answer tokens.
    The value exp(sum nll / sum tokens), >= 1, gives every token the same weight, as a corpus perplexity does. Its
    standard error is that of a ratio estimate with samples as the units: with r = sum nll / sum tokens, by the delta
    method var(r) = S / (S - 1) * sum (nll_s - r tokens_s)^2 / (sum tokens)^2 and stderr = exp(r) sqrt(var(r)). NaN for
    one sample.
    """
    nll = nll.double()
    weight = tokens.double().reshape(-1, *[1] * (nll.dim() - 1))
    rate = nll.sum(0) / weight.sum()
    spread = (nll - rate * weight).square().sum(0) / weight.sum().square()
    freedom = len(nll) - 1
    variance = spread * len(nll) / freedom if freedom else torch.full_like(spread, torch.nan)
    return rate.exp(), rate.exp() * variance.sqrt()

"""Scores by intervention: how the answers change when one layer is bypassed, reverted, or frozen for some tokens.

Each layer is changed in turn and the model rerun from that layer on (see `replay`), so that each kind of change costs
about depth / 2 forward passes for all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from striate.data import Batch
from striate.errors import UserError
from striate.scores.backbone import Backbone
from striate.scores.likelihood import AnswerTokens, perplexity
from striate.scores.replay import Replay, divergence
from striate.scores.table import Metric, Score
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode, freeze, skip

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "layer_contribution",
            needs=("records", "images"),
            range="0.. nats",
            source="ShortV (Yuan et al. 2025, arXiv 2504.00502): KL(p || p with the image tokens frozen in layer l)",
        ),
        Metric(
            "visual_swap",
            needs=("records", "images"),
            range="nats per answer token; 0: nothing is lost",
            source="our own: mean answer loss with image keys and values of a gray image in layer l, minus the loss",
        ),
        Metric(
            "bypass_perplexity",
            needs=("records",),
            range="1..",
            source="exp(mean answer-token loss) with layer l skipped",
        ),
        Metric(
            "revert_perplexity",
            needs=("records", "backbone"),
            range="1..",
            source="arXiv 2412.12785, Figure 1: exp(mean answer-token loss) with layer l reverted to the backbone",
        ),
    )
}

# The changes behind each score: `image` and `text` freeze those tokens in a layer, `swap` changes what it reads.
KINDS = {
    "layer_contribution": ("image", "text"),
    "visual_swap": ("swap",),
    "bypass_perplexity": ("bypass",),
    "revert_perplexity": ("revert",),
}


class Causal:
    """Layer contribution, and perplexity with a layer bypassed or reverted.

    `layer_contribution`: KL divergence in nats at the positions that predict answer tokens, mean over a sample's
    answer tokens, then over samples. `image` (the score itself): the image tokens leave layer l as they entered it,
    while text tokens still read them; `text`: the other way round. Samples without images have no value for `image`.
    `visual_swap`: what the answers lose, in nats per answer token, when the text tokens of layer l read a gray image
    (`Replay.run_with_gray_keys`): large where the layer fetches what the answers need. Below 0 where they gain.
    `bypass_perplexity`, `revert_perplexity`: over all answer tokens, see `perplexity` for the standard error.

    Each kind of change (image, text, swap, bypass, revert) costs about depth / 2 forward passes without tower and full
    logits. A batch is stored as a whole: after an interrupt, `scores` covers the complete batches.

    Args:
        backbone: folder of the backbone, for `revert_perplexity`; not needed with unmerged adapters.

    Raises:
        UserError: `revert_perplexity` is requested and the backbone is missing or does not match.
    """

    def __init__(self, vlm: Vlm, names: Sequence[str], *, backbone: str | Path | None = None) -> None:
        self.vlm, self.names = vlm, tuple(names)
        self.backbone = Backbone(vlm, backbone) if "revert_perplexity" in names else None
        self.kinds = [kind for name in names for kind in KINDS[name]]
        self.results: list[tuple[dict[str, Tensor], Tensor, tuple[int, ...]]] = []  # one per batch, see `add`

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Measure the samples of a batch.

        Raises:
            UserError: a sample has no answer, or the unchanged model's loss on it is NaN or Inf.
        """
        if not len(batch):
            return
        batch = batch.to(self.vlm.device, self.vlm.model.dtype)
        answers = AnswerTokens.of(batch)
        with eval_mode(self.vlm.model):
            replay = Replay(self.vlm, batch, answers)
            clean = answers.sums(answers.nll(replay.logits))
            answers.check(clean)
            layers = [self._layer(replay, layer) for layer in range(self.vlm.depth)]
        by_kind = {kind: torch.stack([one[kind] for one in layers], dim=1).cpu() for kind in self.kinds}  # B L each
        self.results.append((by_kind, clean.cpu(), answers.counts))

    def perplexity(self) -> tuple[float, float]:
        """Perplexity of the unchanged model over the same samples, and its standard error."""
        value, error = perplexity(torch.cat([clean for _, clean, _ in self.results]), self._counts())
        return float(value), float(error)

    def scores(self, keep: Sequence[Tensor] | None = None) -> list[Score]:
        """The scores over the samples measured so far, or over those that are true in `keep`, [B] per batch; none
        before the first batch.

        Raises:
            UserError: a score of images is requested and no sample at all has one.
        """
        if not self.results:
            return []
        chosen = torch.cat(list(keep)) if keep is not None else torch.ones(len(self._counts()), dtype=torch.bool)
        return [self._score(METRICS[name], chosen) for name in self.names]

    def _counts(self) -> Tensor:
        """Number of answer tokens per sample [N]."""
        return torch.tensor([count for _, _, counts in self.results for count in counts])

    def _layer(self, replay: Replay, layer: int) -> dict[str, Tensor]:
        """One value per sample [B], by kind of change."""
        return {kind: self._measure(replay, layer, kind) for kind in self.kinds}

    def _measure(self, replay: Replay, layer: int, kind: str) -> Tensor:
        answers, image_mask = replay.answers, replay.batch.image_mask
        if kind in ("image", "swap") and not image_mask.any():
            return torch.full((len(answers.counts),), torch.nan, dtype=torch.float64)
        if kind == "swap":
            lost = answers.nll(replay.run_with_gray_keys(layer)) - answers.nll(replay.logits)
            return answers.means(lost).where(image_mask.any(dim=1), torch.nan)
        if kind in ("image", "text"):
            tokens = image_mask if kind == "image" else ~image_mask
            values = answers.means(divergence(replay.logits, replay.run_with(layer, freeze(tokens))))
            present = image_mask.any(dim=1) if kind == "image" else torch.ones_like(values, dtype=torch.bool)
            return values.where(present, torch.nan)
        if kind == "bypass":
            return answers.sums(answers.nll(replay.run_with(layer, skip)))
        assert self.backbone is not None
        with self.backbone.layer(layer):
            return answers.sums(answers.nll(replay.run(layer)))

    def _score(self, metric: Metric, chosen: Tensor) -> Score:
        every = {kind: torch.cat([one[kind] for one, _, _ in self.results]) for kind in KINDS[metric.name]}  # N L each
        kinds = {kind: values[chosen] for kind, values in every.items()}
        if "images" in metric.needs:
            main = KINDS[metric.name][0]
            if every[main].isnan().all():
                raise UserError(f"{metric.name} needs image tokens, and no record has an image")
            return Score.of_samples(metric, kinds[main], parts=kinds if len(kinds) > 1 else None)
        (losses,) = kinds.values()
        values, errors = perplexity(losses, self._counts()[chosen])
        return Score.of(metric, tuple(values.tolist()), stderr=tuple(errors.tolist()), n=len(losses))

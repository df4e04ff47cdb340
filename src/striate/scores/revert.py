"""Perplexity with groups of layers reverted to the backbone: which layers' tuning matters.

The paper's Figure 1, left: if reverting a group raises the perplexity of visual data, these layers learned visual
knowledge; if it lowers it, their tuning is redundant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from striate.data import Batch
from striate.distributed import Rank
from striate.errors import UserError
from striate.region import Region
from striate.scores.backbone import Backbone
from striate.scores.likelihood import AnswerTokens, perplexity
from striate.scores.replay import Replay
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

GROUP_FORMS = (
    "8-15,16-23 (one group per span), each (every layer alone), sliding:8 (all runs of 8 adjacent layers), "
    "or a counted form of a region such as uniform:25%"
)
_SLIDING = re.compile(r"sliding:([0-9]{1,9})")


@dataclass(frozen=True)
class Perplexity:
    """exp(mean answer-token loss), >= 1, over `n` samples, with its standard error over samples (NaN for one)."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Reversion:
    """Perplexity of one data set: of the tuned model, with each group reverted, and with all layers reverted.

    `backbone` has the backbone's decoder layers under the tuned model's embeddings, final norm and head.
    """

    tuned: Perplexity
    groups: Mapping[str, Perplexity]
    backbone: Perplexity


def parse_groups(texts: str | Sequence[str], depth: int) -> dict[str, Region]:
    """Groups of layers from text, in order, by name: the text of the group, or its layers.

    Commas separate groups within a text: `8-15,16-23` and `["8-15", "16-23"]` are the same two groups.

    Raises:
        UserError: no group is named, or one has none of the `GROUP_FORMS` or does not fit the depth.
    """
    written = [texts] if isinstance(texts, str) else texts
    items = [item.strip() for text in written for item in text.split(",") if item.strip()]
    if not items:
        raise UserError(f"no group of layers is named; accepted: {GROUP_FORMS}")
    groups: dict[str, Region] = {}
    for item in items:
        groups |= dict(_expand(item, depth))
    if empty := next((name for name, region in groups.items() if not region), None):
        raise UserError(f"the group {empty!r} has no layers; accepted: {GROUP_FORMS}")
    return groups


def _expand(item: str, depth: int) -> Iterator[tuple[str, Region]]:
    match = _SLIDING.fullmatch(item)
    if match is None and item != "each":
        yield item, Region.parse(item, depth)
        return
    size = int(match[1]) if match else 1
    if not 0 < size <= depth:
        raise UserError(f"{item!r} means runs of {size} layers; this model has {depth}; accepted: {GROUP_FORMS}")
    for start in range(depth - size + 1):
        last = start + size - 1
        name = f"{start}-{last}" if size > 1 else f"{start}"
        yield name, Region(tuple(range(start, start + size)), depth, item)


def revert(
    vlm: Vlm,
    groups: Mapping[str, Region],
    *,
    backbone: str | Path | None,
    sets: Mapping[str, Iterable[Batch]],
    rank: Rank = Rank(),  # noqa: B008 (frozen)
) -> dict[str, Reversion]:
    """Perplexity of each data set (`visual`, `text`, ...) with each group of layers reverted to the backbone.

    `backbone` is a folder; None for a model with unmerged adapters, which are disabled instead. Weights are reverted
    one layer at a time, while it runs. A batch costs one forward pass, plus one without tower and projector for the
    backbone and for each group, from the group's first layer on. With several processes each measures its share of the
    batches and has all results.

    Raises:
        UserError: the backbone does not match, a set has no samples, a sample has no answer, or a loss is NaN or Inf.
    """
    layers = Backbone(vlm, backbone)
    everything = Region(tuple(range(vlm.depth)), vlm.depth)
    regions = [*groups.values(), everything]
    for name, region in groups.items():
        if region.depth != vlm.depth:
            raise UserError(f"the group {name!r} is for {region.depth} layers, this model has {vlm.depth}")
    reversions = {}
    for name, batches in sets.items():
        tuned, *by_group, whole = _perplexities(vlm, layers, regions, batches, name, rank)
        reversions[name] = Reversion(tuned, dict(zip(groups, by_group, strict=True)), whole)
    return reversions


@torch.no_grad()
def _perplexities(
    vlm: Vlm, backbone: Backbone, regions: Sequence[Region], batches: Iterable[Batch], name: str, rank: Rank
) -> list[Perplexity]:
    """Perplexity of the tuned model, and of the model with each of the regions reverted."""
    results: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for batch in rank.share(batches):
        if not len(batch):
            continue
        batch = batch.to(vlm.device, vlm.model.dtype)
        answers = AnswerTokens.of(batch)
        with eval_mode(vlm.model):
            replay = Replay(vlm, batch, answers)
            columns = [answers.sums(answers.nll(replay.logits))]
            answers.check(columns[0])
            for region in regions:
                with backbone.revert(region):
                    columns.append(answers.sums(answers.nll(replay.run(min(region, default=0)))))
        results.append((torch.stack(columns, dim=1).cpu(), answers.counts))  # B 1+G
    results = rank.interleave(results)
    if not results:
        raise UserError(f"the {name} set has no samples")
    counts = [count for _, counts in results for count in counts]
    values, errors = perplexity(torch.cat([losses for losses, _ in results]), torch.tensor(counts))
    return [Perplexity(*pair, len(counts)) for pair in zip(values.tolist(), errors.tolist(), strict=True)]

"""Perplexity with groups of layers put back to the backbone: where the tuned model needs what it learnt.

The paper's Figure 1, left: a group whose reversion raises the perplexity of visual data holds what the model learnt
about seeing; one whose reversion lowers it is redundant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from striate.data import Batch
from striate.errors import UserError
from striate.processes import Rank
from striate.region import Region
from striate.score.backbone import Backbone
from striate.score.likelihood import Answers, perplexity
from striate.score.replay import Replay, at_rest
from striate.vlm import Vlm

GROUP_FORMS = (
    "8-15,16-23 (a group for each span), each (every layer alone), sliding:8 (all runs of 8 neighbours), "
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
    """Named groups of layers from text, in the order written; a name is what was written, or the layers.

    Commas separate groups within a text: `8-15,16-23` and `["8-15", "16-23"]` are the same two groups.

    Raises:
        UserError: nothing is named, or something that is none of `GROUP_FORMS`, or not of this depth.
    """
    written = [texts] if isinstance(texts, str) else texts
    items = [item.strip() for text in written for item in text.split(",") if item.strip()]
    if not items:
        raise UserError(f"no group of layers is named; accepted: {GROUP_FORMS}")
    groups: dict[str, Region] = {}
    for item in items:
        groups |= dict(_expanded(item, depth))
    if empty := next((name for name, region in groups.items() if not region), None):
        raise UserError(f"the group {empty!r} has no layers; accepted: {GROUP_FORMS}")
    return groups


def _expanded(item: str, depth: int) -> Iterator[tuple[str, Region]]:
    match = _SLIDING.fullmatch(item)
    if match is None and item != "each":
        yield item, Region.parse(item, depth)
        return
    size = int(match[1]) if match else 1
    if not 0 < size <= depth:
        raise UserError(f"{item!r} asks for runs of {size} layers; this model has {depth}; accepted: {GROUP_FORMS}")
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
    """Perplexity of each data set (`visual`, `text`, ...) with each group of layers put back to the backbone.

    `backbone` is a folder; None for a model with unmerged adapters, which are switched off instead. Weights are put
    back one layer at a time, while it runs. A batch costs one forward pass, and one for each group from its first layer
    on and for the backbone, in which tower and projector need not run again. Of several processes each takes its share
    of the batches, and has all results.

    Raises:
        UserError: the backbone does not match, a set has no samples, a sample no answer, or a loss is no number.
    """
    before = Backbone(vlm, backbone)
    everything = Region(tuple(range(vlm.depth)), vlm.depth)
    reverted = {**groups, "": everything}  # no group is called ""
    for name, region in groups.items():
        if region.depth != vlm.depth:
            raise UserError(f"the group {name!r} is for {region.depth} layers, this model has {vlm.depth}")
    found = {}
    for name, batches in sets.items():
        tuned, *others = _perplexities(vlm, before, list(reverted.values()), batches, name, rank)
        named = dict(zip(reverted, others, strict=True))
        whole = named.pop("")
        found[name] = Reversion(tuned, named, whole)
    return found


@torch.no_grad()
def _perplexities(
    vlm: Vlm, backbone: Backbone, regions: Sequence[Region], batches: Iterable[Batch], name: str, rank: Rank
) -> list[Perplexity]:
    """Of the tuned model, and with each of the regions reverted."""
    kept: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for batch in rank.share(batches):
        if not len(batch):
            continue
        batch = batch.to(vlm.device, vlm.model.dtype)
        answers = Answers.of(batch)
        with at_rest(vlm.model):
            replay = Replay(vlm, batch, answers)
            columns = [answers.sums(answers.nll(replay.logits))]
            answers.check(columns[0])
            for region in regions:
                with backbone.reverted(region):
                    columns.append(answers.sums(answers.nll(replay.run(min(region, default=0)))))
        kept.append((torch.stack(columns, dim=1).cpu(), answers.counts))  # B 1+G
    kept = rank.in_turn(kept)
    if not kept:
        raise UserError(f"the {name} set has no samples")
    counts = [count for _, counts in kept for count in counts]
    values, errors = perplexity(torch.cat([losses for losses, _ in kept]), torch.tensor(counts))
    return [Perplexity(*pair, len(counts)) for pair in zip(values.tolist(), errors.tolist(), strict=True)]

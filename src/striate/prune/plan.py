"""The plan of a pruning: the layers to keep, those to cut and their order, and the predicted effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.prune.choice import Amount, Calibration, Criterion, choose
from striate.prune.cutting import Numbering
from striate.prune.protected import protected_layers
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.routing import read_route
from striate.scores.table import Score
from striate.vlm import Vlm


@dataclass(frozen=True)
class Pruning:
    """The plan of cutting layers from a model of `keep.depth` layers, and its predicted effect.

    `keep` is the region to keep. `order` are the layers to cut in the order of choice, the least important first; `by`
    the score, empty when the user named the layers. `parameters` and `perplexity` are (before, after); perplexity is
    that of the model with the layers bypassed, None without data. `protected` are the layers that cannot be cut, with
    the reason; `scores` were measured on the whole model.
    """

    keep: Region
    order: tuple[int, ...]
    by: str
    protected: Mapping[int, str]
    parameters: tuple[int, int]
    perplexity: tuple[float, float] | None = None
    scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        Numbering(Region(self.order, self.keep.depth))  # raises an error when no layer would be left

    @property
    def numbers(self) -> Numbering:
        """Old and new numbers of the layers."""
        return Numbering(Region(self.order, self.keep.depth))

    @property
    def region(self) -> Region:
        """The kept region in the new numbers."""
        return self.numbers.of(self.keep)

    def to_json(self, parent: str) -> dict[str, Any]:
        """The content of prune.json: all layer numbers are old ones, except in `region` and the values of `map`."""
        return {
            "parent": parent,
            "by": self.by,
            "removed": list(self.numbers.removed),
            "order": list(self.order),
            "depth": {"before": self.keep.depth, "after": self.numbers.depth},
            "map": {str(old): new for old, new in self.numbers.new.items()},
            "region": str(self.region),
            "protected": {str(layer): reason for layer, reason in self.protected.items()},
            "parameters": dict(zip(("before", "after"), self.parameters, strict=True)),
            "perplexity": self.perplexity and dict(zip(("before", "after"), self.perplexity, strict=True)),
            "scores": {score.name: list(score.values) for score in self.scores},
        }

    def __str__(self) -> str:
        """The plan in a few lines of text."""
        depth, removed = self.keep.depth, self.numbers.removed
        before, after = self.parameters
        cells = ("■" if layer in self.keep else "✂" if layer in removed else "·" for layer in range(depth))
        lines = [
            f"cuts     {removed} ({len(removed)} of {depth} layers{f', by {self.by}' if self.by else ''})",
            f"order    {', '.join(map(str, self.order))}",
            f"keeps    {self.keep} (the region)",
            f"         {''.join(cells)}",
            f"weights  {before:,} -> {after:,} parameters ({after / before - 1:.1%})",
            f"cache    -{len(removed) / depth:.0%}, if all layers cache alike",
        ]
        if self.perplexity:
            whole, pruned = self.perplexity
            lines.append(f"answers  perplexity {whole:.3f} -> {pruned:.3f} ({pruned / whole - 1:+.1%})")
        for layer, reason in self.protected.items():
            lines.append(f"cannot   {layer}: {reason}")
        return "\n".join(lines)

    def __rich__(self) -> str:
        """The text of `str`; rich would show a dataclass field by field."""
        return str(self)


@dataclass(frozen=True)
class PruneRequest:
    """The user's request: the region to keep, and the number of layers to cut (`remove`) or the `layers` themselves."""

    region: str | None
    remove: str | None
    layers: str | None

    def __post_init__(self) -> None:
        if (self.remove is None) == (self.layers is None):
            raise UserError("give either --remove (how many layers to cut: 4, 10%, until:1%) or --layers (which: 9,13)")

    def keep(self, source: Path, depth: int) -> Region:
        """The region to keep.

        Raises:
            UserError: neither the request nor the checkpoint has a region, or its depth is another.
        """
        if self.region is None and not (source / REGION_FILE).is_file():
            raise UserError(f"{source} has no {REGION_FILE}: name the layers to keep with --region, or --region none")
        return Region.parse(str(source) if self.region is None else self.region, depth)

    def amount(self, candidates: list[int], keep: Region, protected: Mapping[int, str]) -> Amount:
        """How many layers to cut.

        Raises:
            UserError: there are fewer candidates.
        """
        assert self.remove is not None
        amount = Amount.parse(self.remove, keep.depth)
        if (amount.count or 1) > len(candidates):
            own = f"{len(set(protected) - set(keep))} protected" if protected else "none protected"
            raise UserError(
                f"--remove {self.remove}: only {len(candidates)} layers can be cut: of {keep.depth}, {len(keep)} are "
                f"in the region {keep}, and {own} outside it"
            )
        return amount

    def named_layers(self, keep: Region, protected: Mapping[int, str]) -> tuple[int, ...]:
        """The layers that the user names.

        Raises:
            UserError: a layer does not exist, is in the region to keep, or is protected.
        """
        assert self.layers is not None
        chosen = Region.parse(self.layers, keep.depth)
        if overlap := chosen & keep:
            raise UserError(f"--layers {self.layers}: {overlap} in the region {keep}, which is never cut")
        if bad := next((layer for layer in chosen if layer in protected), None):
            raise UserError(
                f"--layers {self.layers}: layer {bad} cannot be cut: {protected[bad]}", see="layers-cannot-be-removed"
            )
        return chosen.layers


def plan_pruning(
    request: PruneRequest, criterion: Criterion, vlm: Vlm, source: Path, calibration: Calibration | None
) -> Pruning:
    """Choose the layers to cut, and predict the effect.

    Raises:
        UserError: the request cannot be fulfilled, or the data cannot be used.
    """
    keep, protected = request.keep(source, vlm.depth), protected_layers(vlm)
    perplexity = cache(calibration.perplexity) if calibration else None  # nothing is measured twice
    if request.region is None and (route := read_route(vlm.model.config)):
        keep |= route
    if request.layers is not None:
        order, by = request.named_layers(keep, protected), ""
    else:
        candidates = [layer for layer in range(vlm.depth) if layer not in keep and layer not in protected]
        amount, by = request.amount(candidates, keep, protected), criterion.by
        order = choose(criterion.proposals(vlm, candidates, calibration), amount, perplexity)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in vlm.layers]
    total = sum(parameter.numel() for parameter in vlm.model.parameters())
    pruning = partial(Pruning, keep, order, by, protected, (total, total - sum(sizes[layer] for layer in order)))
    if perplexity is None:
        return pruning()
    return pruning(perplexity=(perplexity(()), perplexity(order)), scores=tuple(criterion.measured))

"""The plan of a pruning: what stays, what goes, in which order, and what that is expected to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.prune.bypass import bypass
from striate.prune.choice import Amount, Calibration, Criterion, choose
from striate.prune.numbering import Numbering
from striate.prune.protected import protected
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.score.table import Score
from striate.vlm import Vlm


@dataclass(frozen=True)
class Pruning:
    """What is to be cut from a model of `keep.depth` layers, and what that is expected to do.

    `order` are the layers to cut as they were chosen, the most dispensable first; `by` the score, empty where the user
    named the layers. `parameters` and `perplexity` are (before, after); perplexity is that of the model bypassing the
    layers, None without data. `protected` are layers that could not have gone, with the reason; `scores` what was
    measured on the whole model.
    """

    keep: Region
    order: tuple[int, ...]
    by: str
    protected: Mapping[int, str]
    parameters: tuple[int, int]
    perplexity: tuple[float, float] | None = None
    scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        Numbering(Region(self.order, self.keep.depth))  # refuses a plan that would leave nothing

    @property
    def numbers(self) -> Numbering:
        """Old and new numbers of the layers."""
        return Numbering(Region(self.order, self.keep.depth))

    @property
    def region(self) -> Region:
        """The kept region in the new numbers."""
        return self.numbers.of(self.keep)

    def to_json(self, parent: str) -> dict[str, Any]:
        """The content of prune.json: all layer numbers are old ones, but for those of `region` and in `map`."""
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
        """The plan in a few lines, for people."""
        depth, removed = self.keep.depth, self.numbers.removed
        before, after = self.parameters
        strip = ("■" if layer in self.keep else "✂" if layer in removed else "·" for layer in range(depth))
        lines = [
            f"cuts     {removed} ({len(removed)} of {depth} layers{f', by {self.by}' if self.by else ''})",
            f"order    {', '.join(map(str, self.order))}",
            f"keeps    {self.keep} (the region)",
            f"         {''.join(strip)}",
            f"weights  {before:,} -> {after:,} parameters ({after / before - 1:.1%})",
            f"cache    {1 - len(removed) / depth:.0%} of its size, where all layers are alike",
        ]
        if self.perplexity:
            whole, left = self.perplexity
            lines.append(f"answers  perplexity {whole:.3f} -> {left:.3f} ({left / whole - 1:+.1%})")
        for layer, reason in self.protected.items():
            lines.append(f"cannot   {layer}: {reason}")
        return "\n".join(lines)

    def __rich__(self) -> str:
        """As `str` has it; a dataclass would be shown field by field."""
        return str(self)


@dataclass(frozen=True)
class Wish:
    """What the user asked for: what to keep, and how many layers, or which, are to go."""

    region: str | None
    remove: str | None
    layers: str | None

    def __post_init__(self) -> None:
        if (self.remove is None) == (self.layers is None):
            raise UserError("say either how many layers go (--remove 4, 10% or until:1%) or which (--layers 9,13)")

    def keep(self, source: Path, depth: int) -> Region:
        """The region that stays.

        Raises:
            UserError: none is named and the checkpoint has none, or it is of another depth.
        """
        if self.region is None and not (source / REGION_FILE).is_file():
            raise UserError(f"{source} has no {REGION_FILE}: say which layers must stay (--region, `none` for no such)")
        return Region.parse(str(source) if self.region is None else self.region, depth)

    def count(self, candidates: list[int], keep: Region, kept_back: Mapping[int, str]) -> Amount:
        """How many layers go.

        Raises:
            UserError: more than there are candidates.
        """
        assert self.remove is not None
        amount = Amount.parse(self.remove, keep.depth)
        if (amount.count or 1) > len(candidates):
            own = f"{len(set(kept_back) - set(keep))} protected" if kept_back else "none protected"
            raise UserError(
                f"--remove {self.remove}: only {len(candidates)} layers can go: of {keep.depth}, {len(keep)} are in "
                f"the region {keep}, and {own} outside it"
            )
        return amount

    def named(self, keep: Region, kept_back: Mapping[int, str]) -> tuple[int, ...]:
        """The layers that the user names.

        Raises:
            UserError: no such layers, or some of the region, or protected ones.
        """
        assert self.layers is not None
        chosen = Region.parse(self.layers, keep.depth)
        if seen := chosen & keep:
            raise UserError(f"--layers {self.layers}: {seen} in the region {keep}, which is never cut")
        if bad := next((layer for layer in chosen if layer in kept_back), None):
            raise UserError(f"--layers {self.layers}: layer {bad} cannot be cut: {kept_back[bad]}")
        return chosen.layers


def planned(wish: Wish, criterion: Criterion, vlm: Vlm, source: Path, calibration: Calibration | None) -> Pruning:
    """Choose the layers that go, and foresee what that does.

    Raises:
        UserError: the wish cannot be fulfilled, or the data cannot be used.
    """
    keep, kept_back = wish.keep(source, vlm.depth), protected(vlm)
    if wish.layers is not None:
        order, by = wish.named(keep, kept_back), ""
    else:
        candidates = [layer for layer in range(vlm.depth) if layer not in keep and layer not in kept_back]
        amount, by = wish.count(candidates, keep, kept_back), criterion.by
        order = choose(criterion.proposals(vlm, candidates, calibration), amount, vlm, calibration)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in vlm.layers]
    total = sum(parameter.numel() for parameter in vlm.model.parameters())
    pruning = partial(Pruning, keep, order, by, kept_back, (total, total - sum(sizes[layer] for layer in order)))
    if calibration is None:
        return pruning()
    whole = calibration.perplexity()
    with bypass(vlm, order):
        return pruning(perplexity=(whole, calibration.perplexity()), scores=tuple(criterion.measured))

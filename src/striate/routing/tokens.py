"""The tokens of one forward pass in two parts: those that every layer computes, and those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

MASK = "attention_mask"


@dataclass
class Pass:
    """The forward pass that runs, if any: its tokens, where some are kept; `config` is the decoder's."""

    config: PreTrainedConfig
    tokens: Tokens | None = None


class Tokens:
    """The T tokens of each row of one forward pass, in two parts: those that every layer computes, and those that are
    kept outside the route.

    `kept` [B, T]. All rows have equally many computed tokens, as many as the row with most of them: others are
    filled up with kept ones, whose results are dropped.
    """

    def __init__(self, kept: Tensor) -> None:
        self.length = kept.shape[1]
        counts = (~kept).sum(dim=1)
        most, fewest = torch.stack([counts.max(), counts.min()]).tolist()
        self.count = max(1, most)
        order = kept.byte().argsort(dim=1, stable=True)  # B T
        starts = torch.arange(0, kept.numel(), self.length, device=kept.device).unsqueeze(1)
        self.parts = order.split([self.count, self.length - self.count], dim=1)
        self._places = [(part + starts).flatten() for part in self.parts]  # in a batch laid out as one row
        self._filled = kept.gather(1, self.parts[0]).unsqueeze(-1) if fewest < self.count else None
        self._picked: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._joined: tuple[Tensor, int, Tensor, Tensor] | None = None
        self._shared: tuple[Tensor, dict[Any, Tensor]] | None = None

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert the places of the tokens, such as to fake tensors."""
        self.parts = tuple(map(function, self.parts))
        self._places = [*map(function, self._places)]

    def end(self) -> None:
        """Drop the states of a forward pass that has ended: their graph refers to these tokens, and a cycle of
        references would keep all activations until Python looks for cycles."""
        self._joined = self._shared = None

    def place(self, rows: Tensor) -> Tensor:
        """The places of tokens [B, R] among the computed ones; of a kept token, any place."""
        places = torch.cat(self.parts, dim=1).argsort(dim=1)
        return places.gather(1, rows).clamp(max=self.count - 1)

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Computed and kept tokens of states [B, T, D]: [B, count, D] and [B, T - count, D].

        States that were just joined, and that nobody has written to since, are not copied: layers in a row share the
        kept ones.
        """
        if self._joined and self._joined[0] is states and self._joined[1] == _version(states):
            return self._joined[2:]
        computed, kept = _Split.apply(states, self)
        return computed, kept

    def join(self, computed: Tensor, kept: Tensor) -> Tensor:
        """The inverse of `split`."""
        states: Tensor = _Join.apply(computed, kept, self)
        self._joined = None if states.is_inference() else (states, _version(states), computed, kept)
        return states

    def joined(self, computed: Tensor, kept: Tensor) -> Tensor:
        """The same for keys or values [B, H, T, D]."""
        parts = (part.transpose(1, -2) for part in (computed, kept))
        joined: Tensor = _Join.apply(*parts, self)
        return joined.transpose(1, -2)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Computed tokens after a layer, and as before where a kept one fills up a row."""
        return after if self._filled is None else torch.where(self._filled, before, after)

    def taken(self, states: Tensor) -> tuple[Tensor, ...]:
        """Both parts of states [B, T, ...]."""
        flat = states.flatten(0, 1)
        return tuple(
            flat.index_select(0, place).unflatten(0, part.shape)
            for part, place in zip(self.parts, self._places, strict=True)
        )

    def put(self, *parts: Tensor) -> Tensor:
        """States [B, T, ...] of both parts."""
        states = parts[0].new_empty(len(parts[0]) * self.length, *parts[0].shape[2:])
        for part, place in zip(parts, self._places, strict=True):
            states.index_copy_(0, place, part.flatten(0, 1))
        return states.unflatten(0, (-1, self.length))

    def shared(self, kept: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What is made of the kept tokens once for all layers in a row that share them."""
        if self._shared is None or self._shared[0] is not kept:
            self._shared = (kept, {})
        made = self._shared[1]
        if key not in made:
            made[key] = make()
        return made[key]

    def settings(self, given: Mapping[str, Any], part: int) -> dict[str, Any]:
        """What a layer is called with, for one part of the tokens."""
        return {name: self._pick(value, part, name) for name, value in given.items()}

    def _pick(self, value: Any, part: int, name: str) -> Any:
        """One part of a value for every token; the same value is picked once for all layers."""
        if name == MASK and part == 1:  # keys and values do not ask for it
            return value
        if not isinstance(value, Tensor | tuple | list | dict | Blocks) and name != MASK:
            return value
        key = (id(value), part)
        if key not in self._picked:
            picked = self.mask(value) if name == MASK else self._of_part(value, self.parts[part])
            self._picked[key] = (value, picked)
        return self._picked[key][1]

    def mask(self, mask: Any) -> Any:
        """The rows of an attention mask that belong to computed tokens. Without one, attention is causal."""
        if isinstance(mask, Blocks):
            return mask.rows(self)
        if isinstance(mask, Tensor):
            return self._of_part(mask, self.parts[0])
        keys = torch.arange(self.length, device=self.parts[0].device)
        return self.parts[0][:, None, :, None] >= keys  # B 1 count T

    def _of_part(self, value: Any, index: Tensor) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._of_part(one, index) for one in value)
        if isinstance(value, dict):
            return {name: self._of_part(one, index) for name, one in value.items()}
        return _rows(value, index, self.length) if isinstance(value, Tensor) else value


@runtime_checkable
class Blocks(Protocol):
    """An attention mask of another kind (packed rows), which can tell its rows of computed tokens."""

    def rows(self, tokens: Tokens) -> Any:
        """The mask for the computed tokens as queries and all tokens as keys."""


def _version(states: Tensor) -> int:
    return -1 if states.is_inference() else states._version


def _rows(value: Tensor, index: Tensor, length: int) -> Tensor:
    """Of a value with an axis of tokens, those of `index` [B, n].

    Position embeddings [..., T, D] and masks [B, H, T, T] have it last but one; numbers and flags [..., T], last. What
    has no such axis is for all tokens alike.
    """
    flat = value.dim() < 3 or not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    axis = value.dim() - (1 if flat else 2)
    if axis < 1 or value.shape[axis] != length:
        return value
    if len(index) == 1:
        return value.index_select(axis, index[0])
    rows = axis - 1 if value.shape[axis - 1] == len(index) or value.shape[0] != len(index) else 0
    first = value.movedim((rows, axis), (0, 1)).expand(len(index), *[-1] * (value.dim() - 1))  # B T ...
    picked = first[torch.arange(len(index), device=index.device)[:, None], index]
    return picked.movedim((0, 1), (rows, axis))


class _Split(torch.autograd.Function):
    """Two parts of the tokens; the gradient is joined."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        ctx.tokens = tokens
        return tokens.taken(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.tokens.put(*gradients), None


class _Join(torch.autograd.Function):
    """All tokens from two parts; the gradient is split."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, kept: Tensor, tokens: Tokens) -> Tensor:
        ctx.tokens = tokens
        return tokens.put(computed, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.tokens.taken(gradient), None)

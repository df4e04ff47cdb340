"""Records of a batch in one row, without padding; each attends to itself alone.

The row is attended to record by record with the model's own attention, so nothing is computed between records and no
mask of the whole row exists. Masks come from `transformers` (causal, sliding windows, what a family adds), cut
to the blocks of single records.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from striate.data import TOKEN_KEYS, Batch
from striate.vlm import Vlm

ATTENTION = "striate_record_by_record"
INNER = ("sdpa", "eager")  # attention that can be had for one record at a time
SHORT = 256  # tokens of a record that a CPU attends to in float32 rather than in bfloat16
# What a decoder takes for every token, and the axis of the tokens in it.
PICKED = {"inputs_embeds": 1, "attention_mask": 1, "position_ids": -1}


@dataclass(frozen=True)
class Row:
    """What the model takes for one batch, and where in it a labelled token is predicted.

    `inputs` as in a `Batch`; `positions` [B, T], or [1, all tokens] when packed; then `lengths` has the number of
    tokens of every record. `shown` [all tokens]: those that reach the decoder, where it is not shown all; `positions`
    and `lengths` count them alone.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    lengths: tuple[int, ...] = ()
    shown: Tensor | None = None

    @classmethod
    def padded(cls, batch: Batch) -> Row:
        """The batch as it is."""
        return cls(batch.inputs, batch.targets()[0])

    @classmethod
    def packed(cls, vlm: Vlm, batch: Batch) -> Row:
        """All records in one row, each with positions of its own."""
        there = batch.inputs["attention_mask"].bool()  # B T
        inputs = {
            name: value[there].unsqueeze(0) if name in TOKEN_KEYS else value for name, value in batch.inputs.items()
        }
        inputs["position_ids"] = _position_ids(vlm, batch)[..., there].unsqueeze(-2)
        seen = there if batch.unseen is None else there & ~batch.unseen
        lengths = tuple(seen.sum(dim=1).tolist())
        shown = None if batch.unseen is None else seen[there]
        return cls(inputs, batch.targets()[0][seen].unsqueeze(0), lengths, shown)


def _position_ids(vlm: Vlm, batch: Batch) -> Tensor:
    """Positions within each record [B, T], or [3, B, T] for families that give image tokens a place in the image."""
    rope_index = getattr(vlm.model.base_model, "get_rope_index", None)
    if rope_index is None:
        return (batch.inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    takes = inspect.signature(rope_index).parameters
    return rope_index(**{name: value for name, value in batch.inputs.items() if name in takes})[0]


@contextmanager
def record_by_record(vlm: Vlm) -> Iterator[None]:
    """Within it, the decoder attends to packed rows record by record, and to others as before."""
    config = vlm.model.config.get_text_config(decoder=True)
    inner = config._attn_implementation
    if inner == ATTENTION:
        yield
        return
    if inner not in INNER:
        raise ValueError(f"{inner} attention")
    config._attn_implementation, _inner[id(config)] = ATTENTION, inner
    try:
        yield
    finally:
        config._attn_implementation = _inner.pop(id(config))


@contextmanager
def row_of(vlm: Vlm, row: Row) -> Iterator[None]:
    """Within it, a forward pass is that of `row`."""
    hooks = [] if row.shown is None else [_show_only(vlm, row.shown)]
    token = _lengths.set(row.lengths)
    try:
        yield
    finally:
        _lengths.reset(token)
        for hook in hooks:
            hook.remove()


def _show_only(vlm: Vlm, shown: Tensor) -> RemovableHandle:
    """Let only the tokens that are `shown` [T] into the decoder, each with the position that it has among all."""

    def pick(_: torch.nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = {name: value for name, value in settings.items() if value is not None}
        unknown = [name for name, value in given.items() if name not in PICKED and isinstance(value, Tensor | list)]
        if args or unknown:
            raise ValueError(f"its decoder takes {', '.join(unknown) or 'unnamed arguments'}")
        picked = {name: given[name].index_select(dim, kept) for name, dim in PICKED.items() if name in given}
        return (), settings | picked

    kept = shown.nonzero().flatten()
    return vlm.decoder.register_forward_pre_hook(pick, with_kwargs=True)


_inner: dict[int, str] = {}  # the attention that a decoder's config (by its id) had before
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths", default=())


@dataclass(frozen=True)
class Blocks:
    """In the place of an attention mask: the lengths of a row's records, and for each its mask [1, 1, T, T], or None
    where it is plainly causal. Empty lengths: the row is not packed, and the one mask is that of the whole batch."""

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    inner: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Of the mask that this stands for: `transformers` takes one of four axes for finished."""
        return len(self.shape)


def _blocks(
    *, config: Any, q_length: int, q_offset: int = 0, mask_function: Callable[..., Any], **settings: Any
) -> Blocks:
    """The masks of single records, made as `transformers` makes that of a whole row."""
    if isinstance(settings["attention_mask"], Blocks):  # PaliGemma's decoder asks for what the model has made
        return settings["attention_mask"]
    inner, lengths = _inner[id(config)], _lengths.get()
    make, settings = ALL_MASK_ATTENTION_FUNCTIONS[inner], settings | {"config": config}
    if not lengths:
        settings |= {"q_length": q_length, "q_offset": q_offset, "mask_function": mask_function}
        return Blocks((), (make(**settings),), inner, (1, 1, q_length, q_length))
    if q_length != sum(lengths):
        raise ValueError(f"attention over {q_length} tokens in a row of {sum(lengths)}")
    settings |= {"attention_mask": None, "allow_is_causal_skip": False, "mask_function": mask_function}
    masks, start = [], 0
    for length in lengths:
        block = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        masks.append(make(**settings | block))
        start += length
    shape = (1, 1, q_length, q_length)
    return Blocks(lengths, tuple(masks) if inner == "eager" else _without_causal(masks), inner, shape)


def _without_causal(masks: list[Tensor]) -> tuple[Tensor | None, ...]:
    """None in the place of masks that are causal and nothing else: without a mask kernels are faster."""
    plain = [(mask == torch.ones_like(mask).tril()).all() for mask in masks]
    causal = torch.stack(plain).tolist()
    return tuple(None if is_causal else mask for mask, is_causal in zip(masks, causal, strict=True))


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """The model's own attention, a record at a time. Queries, keys and values [1, H, T, D]; returns [1, T, H, D]."""
    if not isinstance(attention_mask, Blocks):
        raise TypeError(f"{type(module).__name__} makes its own attention mask")
    inner = ALL_ATTENTION_FUNCTIONS.get(attention_mask.inner) or _eager(module)
    if not attention_mask.lengths:
        return inner(module, query, key, value, attention_mask.masks[0], **settings)[0], None
    parts = (tensor.split(attention_mask.lengths, dim=2) for tensor in (query, key, value))
    records = zip(*parts, attention_mask.masks, strict=True)
    attend = _in_float32(inner) if query.device.type == "cpu" and attention_mask.inner == "sdpa" else inner
    return torch.cat([attend(module, q, k, v, mask, **settings)[0] for q, k, v, mask in records], dim=1), None


def _in_float32(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention, for short records in float32: the CPU's kernel takes half the time for them then, since its
    backward pass in bfloat16 is made of products too small to pay (docs/performance.md)."""

    def attend(module: torch.nn.Module, query: Tensor, *others: Any, **settings: Any) -> tuple[Tensor, None]:
        if query.shape[2] > SHORT or query.dtype == torch.float32:
            return inner(module, query, *others, **settings)
        key, value, mask = others
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False):
            output, _ = inner(module, query.float(), key.float(), value.float(), mask, **settings)
        return output.to(query.dtype), None

    return attend


def _eager(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention that stands in the model's own file, where `transformers` looks for it, too."""
    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def compiled(vlm: Vlm) -> Iterator[None]:
    """Within it, every decoder layer is compiled; attention is not, since every row has other lengths."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(_attend))
    for layer in vlm.layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in vlm.layers:
            vars(layer)["_compiled_call_impl"] = None
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _blocks)

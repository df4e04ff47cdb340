"""Packing: the records of a batch in one row, without padding, each attending to itself alone.

The model's own attention runs record by record, so nothing is computed between records and no mask of the whole row
exists. Masks come from `transformers` (causal, sliding windows, a family's own), made for one record at a time.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from striate.data import TOKEN_KEYS, Batch
from striate.routing.tokens import Tokens
from striate.vlm import Vlm

ATTENTION = "striate_record_by_record"
# Attention implementations that can run record by record; those of FLASH take all records in one call.
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
INNER = ("sdpa", "eager", *FLASH)
SHORT = 256  # most tokens of a record whose attention runs in float32 on a CPU, not in bfloat16


@dataclass(frozen=True)
class ModelInputs:
    """The model's inputs for one batch, padded or packed, and the positions that predict a labeled token.

    `inputs` as in a `Batch`; `positions` [B, T], or [1, all tokens] when packed; then `lengths` has the number of
    tokens per record.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> ModelInputs:
        """The inputs on `device`. Positions stay: reading how many there are would wait for a GPU."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)

    @classmethod
    def padded(cls, batch: Batch) -> ModelInputs:
        """The batch as it is."""
        return cls(batch.inputs, batch.targets()[0])

    @classmethod
    def packed(cls, vlm: Vlm, batch: Batch) -> ModelInputs:
        """All records in one row, each with its own positions."""
        mask = batch.inputs["attention_mask"].bool()  # B T
        inputs = {
            name: value[mask].unsqueeze(0) if name in TOKEN_KEYS else value for name, value in batch.inputs.items()
        }
        inputs["position_ids"] = _position_ids(vlm, batch)[..., mask].unsqueeze(-2)
        return cls(inputs, batch.targets()[0][mask].unsqueeze(0), tuple(mask.sum(dim=1).tolist()))


def _position_ids(vlm: Vlm, batch: Batch) -> Tensor:
    """Positions within each record [B, T], or [3, B, T] for families with 3D positions of image tokens (M-RoPE)."""
    rope_index = getattr(vlm.model.base_model, "get_rope_index", None)
    if rope_index is None:
        return (batch.inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    accepted = inspect.signature(rope_index).parameters
    return rope_index(**{name: value for name, value in batch.inputs.items() if name in accepted})[0]


@contextmanager
def record_by_record(vlm: Vlm) -> Iterator[None]:
    """The decoder's attention runs record by record on packed rows, and as before on other rows.

    Without cuDNN's kernels: they compile a plan, in up to a second, for every length of a record in every length of a
    row.
    """
    config = vlm.model.config.get_text_config(decoder=True)
    inner = config._attn_implementation
    if inner == ATTENTION:
        yield
        return
    if inner not in INNER:
        raise ValueError(f"{inner} attention")
    config._attn_implementation, _inner[id(config)] = ATTENTION, inner
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        config._attn_implementation = _inner.pop(id(config))


@contextmanager
def using(prepared: ModelInputs) -> Iterator[None]:
    """The forward passes inside are of these inputs."""
    token = _lengths.set(prepared.lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


_inner: dict[int, str] = {}  # the original attention implementation, by the id of the decoder's config
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths", default=())


@dataclass(frozen=True)
class Blocks:
    """Passed instead of an attention mask: the lengths of a row's records, and per record its mask [1, 1, T, T], or
    None where it is plainly causal. Empty lengths: not packed, the one mask is that of the whole batch. `queries`: how
    many tokens of each record are queries; None: all. For FLASH instead of masks where the records begin and end."""

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    inner: str
    shape: tuple[int, ...]
    queries: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        """Number of axes of the mask replaced: `transformers` does not modify a mask of four axes."""
        return len(self.shape)

    def rows(self, tokens: Tokens) -> Blocks:
        """The masks for the computed tokens of a route as queries and all tokens as keys."""
        if not self.lengths:
            return replace(self, masks=(tokens.mask(self.masks[0]),))
        if self.inner in FLASH:
            raise ValueError(f"{self.inner} attention has no masks of single tokens")
        index = tokens.parts[0][0]  # in the row, in rising order
        ends = torch.tensor(self.lengths, device=index.device).cumsum(0)
        counts = torch.searchsorted(index, ends).diff(prepend=ends.new_zeros(1)).tolist()
        starts = (ends - torch.tensor(self.lengths, device=index.device)).tolist()
        numbers = (part - start for part, start in zip(index.split(counts), starts, strict=True))
        masks = tuple(
            mask if count == length
            else (own.unsqueeze(1) >= torch.arange(length, device=index.device))[None, None] if mask is None
            else mask.index_select(2, own)
            for mask, count, length, own in zip(self.masks, counts, self.lengths, numbers, strict=True)
        )  # fmt: skip
        return replace(self, masks=masks, queries=tuple(counts))


def _blocks(
    *, config: Any, q_length: int, q_offset: int = 0, mask_function: Callable[..., Any], **settings: Any
) -> Blocks:
    """The masks of single records, made as `transformers` makes the mask of a whole row."""
    if isinstance(settings["attention_mask"], Blocks):  # PaliGemma's decoder passes the model's masks
        return settings["attention_mask"]
    inner, lengths = _inner[id(config)], _lengths.get()
    make, settings = ALL_MASK_ATTENTION_FUNCTIONS[inner], settings | {"config": config}
    if not lengths:
        settings |= {"q_length": q_length, "q_offset": q_offset, "mask_function": mask_function}
        return Blocks((), (make(**settings),), inner, (1, 1, q_length, q_length))
    if q_length != sum(lengths):
        raise ValueError(f"attention over {q_length} tokens in a row of {sum(lengths)}")
    shape = (1, 1, q_length, q_length)
    if inner in FLASH:
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Blocks(lengths, (ends.to(settings["device"], non_blocking=True),), inner, shape)
    if inner == "sdpa" and mask_function is causal_mask_function:
        return Blocks(lengths, (None,) * len(lengths), inner, shape)
    settings |= {"attention_mask": None, "allow_is_causal_skip": False, "mask_function": mask_function}
    masks, start = [], 0
    for length in lengths:
        block = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        masks.append(make(**settings | block))
        start += length
    return Blocks(lengths, tuple(masks) if inner == "eager" else _without_causal(masks), inner, shape)


def _without_causal(masks: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Replace plainly causal masks by None: kernels are faster without a mask."""
    plain = [(mask == torch.ones_like(mask).tril()).all() for mask in masks]
    causal = torch.stack(plain).tolist()
    return tuple(None if is_causal else mask for mask, is_causal in zip(masks, causal, strict=True))


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """The model's own attention, record by record. Queries, keys and values [1, H, T, D]; returns [1, T, H, D]."""
    if not isinstance(attention_mask, Blocks):
        raise TypeError(f"{type(module).__name__} makes its own attention mask")
    inner = ALL_ATTENTION_FUNCTIONS.get(attention_mask.inner) or _eager(module)
    if not attention_mask.lengths:
        return inner(module, query, key, value, attention_mask.masks[0], **settings)[0], None
    lengths = attention_mask.lengths
    if attention_mask.inner in FLASH:
        (ends,), longest = attention_mask.masks, max(lengths)
        rows = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return inner(module, query, key, value, None, **settings | rows)[0], None
    causal = all(mask is None for mask in attention_mask.masks)
    if causal and query.device.type != "cpu" and len(lengths) > 1 and _alike(lengths):
        return _in_one_call(inner, module, (query, key, value), lengths, **settings), None
    queries = query.split(attention_mask.queries or lengths, dim=2)
    records = zip(queries, key.split(lengths, dim=2), value.split(lengths, dim=2), attention_mask.masks, strict=True)
    attend = _in_float32(inner) if query.device.type == "cpu" and attention_mask.inner == "sdpa" else inner
    attend = _by_group(attend) if attention_mask.queries and attention_mask.inner == "sdpa" else attend
    return torch.cat([attend(module, q, k, v, mask, **settings)[0] for q, k, v, mask in records], dim=1), None


def _alike(lengths: tuple[int, ...]) -> bool:
    """Whether padding all records to the longest at most doubles the pairs of tokens: one kernel is worth that on a
    GPU."""
    return len(lengths) * max(lengths) ** 2 <= 2 * sum(length**2 for length in lengths)


def _in_one_call(
    inner: Callable[..., Any],
    module: torch.nn.Module,
    row: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    **settings: Any,
) -> Tensor:
    """Causal attention of all records [1, H, T, D] at once, padded on the right, where no token looks; [1, T, H, D]."""
    padded = (
        pad_sequence([part[0].transpose(0, 1) for part in states.split(lengths, dim=2)], batch_first=True)
        for states in row
    )  # each B T H D
    output, _ = inner(module, *(states.transpose(1, 2) for states in padded), None, **settings)
    return torch.cat([one[:length] for one, length in zip(output, lengths, strict=True)]).unsqueeze(0)


def _in_float32(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention, in float32 for short records: the CPU's kernel takes half the time then, since the GEMMs of
    its backward pass are too small for bfloat16 to be faster (docs/performance.md)."""

    def attend(module: torch.nn.Module, query: Tensor, *others: Any, **settings: Any) -> tuple[Tensor, None]:
        if query.shape[2] > SHORT or query.dtype == torch.float32:
            return inner(module, query, *others, **settings)
        key, value, mask = others
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False):
            output, _ = inner(module, query.float(), key.float(), value.float(), mask, **settings)
        return output.to(query.dtype), None

    return attend


def _by_group(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention, where heads that share keys and values lie behind one another: none of those is copied."""

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        heads, groups = query.shape[1], key.shape[1]
        if mask is None or mask.shape[1] != 1 or heads == groups:
            return inner(module, query, key, value, mask, **settings)
        stacked = query.reshape(1, groups, -1, query.shape[-1])  # 1 G H/G*T d
        alike = SimpleNamespace(is_causal=False, training=module.training)  # of no groups
        output, _ = inner(alike, stacked, key, value, mask.repeat(1, 1, heads // groups, 1), **settings)
        return output.transpose(1, 2).reshape(*query.shape).transpose(1, 2), None  # 1 T H d

    return attend


def _eager(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager attention of the model's own module, where `transformers` finds it, too."""
    return sys.modules[type(module).__module__].eager_attention_forward


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _blocks)

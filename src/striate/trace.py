"""Watch the decoder layers during one forward pass: what goes in, what comes out, where their attention goes.

What is seen is handed to a function of the caller while the layer runs, to be reduced on the spot: nothing is kept, so
memory grows neither with the number of layers nor with the number of samples. Outputs of the model do not change, and
when the watch ends, also by an error, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from striate.data import Batch
from striate.errors import UserError
from striate.vlm import Vlm

MAX_WEIGHTS = 1 << 24
"""Attention weights recomputed at a time: 64 MB. Longer inputs are taken in pieces."""


@dataclass(frozen=True)
class Attention:
    """Attention of one layer from the query tokens to the key tokens that are watched, mean over heads.

    `given` [B, T]: share of each query token's attention that falls on the keys, in [0, 1].
    `received` [B, T]: weight of each key token, mean over its sample's query tokens, in [0, 1].
    Both are float32 and 0 at all other tokens. A sample's `received` sums to the mean of its `given`.
    """

    given: Tensor
    received: Tensor


def entering_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state [B, T, D] in the arguments that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


@torch.inference_mode()
def forward(vlm: Vlm, batch: Batch) -> None:
    """One forward pass for those who watch it. Logits are made for one position only."""
    one = torch.zeros_like(batch.image_mask)
    one[0, -1] = True
    with vlm.head_at(one):
        vlm.model(**batch.inputs, use_cache=False)


@contextmanager
def watch_layers(vlm: Vlm, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within it, every decoder layer that runs calls `see(layer, entering, leaving)`.

    Both are hidden states [B, T, D]; those that leave the last layer come before the final norm.
    """

    def call(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(layer, entering_state(args, kwargs), output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer, module in enumerate(vlm.layers):
            hooks.enter_context(module.register_forward_hook(partial(call, layer), with_kwargs=True))
        yield


@contextmanager
def watch_attention(
    vlm: Vlm, see: Callable[[int, Attention], None], *, queries: Tensor, keys: Tensor
) -> Iterator[None]:
    """Within it, every self-attention of a decoder layer calls `see(layer, attention)`.

    `queries` and `keys` [B, T] are true at the tokens to watch. Eager attention makes its maps anyway, and they are
    read off. Any other implementation makes none: the rows of the query tokens are computed once more, from the
    queries, keys and mask that it was given. Layers without self-attention (cross-attention, linear attention) stay
    silent.

    Raises:
        UserError: an attention implementation whose mask cannot be read.
    """
    config = vlm.model.config.get_text_config(decoder=True)
    name = config._attn_implementation
    layer_of = {part: layer for layer, module in enumerate(vlm.layers) for part in module.modules() if part != module}
    tokens = _Tokens.of(queries, keys, num_heads=config.num_attention_heads)

    def report(module: nn.Module, rows_of: Rows) -> None:
        see(layer_of[module], tokens.attention(rows_of))

    with _maps_made(layer_of, report) if name == "eager" else _rows_recomputed(name, layer_of, report):
        yield


Rows = Callable[[Tensor], Tensor]  # from row numbers [B, R] to attention weights [B, H, R, T]


@dataclass(frozen=True)
class _Tokens:
    """The tokens watched. `pieces` are the numbers of the query tokens [B, R], few enough at a time."""

    queries: Tensor
    keys: Tensor
    pieces: tuple[Tensor, ...]

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, *, num_heads: int) -> _Tokens:
        if not keys.any():  # nothing to see in any layer
            return cls(queries, keys, ())
        # Query tokens first; what fills up a sample with fewer of them than its neighbours is left out again below.
        order = queries.int().argsort(dim=1, descending=True, stable=True)[:, : int(queries.sum(dim=1).max())]
        return cls(queries, keys, order.split(max(1, MAX_WEIGHTS // (num_heads * queries.numel())), dim=1))

    def attention(self, rows_of: Rows) -> Attention:
        given = torch.zeros_like(self.queries, dtype=torch.float32)
        received = torch.zeros_like(given)
        for rows in self.pieces:
            weights = rows_of(rows).mean(dim=1, dtype=torch.float32) * self.keys[:, None]  # B R T
            weights = weights.where(self.queries.gather(1, rows)[:, :, None], 0)
            given.scatter_(1, rows, weights.sum(dim=2))
            received += weights.sum(dim=1)
        return Attention(given, received / self.queries.sum(dim=1, keepdim=True).clamp(min=1))


@contextmanager
def _maps_made(modules: Iterable[nn.Module], report: Callable[[nn.Module, Rows], None]) -> Iterator[None]:
    def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        # Routers of experts give out pairs, too; maps of cross-attention are not square.
        if isinstance(maps, Tensor) and maps.dim() == 4 and maps.shape[2] == maps.shape[3]:
            report(module, partial(_picked, maps))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(call))
        yield


@contextmanager
def _rows_recomputed(
    name: str, modules: Container[nn.Module], report: Callable[[nn.Module, Rows], None]
) -> Iterator[None]:
    own = ALL_ATTENTION_FUNCTIONS.get(name)
    if own is None or "flex" in name or name.startswith("paged"):
        raise UserError(f"attention cannot be watched in the {name} implementation: load the model with sdpa or eager")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if module in modules and key.shape[2] == query.shape[2]:  # else cross-attention
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            report(module, partial(attention_rows, query, key, mask=attention_mask, causal=causal, **_ours(options)))
        return own(module, query, key, value, attention_mask, **options)

    # In the place of the implementation, not beside it: the model's config, and all that looks at it, stay as they are.
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not own:  # a local function stood in front of the library's
            ALL_ATTENTION_FUNCTIONS[name] = own


def _ours(options: dict[str, Any]) -> dict[str, Any]:
    """What of an attention call's options shapes its weights, by our names."""
    names = {"scaling": "scaling", "softcap": "softcap", "s_aux": "sinks", "sliding_window": "window"}
    return {ours: options[theirs] for theirs, ours in names.items() if theirs in options}


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention weights of some query rows, softmax(q k^T scaling + mask), in float32 [B, H, R, T].

    `query` [B, H, T, d] and `key` [B, G, T, d] after rotation, H a multiple of G (grouped queries); `rows` [B, R] the
    numbers of the rows. `mask` is [B or 1, H or 1, T, T], boolean or to be added, and then says all, or [B, T], true
    at tokens that are no padding, or None; beside the last two, `causal` and the sliding `window` count. Weights
    are capped by tanh before masking (`softcap`); `sinks` [H] take their share of the attention and are left out, so
    that rows then sum to less than 1.
    """
    groups, num_rows = key.shape[1], rows.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = _picked(query, rows).to(torch.float32, memory_format=torch.contiguous_format).mul_(scale)  # a copy already
    packed = own.unflatten(1, (groups, -1)).flatten(2, 3)  # B G H/G*R d
    logits = packed @ key.float().transpose(2, 3)  # B G H/G*R T
    logits = logits.unflatten(2, (-1, num_rows)).flatten(1, 2)  # B H R T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = _masked(logits, rows, mask=mask, causal=causal, window=window)
    if sinks is None:
        return logits.softmax(dim=-1)
    column = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]


def _masked(logits: Tensor, rows: Tensor, *, mask: Tensor | None, causal: bool, window: int | None) -> Tensor:
    lowest = torch.finfo(logits.dtype).min  # not infinity: a row with nothing to look at stays free of NaN
    if mask is not None and mask.dim() == 4:
        own = _picked(mask, rows)
        return logits.masked_fill_(~own, lowest) if own.dtype == torch.bool else (logits + own).clamp(min=lowest)
    distance = rows[:, None, :, None] - torch.arange(logits.shape[-1], device=rows.device)  # B 1 R T
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen &= distance < window
    if mask is not None:
        seen &= mask.bool()[:, None, None, :]
    return logits.masked_fill_(~seen, lowest)


def _picked(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, R] of a tensor [B or 1, H, T, X]: [B, H, R, X]."""
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    return tensor.expand(len(rows), -1, -1, -1).transpose(1, 2)[samples, rows].transpose(1, 2)

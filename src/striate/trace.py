"""Hooks on the decoder layers during a forward pass: their input and output hidden states, and their attention.

The caller's function gets the tensors while the layer runs and reduces them right there. Nothing is stored, so memory
grows neither with the number of layers nor with the number of examples. The outputs of the model do not change, and
the hooks are removed at the end, also after an error.
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
from striate.routing import running_tokens
from striate.vlm import Vlm
from striate.vlm.modes import hidden_of, layer_input

MAX_WEIGHTS = 1 << 24
"""Number of attention weights recomputed at a time, 64 MB; longer inputs are processed in chunks."""


@dataclass(frozen=True)
class Attention:
    """Attention of one layer from selected query tokens to selected key tokens, mean over heads.

    `by_query` [B, T]: share of each query token's attention on the keys, in [0, 1].
    `by_key` [B, T]: attention weight of each key token, mean over the query tokens of its example, in [0, 1].
    Both are float32, and 0 at all other tokens. Per example, `by_key` sums to the mean of `by_query`.
    """

    by_query: Tensor
    by_key: Tensor


def with_layer_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a decoder layer with another hidden state [B, T, D]."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@torch.inference_mode()
def forward(vlm: Vlm, batch: Batch) -> None:
    """One forward pass, for its hooks. Logits are computed at one position only."""
    one = torch.zeros_like(batch.image_mask)
    one[0, -1] = True
    with vlm.head_at(one):
        vlm.model(**batch.inputs, use_cache=False)


@contextmanager
def watch_layers(vlm: Vlm, on_layer: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which every decoder layer calls `on_layer(layer, input, output)` when it runs.

    Both are hidden states [B, T, D]; the output of the last layer is taken before the final norm.
    """

    def call(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        on_layer(layer, layer_input(args, kwargs), hidden_of(output))

    with ExitStack() as hooks:
        for layer, module in enumerate(vlm.layers):
            hooks.enter_context(module.register_forward_hook(partial(call, layer), with_kwargs=True))
        yield


@contextmanager
def watch_attention(
    vlm: Vlm, on_attention: Callable[[int, Attention], None], *, queries: Tensor, keys: Tensor
) -> Iterator[None]:
    """Context in which every self-attention of a decoder layer calls `on_attention(layer, attention)`.

    `queries` and `keys` [B, T] are true at the tokens to measure. Eager attention returns its maps, which are used as
    they are. Other implementations return none: the rows of the query tokens are recomputed from the queries, keys and
    mask of the call. Layers without self-attention (cross-attention, linear attention) make no call.

    Raises:
        UserError: the mask of the attention implementation cannot be read.
    """
    heads = vlm.model.config.get_text_config(decoder=True).num_attention_heads
    tokens = _Tokens.of(queries, keys, num_heads=heads)
    with watch_rows(vlm, lambda layer, rows_of: on_attention(layer, tokens.attention(rows_of))):
        yield


Rows = Callable[[Tensor], Tensor]  # from row numbers [B, R] to attention weights [B, H, R, T]
Report = Callable[[nn.Module, Rows, tuple[int, int]], None]


@contextmanager
def watch_rows(vlm: Vlm, on_rows: Callable[[int, Rows], None]) -> Iterator[None]:
    """Context in which every self-attention of a decoder layer calls `on_rows(layer, rows_of)`.

    `rows_of(rows)`, to be called at once, gives the attention weights [B, H, R, T] of the query tokens `rows` [B, R].
    See `watch_attention`.

    Raises:
        UserError: the mask of the attention implementation cannot be read.
    """
    name = vlm.model.config.get_text_config(decoder=True)._attn_implementation
    layer_of = {part: layer for layer, module in enumerate(vlm.layers) for part in module.modules() if part != module}

    def report(module: nn.Module, rows_of: Rows, shape: tuple[int, int]) -> None:
        """`shape`: numbers of queries and of keys."""
        routed = running_tokens(vlm.model)
        if shape[0] == shape[1]:
            on_rows(layer_of[module], rows_of)
        elif routed and shape == (routed.count, routed.length):  # image tokens do not attend in this layer
            on_rows(layer_of[module], lambda rows: rows_of(routed.place(rows)))
        # else cross-attention

    with _hook_maps(layer_of, report) if name == "eager" else _recompute_rows(name, layer_of, report):
        yield


@dataclass(frozen=True)
class _Tokens:
    """The tokens to measure. `chunks` are the positions of the query tokens [B, R] that are processed at a time."""

    queries: Tensor
    keys: Tensor
    chunks: tuple[Tensor, ...]

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, *, num_heads: int) -> _Tokens:
        if not keys.any():  # nothing to measure in any layer
            return cls(queries, keys, ())
        # Query tokens come first; `attention` masks out the filler of examples with fewer of them.
        order = queries.int().argsort(dim=1, descending=True, stable=True)[:, : int(queries.sum(dim=1).max())]
        return cls(queries, keys, order.split(max(1, MAX_WEIGHTS // (num_heads * queries.numel())), dim=1))

    def attention(self, rows_of: Rows) -> Attention:
        by_query = torch.zeros_like(self.queries, dtype=torch.float32)
        by_key = torch.zeros_like(by_query)
        for rows in self.chunks:
            weights = rows_of(rows).mean(dim=1, dtype=torch.float32) * self.keys[:, None]  # B R T
            weights = weights.where(self.queries.gather(1, rows)[:, :, None], 0)
            by_query.scatter_(1, rows, weights.sum(dim=2))
            by_key += weights.sum(dim=1)
        return Attention(by_query, by_key / self.queries.sum(dim=1, keepdim=True).clamp(min=1))


@contextmanager
def _hook_maps(modules: Iterable[nn.Module], report: Report) -> Iterator[None]:
    def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(maps, Tensor) and maps.dim() == 4:  # routers of experts return tuples, too
            report(module, partial(_select_rows, maps), (maps.shape[2], maps.shape[3]))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(call))
        yield


@contextmanager
def _recompute_rows(name: str, modules: Container[nn.Module], report: Report) -> Iterator[None]:
    own = ALL_ATTENTION_FUNCTIONS.get(name)
    if own is None or "flex" in name or name.startswith("paged"):
        raise UserError(
            f"attention weights cannot be read in the {name} implementation: load the model with sdpa or eager"
        )

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        if module in modules:
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            report(
                module,
                partial(attention_rows, query, key, mask=attention_mask, causal=causal, **_weight_options(options)),
                (query.shape[2], key.shape[2]),
            )
        return own(module, query, key, value, attention_mask, **options)

    # Replaces the implementation under its own name, so that the model's config does not change.
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not own:  # it was a local override of the library's function
            ALL_ATTENTION_FUNCTIONS[name] = own


def _weight_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an attention call that affect its weights, by the argument names of `attention_rows`."""
    names = {"scaling": "scaling", "softcap": "softcap", "s_aux": "sinks", "sliding_window": "window"}
    return {argument: options[name] for name, argument in names.items() if name in options}


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
    """Attention weights of selected query rows, softmax(q k^T scaling + mask), in float32 [B, H, R, T].

    `query` [B, H, T, d] and `key` [B, G, T, d] are after rotary embedding, H is a multiple of G (grouped queries);
    `rows` [B, R] are the row indices. `mask` is [B or 1, H or 1, T, T], boolean or additive; or a padding mask [B, T],
    false at padding; or None. `causal` and the sliding `window` apply only to the last two. Logits are capped by tanh
    before masking (`softcap`); the columns of the `sinks` [H] are dropped, so that rows then sum to less than 1.
    """
    groups, num_rows = key.shape[1], rows.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = (
        _select_rows(query, rows).to(torch.float32, memory_format=torch.contiguous_format).mul_(scale)
    )  # a copy already
    packed = own.unflatten(1, (groups, -1)).flatten(2, 3)  # B G H/G*R d
    logits = packed @ key.float().transpose(2, 3)  # B G H/G*R T
    logits = logits.unflatten(2, (-1, num_rows)).flatten(1, 2)  # B H R T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = _mask(logits, rows, mask=mask, causal=causal, window=window)
    if sinks is None:
        return logits.softmax(dim=-1)
    column = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]


def _mask(logits: Tensor, rows: Tensor, *, mask: Tensor | None, causal: bool, window: int | None) -> Tensor:
    lowest = torch.finfo(logits.dtype).min  # not -inf: a fully masked row would be NaN
    if mask is not None and mask.dim() == 4:
        own = _select_rows(mask, rows)
        return logits.masked_fill_(~own, lowest) if own.dtype == torch.bool else (logits + own).clamp(min=lowest)
    distance = rows[:, None, :, None] - torch.arange(logits.shape[-1], device=rows.device)  # B 1 R T
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible &= distance < window
    if mask is not None:
        visible &= mask.bool()[:, None, None, :]
    return logits.masked_fill_(~visible, lowest)


def _select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Select rows [B, R] of a tensor [B or 1, H, T, X]: [B, H, R, X]."""
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    return tensor.expand(len(rows), -1, -1, -1).transpose(1, 2)[samples, rows].transpose(1, 2)

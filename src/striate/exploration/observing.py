"""One forward pass looked at: attention of text tokens on image tokens, block influence, logit lens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from striate.errors import UserError
from striate.exploration.asking import Asked
from striate.exploration.layout import View, num_cells, pool
from striate.scores.replay import Replay
from striate.scores.states import block_influence, cosine, token_kinds
from striate.trace import Rows, watch_layers, watch_rows
from striate.vlm import Vlm

MAX_TOKENS = 96
"""Text tokens that are looked at: the last ones, which are those of the question and of the answer."""
MAX_HEAD_VALUES = 1 << 25
"""Attention weights of single heads per sample, 64 MB; more are averaged over neighboring patches."""
MAX_LENS_TOKENS = 2048
"""Image tokens with a logit lens: the first ones."""
MAX_LOGITS = 1 << 25
"""Logits at a time, 128 MB."""
WORDS = 3
"""Nearest words of the logit lens."""
ROWS = 16
"""Query tokens whose attention is computed at a time."""


@dataclass
class Attention:
    """Attention of Q text tokens on P image tokens in every layer; NaN in layers without self-attention.

    `mean` [L, Q, P] float32 is the mean over heads; `heads` [L, H, Q, C] float16 are the heads, of cells of `factor` x
    `factor` tokens (`layout.pool`). All are in [0, 1].
    """

    mean: Tensor
    heads: Tensor
    factor: int


@dataclass(frozen=True)
class Lens:
    """The nearest words after each layer: token ids [L, N, 3] and their probabilities in [0, 1].

    N are the first `num_image` image tokens, then the Q text tokens.
    """

    words: Tensor
    probabilities: Tensor
    num_image: int


@dataclass
class Observation:
    """What one pass shows: `tokens` [Q] are the positions of the text tokens that are looked at.

    `influence` [L] of "image" and "text" tokens is in [0, 2], NaN without such tokens. `attention` is None where it
    cannot be observed, and `notes` say why.
    """

    tokens: Tensor
    influence: dict[str, Tensor]
    attention: Attention | None
    replay: Replay
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def observe(vlm: Vlm, asked: Asked, views: Sequence[View]) -> Observation:
    """Run one forward pass over a question with its answer, and watch it."""
    batch, depth = asked.batch, vlm.depth
    kinds = token_kinds(batch)
    tokens = kinds["text"][0].nonzero()[:, 0][-MAX_TOKENS:]
    notes = [] if int(kinds["text"].sum()) <= MAX_TOKENS else [f"the last {MAX_TOKENS} text tokens are looked at"]
    cosines = torch.ones(depth, *batch.labels.shape, dtype=torch.float64, device=batch.labels.device)
    attention = _blank(vlm, tokens, views, int(batch.image_mask.sum())) if views else None
    seen: set[tuple[str, int]] = set()  # `Replay` also tries whether it can resume: only the first pass counts

    def on_layer(layer: int, entering: Tensor, leaving: Tensor) -> None:
        if ("states", layer) not in seen:
            seen.add(("states", layer))
            cosines[layer] = cosine(entering, leaving)

    def on_rows(layer: int, rows_of: Rows) -> None:
        if attention and ("attention", layer) not in seen:
            seen.add(("attention", layer))
            weights = torch.cat([rows_of(part)[0][..., batch.image_mask[0]] for part in tokens[None].split(ROWS, 1)], 1)
            attention.mean[layer] = weights.float().mean(dim=0)
            if len(weights) == attention.heads.shape[1]:
                attention.heads[layer] = pool(weights.float(), views, attention.factor)

    with ExitStack() as watch:
        watch.enter_context(watch_layers(vlm, on_layer))
        if attention:
            try:
                watch.enter_context(watch_rows(vlm, on_rows))
            except UserError as error:
                attention, notes = None, [*notes, str(error)]
        replay = Replay(vlm, batch, asked.targets)
    asked.targets.check(asked.targets.sums(asked.targets.nll(replay.logits)))
    if attention and attention.mean.isnan().all():
        kind = vlm.model.config.model_type
        attention, notes = None, [*notes, f"{kind} models do not return attention weights to transformers"]
    influence = {kind: block_influence(cosines, kinds[kind])[:, 0].cpu() for kind in ("image", "text")}
    return Observation(tokens, influence, attention, replay, notes)


@torch.no_grad()
def lens(asked: Asked, observation: Observation, *, on_layer: Callable[[], None] = lambda: None) -> Lens:
    """The nearest words of image and text tokens after each layer; `on_layer` is called after each."""
    replay = observation.replay
    image = asked.batch.image_mask[0].nonzero()[:, 0][:MAX_LENS_TOKENS]
    positions = torch.cat([image, observation.tokens])
    order = positions.argsort()  # the model gives logits in the order of the tokens
    masks = []
    for part in positions[order].split(max(1, MAX_LOGITS // replay.logits.shape[1])):
        mask = torch.zeros_like(asked.batch.image_mask)
        mask[0, part] = True
        masks.append(mask)
    words, probabilities = [], []
    for layer in range(replay.vlm.depth):
        best = [replay.logits_after(layer, mask).float().softmax(dim=-1).topk(WORDS) for mask in masks]
        words.append(torch.cat([one.indices for one in best])[order.argsort()].cpu())
        probabilities.append(torch.cat([one.values for one in best])[order.argsort()].cpu())
        on_layer()
    return Lens(torch.stack(words), torch.stack(probabilities), len(image))


def _blank(vlm: Vlm, tokens: Tensor, views: Sequence[View], num_image: int) -> Attention:
    """Attention without values yet, with heads as fine as there is room for."""
    depth, heads = vlm.depth, vlm.model.config.get_text_config(decoder=True).num_attention_heads
    factor, maps = 1, depth * heads * len(tokens)
    while maps * num_cells(views, factor) > MAX_HEAD_VALUES and num_cells(views, factor) > len(views):
        factor += 1
    shape = (depth, heads, len(tokens), num_cells(views, factor))
    mean = torch.full((depth, len(tokens), num_image), math.nan)
    return Attention(mean, torch.full(shape, math.nan, dtype=torch.float16), factor)

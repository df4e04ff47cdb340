"""Prompts that are prefilled once for all answers that follow them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from striate.data import IGNORED, TOKEN_KEYS, Example, collate
from striate.vlm import Vlm

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache layers with keys and values of tokens only, so that rows can be copied."""


@dataclass(frozen=True)
class Prefix:
    """B prefilled prompts, padded on the left to P tokens.

    `logits` [B, V] predict the next token of each. `mask` [B, P] is false at padding. `positions` [..., B, 1] are the
    positions of the last tokens, with the leading dimensions of the model's position ids.
    """

    cache: DynamicCache
    logits: Tensor
    mask: Tensor
    positions: Tensor


def shared_length(answers: Sequence[Example]) -> int:
    """Number of tokens before the last answer if all `answers` have the same prompt and images, else 0."""
    first, starts = answers[0], {_start(one) for one in answers}
    start = max(starts)
    if len(starts) > 1 or any(
        one.image_mask[start:].any() or one.inputs.keys() != first.inputs.keys() for one in answers
    ):
        return 0
    same = all(
        torch.equal(*(one[:start] if key in TOKEN_KEYS else one for one in (value, other.inputs[key])))
        for other in answers[1:]
        for key, value in first.inputs.items()
    )
    return start if same else 0


def split(answer: Example, start: int) -> tuple[Example, Example]:
    """The prompt with its images, and the answer: the labeled tokens from `start` on."""
    end = int((answer.labels != IGNORED).nonzero().max()) + 1

    def part(tokens: slice, inputs: dict[str, Tensor]) -> Example:
        return replace(answer, inputs=inputs, labels=answer.labels[tokens], image_mask=answer.image_mask[tokens])

    head, tail = slice(start), slice(start, end)
    prompt = {key: value[head] if key in TOKEN_KEYS else value for key, value in answer.inputs.items()}
    own = {key: answer.inputs[key][tail] for key in ("input_ids", "attention_mask")}
    return part(head, prompt), part(tail, own)


@torch.inference_mode()
def prefill(vlm: Vlm, prompts: Sequence[Example]) -> Prefix | None:
    """Prefill prompts as `generate` does; None for a model whose cache has more than keys and values of tokens.

    Such are state-space and convolution layers, cross-attention to images, and layers that share a cache.
    """
    if not _is_copyable(DynamicCache(config=vlm.model.config.get_text_config(decoder=True))):
        return None
    batch = collate(prompts, pad_id=vlm.pad_token_id, side="left").to(vlm.device, vlm.model.dtype)
    position_ids: list[Tensor | None] = []

    def record(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        position_ids.append(inputs.get("position_ids"))

    handle = vlm.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        output = vlm.model.generate(  # type: ignore[operator]
            **batch.inputs,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=vlm.pad_token_id,
            cache_implementation="dynamic",  # overrides the checkpoint's: rows of other caches cannot be copied
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        handle.remove()
    cache, positions, mask = output.past_key_values, position_ids[0], batch.inputs["attention_mask"].bool()
    lengths = {cache.get_seq_length(layer) for layer in range(len(cache.layers))}
    if positions is None or not _is_copyable(cache) or lengths != {mask.shape[1]}:
        return None
    return Prefix(cache, output.logits[0], mask, positions[..., -1:])


@torch.inference_mode()
def log_probs(vlm: Vlm, prefix: Prefix, rows: Sequence[int], answers: Sequence[Example]) -> list[Tensor]:
    """Log-probabilities of the tokens of each answer after the prompt of its row, in nats."""
    batch = collate(answers, pad_id=vlm.pad_token_id).to(vlm.device, vlm.model.dtype)
    tokens, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()  # R L
    chosen = torch.tensor(rows, device=vlm.device)
    cache = copy.copy(prefix.cache)  # selecting rows replaces the tensors of a layer; the prefix keeps its own
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.batch_select_indices(chosen)
    steps = torch.arange(1, tokens.shape[1] + 1, device=vlm.device)
    positions, following = batch.targets()
    with vlm.head_at(positions):
        logits = vlm.model(
            input_ids=tokens,
            attention_mask=torch.cat([prefix.mask[chosen], mask], dim=1).long(),
            position_ids=prefix.positions.index_select(-2, chosen) + steps,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]  # N V
    first = -F.cross_entropy(prefix.logits[chosen].float(), tokens[:, 0], reduction="none")  # R
    rest = -F.cross_entropy(logits.float(), following, reduction="none").double()  # N
    parts = rest.split(positions.sum(dim=1).tolist())
    return [torch.cat([one.double()[None], part]) for one, part in zip(first, parts, strict=True)]


def _is_copyable(cache: DynamicCache) -> bool:
    return bool(cache.layers) and all(type(layer) in PLAIN for layer in cache.layers)


def _start(answer: Example) -> int:
    """Index of the first token of the last answer."""
    ignored = answer.labels == IGNORED
    last = int((~ignored).nonzero().max())
    before = ignored[:last].nonzero()
    return int(before.max()) + 1 if len(before) else 0

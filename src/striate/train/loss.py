"""The loss of the answer tokens: logits are computed at answer positions only, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from striate.data import Batch
from striate.train.packing import ModelInputs, using
from striate.vlm import Vlm

# Bytes of float32 logits per chunk: large enough for GEMMs at full speed, small compared with a layer's weights.
CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class FastPaths:
    """Faster ways to the same loss. `packing`: records in one row, without padding; `chunking`: logits one chunk at a
    time, which needs the whole model in one process."""

    packing: bool = False
    chunking: bool = False


NONE = FastPaths()


def answer_losses(vlm: Vlm, model: nn.Module, batch: Batch, *, fast_paths: FastPaths = NONE) -> Tensor:
    """Negative log-likelihood of each of the batch's N labeled tokens [N], in nats, row after row.

    `model` is called (the plain model, or a wrapper of it for LoRA or several devices), `vlm` knows its parts.
    """
    targets = batch.targets()[1].to(vlm.device, non_blocking=True)
    # Made where the batch is, so that a batch on the CPU does not wait for a GPU.
    prepared = (ModelInputs.packed(vlm, batch) if fast_paths.packing else ModelInputs.padded(batch)).to(vlm.device)
    if not fast_paths.chunking:
        with vlm.head_at(prepared.positions), using(prepared):
            logits = model(**prepared.inputs, use_cache=False).logits[0].float()  # N V
        return F.cross_entropy(logits, targets, reduction="none")
    with vlm.defer_head(prepared.positions) as tail, using(prepared):
        model(**prepared.inputs, use_cache=False)

    def chunk_losses(states: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(tail.logits(states).float(), targets[rows], reduction="none")

    rows = max(1, CHUNK_BYTES // (4 * vlm.model.config.get_text_config(decoder=True).vocab_size))
    return _ChunkedLosses.apply(tail.states, chunk_losses, rows)


def answer_nll(vlm: Vlm, model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each of the batch's N labeled tokens [N], in nats, on the padded batch."""
    return answer_losses(vlm, model, batch)


class _ChunkedLosses(torch.autograd.Function):
    """Losses [N] of states [N, D] and their gradient, both computed in the forward pass, one chunk of rows at a time.

    A row's loss depends on its own states alone, and head and tail are frozen: each chunk's gradient is computed as
    soon as its logits exist, and the logits are freed.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, chunk_losses: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, len(states), rows):
            span = slice(start, start + rows)
            chunk = states[span].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                loss = chunk_losses(chunk, span)
                if ctx.needs_input_grad[0]:
                    gradients += torch.autograd.grad(loss.sum(), chunk)
            losses.append(loss.detach())
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(states))
        return torch.cat(losses) if losses else states.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * upstream[:, None]).to(gradients.dtype), None, None

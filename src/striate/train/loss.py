"""The loss of the answers' tokens: logits exist only where there is an answer, and only a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from striate.data import Batch
from striate.train.packing import Row, row_of
from striate.vlm import Tail, Vlm

# Of logits in float32 at a time. Large enough for matrix products to run at full speed, small beside a layer's weights.
CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode whose answers are learnt as well, and its `share` of the loss, in (0, 1]."""

    vlm: Vlm
    share: float


@dataclass(frozen=True)
class Shortcuts:
    """Ways to the same loss with less work. `packing`: records in one row, without padding; `chunking`: logits a chunk
    at a time, which asks for the model's own forward pass in one process."""

    packing: bool = False
    chunking: bool = False


NONE = Shortcuts()


def answer_losses(
    vlm: Vlm, model: nn.Module, batch: Batch, *, shortcuts: Shortcuts = NONE, teacher: Teacher | None = None
) -> Tensor:
    """Loss of each of the batch's N labelled tokens [N], in nats, row after row; with a teacher it is `distilled`.

    `model` is what runs (the plain model, or a wrapper of it for LoRA or many devices), `vlm` knows its parts.
    """
    targets = batch.targets()[1]
    if not shortcuts.chunking:
        logits = answer_logits(vlm, model, batch, packing=shortcuts.packing)
        taught = None
        if teacher:
            with torch.no_grad():
                taught = answer_logits(teacher.vlm, teacher.vlm.model, batch, packing=shortcuts.packing)
        return _losses(logits, targets, taught, teacher)
    tail = _answer_tail(vlm, model, batch, packing=shortcuts.packing)
    taught_tail = None
    if teacher:
        with torch.no_grad():
            taught_tail = _answer_tail(teacher.vlm, teacher.vlm.model, batch, packing=shortcuts.packing)

    def of_chunk(states: Tensor, rows: slice) -> Tensor:
        taught = None
        if taught_tail:
            with torch.no_grad():
                taught = taught_tail.logits(taught_tail.states[rows]).float()
        return _losses(tail.logits(states).float(), targets[rows], taught, teacher)

    rows = max(1, CHUNK_BYTES // (4 * vlm.model.config.get_text_config(decoder=True).vocab_size))
    return _RowLosses.apply(tail.states, of_chunk, rows)


def answer_nll(vlm: Vlm, model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each of the batch's N labelled tokens [N], in nats, all rows padded."""
    return answer_losses(vlm, model, batch)


def answer_logits(vlm: Vlm, model: nn.Module, batch: Batch, *, packing: bool = False) -> Tensor:
    """Logits, in float32, from which each of the batch's N labelled tokens is predicted [N, V], row after row.

    Logits exist at labelled positions only.
    """
    row = _row(vlm, batch, packing)
    with vlm.head_at(row.positions), row_of(vlm, row):
        logits = model(**row.inputs, use_cache=False).logits[0]  # N V
    return logits.float()


def distilled(losses: Tensor, logits: Tensor, taught: Tensor, *, share: float) -> Tensor:
    """(1 - share) * negative log-likelihood + share * KL(teacher || student) of each token [N], in nats.

    `losses` [N] are the negative log-likelihoods, `logits` and `taught` [N, V] the student's and the teacher's.

    Hinton et al. 2015, "Distilling the knowledge in a neural network" (arXiv 1503.02531), at temperature 1.
    """
    student, teacher = logits.log_softmax(dim=-1), taught.log_softmax(dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return (1 - share) * losses + share * divergence


def _losses(logits: Tensor, targets: Tensor, taught: Tensor | None, teacher: Teacher | None) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction="none")
    if teacher is None or taught is None:
        return losses
    return distilled(losses, logits, taught, share=teacher.share)


def _row(vlm: Vlm, batch: Batch, packing: bool) -> Row:
    return Row.packed(vlm, batch) if packing else Row.padded(batch)


def _answer_tail(vlm: Vlm, model: nn.Module, batch: Batch, *, packing: bool) -> Tail:
    """The states from which the batch's labelled tokens are predicted, and what makes logits of them."""
    row = _row(vlm, batch, packing)
    with vlm.short_of_head(row.positions) as tail, row_of(vlm, row):
        model(**row.inputs, use_cache=False)
    return tail


class _RowLosses(torch.autograd.Function):
    """Losses [N] of states [N, D], and their gradient, both made in the forward pass, some rows at a time.

    A row's loss depends on its own states alone, and head and tail do not train: so the gradient of each row can be
    had as soon as its logits are there, which then can go.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, len(states), rows):
            place = slice(start, start + rows)
            chunk = states[place].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                loss = loss_of(chunk, place)
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

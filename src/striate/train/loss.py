"""The loss of the answer tokens: logits at answer positions only, a chunk of rows at a time; faster ways, verified."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from striate.data import IGNORED, Batch
from striate.errors import UserError, first_line
from striate.train.packing import ModelInputs, record_by_record, using
from striate.vlm import Vlm
from striate.vlm.modes import change_layers, eval_mode

# Bytes of float32 logits per chunk: large enough for GEMMs at full speed, small compared with a layer's weights.
CHUNK_BYTES = 2**27
# Other kernels round differently. A fast path may differ from the plain path by this many times the effect of rounding
# alone, or by this share of the loss; a record at wrong positions or with a wrong mask differs by more.
ROUNDINGS, SHARE = 3, 1e-4


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


def verify_fast_paths(
    vlm: Vlm,
    probe: Batch,
    *,
    packing: Literal["auto", "on", "off"],
    sharded: bool,
    autocast: Callable[[], AbstractContextManager[None]],
    network: nn.Module | None = None,
) -> tuple[FastPaths, tuple[str, ...]]:
    """The fast paths that give the losses of the plain path on two records, and one line for each that does not.

    Args:
        vlm: the model.
        probe: two records.
        packing: auto, on (an error where it is not supported) or off.
        sharded: no process holds the whole model, so only the model's own forward pass can run.
        autocast: the precision of training.
        network: what is called, a wrapper of the model; default: the model.

    Raises:
        UserError: packing is on and the model does not support it.
    """
    found, notes = NONE, []
    with ExitStack() as stack:
        for context in (torch.no_grad(), autocast(), eval_mode(vlm.model)):
            stack.enter_context(context)
        trial = Trial.of(vlm, network or vlm.model, probe)
        for name in ("chunking", "packing"):
            if (name == "chunking" and sharded) or (name == "packing" and packing == "off"):
                continue
            candidate = replace(found, **{name: True})
            if reason := trial.refusal(candidate):
                notes.append(f"no {name} for {vlm.model.config.model_type}: {reason}")
            else:
                found = candidate
    if packing == "on" and not found.packing:
        raise UserError(f"{notes[-1]}; --packing auto uses padded batches instead")
    return found, tuple(notes)


@dataclass(frozen=True)
class Trial:
    """Two records as a batch, their losses on the plain path [N], and how far a fast path may differ, in nats."""

    vlm: Vlm
    network: nn.Module
    batch: Batch
    plain: Tensor
    limit: float

    @classmethod
    def of(cls, vlm: Vlm, network: nn.Module, batch: Batch) -> Trial:
        """Run the plain path, and once more with random rounding errors on every layer's output."""
        plain = answer_losses(vlm, network, batch)
        with _round_anew(vlm, torch.is_autocast_enabled(vlm.device.type)):
            noise = float((answer_losses(vlm, network, batch) - plain).abs().max())
        return cls(vlm, network, batch, plain, max(ROUNDINGS * noise, SHARE * max(1.0, float(plain.abs().max()))))

    def refusal(self, fast_paths: FastPaths) -> str:
        """Why the model does not support these fast paths; empty where it does."""
        try:
            if not fast_paths.packing:
                return self._difference(answer_losses(self.vlm, self.network, self.batch, fast_paths=fast_paths))
            with record_by_record(self.vlm):
                packed = answer_losses(self.vlm, self.network, self.batch, fast_paths=fast_paths)
                changed = _change_first_answer(self.batch)
                repacked = answer_losses(self.vlm, self.network, changed, fast_paths=fast_paths)
        except torch.OutOfMemoryError:  # says nothing about the path, which needs less than the plain one
            raise
        except Exception as error:  # families fail in many ways
            return first_line(error)
        first = int(self.batch.targets()[0][0].sum())
        # Of another first record, other tokens reach an expert: their GEMM has another size and may round differently.
        limit = self.limit if _has_experts(self.vlm) else 0.0
        if float((packed[first:] - repacked[first:]).abs().max()) > limit:
            return "a record sees the one before it"
        return self._difference(packed)

    def _difference(self, losses: Tensor) -> str:
        off = float((losses - self.plain).abs().max())
        return "" if off <= self.limit else f"losses are off by {off:.2g}"


def _has_experts(vlm: Vlm) -> bool:
    return any(name.endswith("experts") for name, _ in vlm.layers.named_modules())


def _round_anew(vlm: Vlm, in_bfloat16: bool) -> AbstractContextManager[None]:
    """Perturb each decoder layer's output by up to half a unit in the last place of bfloat16 or float32."""
    half = torch.finfo(torch.bfloat16 if in_bfloat16 else torch.float32).eps / 2
    generator = torch.Generator(vlm.device).manual_seed(0)

    def round_anew(_: Tensor, states: Tensor) -> Tensor:
        noise = half * (2 * torch.rand(states.shape, generator=generator, device=states.device) - 1)
        return (states * (1 + noise)).to(states.dtype)

    return change_layers(vlm.layers, round_anew)


def _change_first_answer(probe: Batch) -> Batch:
    """The two records with other answer tokens in the first: losses of the second must not change."""
    tokens = probe.inputs["input_ids"].clone()
    answer = probe.labels[0] != IGNORED
    first = int(answer.nonzero()[0])
    tokens[0, answer] = tokens[0, first - 1]
    return replace(probe, inputs={**probe.inputs, "input_ids": tokens})

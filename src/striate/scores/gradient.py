"""Gradient norm of the answers' loss in each decoder layer, before any tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from striate.data import Batch
from striate.scores.likelihood import AnswerTokens
from striate.scores.table import Metric, Score
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

METRICS: dict[str, Metric] = {
    "gradient": Metric(
        "gradient",
        needs=("records",),
        range="0.. (nats per unit of weight)",
        source="root mean square, over a layer's parameters, of the gradient of a sample's mean answer loss",
    )
}

HALF_SCALES = (4096.0, 256.0, 16.0, 1.0)  # of the loss in float16; the first one fits unless a gradient is huge


class Gradient:
    """Root mean square gradient of the answer loss in each layer.

    For one sample and layer l with P parameters: ||dL/dw|| / sqrt(P), the root mean square over the layer's
    parameters, where L is the mean negative log-likelihood of the sample's answer tokens in nats. Unlike ||dL/dw||
    it does not grow with the layer's size, so layers of different size compare. Averaged over samples; each has a
    backward pass of its own, since gradients of several samples would cancel. A batch of B samples takes B backward
    passes, so nothing is lost with batches of one.

    One parameter's gradient is in memory at a time. `requires_grad` and existing gradients are restored. In float16,
    whose smallest value is 6e-8, the loss is scaled by a power of two, and its gradient back.
    """

    def __init__(self, vlm: Vlm, names: Sequence[str] = ("gradient",)) -> None:
        self.vlm, self.names = vlm, tuple(names)
        self.results: list[Tensor] = []  # [B, L] per batch

    def add(self, batch: Batch) -> None:
        """Measure the samples of a batch.

        Raises:
            UserError: a sample has no answer, or its loss is NaN or Inf.
        """
        if not len(batch):
            return
        batch = batch.to(self.vlm.device, self.vlm.model.dtype)
        answers = AnswerTokens.of(batch)
        with eval_mode(self.vlm.model), self._record_squares() as squares, torch.enable_grad():
            losses = answers.means(answers.nll(answers.logits(self.vlm, batch)))  # B
            answers.check(losses.detach())
            rows = []
            for row, loss in enumerate(losses):
                rows.append(self._squares_of(loss, squares, last=row + 1 == len(losses)))
        sizes = torch.tensor([sum(p.numel() for p in _weights(layer)) for layer in self.vlm.layers])
        self.results.append((torch.stack(rows) / sizes).sqrt())

    def _squares_of(self, loss: Tensor, squares: Squares, *, last: bool) -> Tensor:
        """The squared gradient of each layer [L]; in float16 with the largest scale at which nothing overflows."""
        scales = HALF_SCALES if self.vlm.model.dtype == torch.float16 else (1.0,)
        for scale in scales:
            (loss * scale).backward(retain_graph=not last or scale != scales[-1])
            found = squares.take()
            if found.isfinite().all():
                break
        return found / scale**2

    def scores(self, keep: Sequence[Tensor] | None = None) -> list[Score]:
        """The score over the samples measured so far, or over those that are true in `keep`, [B] per batch; none
        before the first batch."""
        if not self.results:
            return []
        rows = self.results if keep is None else [row[own] for row, own in zip(self.results, keep, strict=True)]
        return [Score.of_samples(METRICS[name], torch.cat(rows)) for name in self.names]

    @contextmanager
    def _record_squares(self) -> Iterator[Squares]:
        """Context in which backward passes add each layer's squared gradients."""
        squares = Squares(self.vlm.depth)
        owners: dict[nn.Parameter, list[int]] = {}  # several layers for a shared weight
        for index, layer in enumerate(self.vlm.layers):
            for parameter in _weights(layer):
                owners.setdefault(parameter, []).append(index)

        def add_square(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None
            squares.norms.append((owners[parameter], torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)))
            parameter.grad = None

        before = [(p, p.requires_grad, p.grad) for p in self.vlm.model.parameters()]
        handles = []
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(parameter in owners)
                parameter.grad = None
            handles += [parameter.register_post_accumulate_grad_hook(add_square) for parameter in owners]
            yield squares
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


@dataclass
class Squares:
    """Gradient norms of parameters, each with the layers it belongs to; they stay on the device until they are taken,
    since every number read from a GPU waits for it."""

    depth: int
    norms: list[tuple[list[int], Tensor]] = field(default_factory=list)

    def take(self) -> Tensor:
        """The sum of squares of each layer [L], in double precision; begins anew."""
        squares = torch.zeros(self.depth, dtype=torch.float64)
        norms = torch.stack([norm for _, norm in self.norms]).cpu().double().square() if self.norms else ()
        for (layers, _), square in zip(self.norms, norms, strict=True):
            squares[layers] += square
        self.norms.clear()
        return squares


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that can have a gradient; quantized ones cannot."""
    return [parameter for parameter in layer.parameters() if parameter.is_floating_point()]

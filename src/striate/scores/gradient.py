"""Gradient norm of the answers' loss in each decoder layer, before any tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


class Gradient:
    """Root mean square gradient of the answer loss in each layer.

    For one sample and layer l with P parameters: ||dL/dw|| / sqrt(P), the root mean square over the layer's
    parameters, where L is the mean negative log-likelihood of the sample's answer tokens in nats. Unlike ||dL/dw||
    it does not grow with the layer's size, so layers of different size compare. Averaged over samples; each has a
    backward pass of its own, since gradients of several samples would cancel. A batch of B samples takes B backward
    passes, so nothing is lost with batches of one.

    One parameter's gradient is in memory at a time. `requires_grad` and existing gradients are restored.
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
                squares.zero_()
                loss.backward(retain_graph=row + 1 < len(losses))
                rows.append(squares.clone())
        sizes = torch.tensor([sum(p.numel() for p in _weights(layer)) for layer in self.vlm.layers])
        self.results.append((torch.stack(rows) / sizes).sqrt())

    def scores(self) -> list[Score]:
        """The score over the samples measured so far; none before the first batch."""
        if not self.results:
            return []
        return [Score.of_samples(METRICS[name], torch.cat(self.results)) for name in self.names]

    @contextmanager
    def _record_squares(self) -> Iterator[Tensor]:
        """Context in which backward passes add each layer's squared gradients to the yielded tensor [L]."""
        squares = torch.zeros(self.vlm.depth, dtype=torch.float64)
        owners: dict[nn.Parameter, list[int]] = {}  # several layers for a shared weight
        for index, layer in enumerate(self.vlm.layers):
            for parameter in _weights(layer):
                owners.setdefault(parameter, []).append(index)

        def add_square(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None
            norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            parameter.grad = None
            squares[owners[parameter]] += norm**2

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


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that can have a gradient; quantized ones cannot."""
    return [parameter for parameter in layer.parameters() if parameter.is_floating_point()]

"""How strongly the answers' loss pulls at each decoder layer before any tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from striate.data import Batch
from striate.score.likelihood import Answers
from striate.score.replay import at_rest
from striate.score.table import Metric, Score
from striate.vlm import Vlm

METRICS: dict[str, Metric] = {
    "gradient": Metric(
        "gradient",
        needs=("records",),
        range="0.. (nats per unit of weight)",
        source="root mean square, over a layer's parameters, of the gradient of a sample's mean answer loss",
    )
}


class Gradient:
    """Size of the answer loss's gradient in each layer, for a typical parameter.

    For one sample and layer l with P parameters: ||dL/dw|| / sqrt(P), the root mean square over the layer's
    parameters, where L is the mean negative log-likelihood of the sample's answer tokens in nats. Unlike ||dL/dw||
    it does not grow with the layer's size alone, so layers of different size compare. Averaged over samples; each
    has a loss and a backward pass of its own, since gradients of several would cancel. A batch of B samples
    goes back B times: batches of one waste nothing.

    One parameter's gradient is in memory at a time. What trains, and gradients that are there, stay as they are.
    """

    def __init__(self, vlm: Vlm, names: Sequence[str] = ("gradient",)) -> None:
        self.vlm, self.names = vlm, tuple(names)
        self.kept: list[Tensor] = []  # by batch [B, L]

    def add(self, batch: Batch) -> None:
        """Measure the samples of a batch.

        Raises:
            UserError: a sample has no answer, or its loss is no number.
        """
        if not len(batch):
            return
        batch = batch.to(self.vlm.device, self.vlm.model.dtype)
        answers = Answers.of(batch)
        with at_rest(self.vlm.model), self._listening() as squares, torch.enable_grad():
            losses = answers.means(answers.nll(answers.logits(self.vlm, batch)))  # B
            answers.check(losses.detach())
            rows = []
            for row, loss in enumerate(losses):
                squares.zero_()
                loss.backward(retain_graph=row + 1 < len(losses))
                rows.append(squares.clone())
        sizes = torch.tensor([sum(p.numel() for p in _weights(layer)) for layer in self.vlm.layers])
        self.kept.append((torch.stack(rows) / sizes).sqrt())

    def scores(self) -> list[Score]:
        """The score over the samples measured so far; none before the first."""
        if not self.kept:
            return []
        return [Score.of_samples(METRICS[name], torch.cat(self.kept)) for name in self.names]

    @contextmanager
    def _listening(self) -> Iterator[Tensor]:
        """Within it, a backward pass adds each layer's squared gradients to the tensor [L] it gives, and keeps none."""
        squares = torch.zeros(self.vlm.depth, dtype=torch.float64)
        owners: dict[nn.Parameter, list[int]] = {}  # several for a weight that layers share
        for index, layer in enumerate(self.vlm.layers):
            for parameter in _weights(layer):
                owners.setdefault(parameter, []).append(index)

        def note(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None
            size = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            parameter.grad = None
            squares[owners[parameter]] += size**2

        before = [(p, p.requires_grad, p.grad) for p in self.vlm.model.parameters()]
        handles = []
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(parameter in owners)
                parameter.grad = None
            handles += [parameter.register_post_accumulate_grad_hook(note) for parameter in owners]
            yield squares
        finally:
            for handle in handles:
                handle.remove()
            for parameter, trains, gradient in before:
                parameter.requires_grad_(trains)
                parameter.grad = gradient


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that have a gradient; quantised ones have none."""
    return [parameter for parameter in layer.parameters() if parameter.is_floating_point()]

"""A forward pass that can be rerun from any decoder layer on.

Outputs that are expensive and do not change are recorded: those of tower and projector, and the hidden state below the
layer in question. All else is the model's own code: the layers above, masks, position embeddings by kind of layer,
features added between layers (DeepStack), final norm, head and soft-capping. The layers below only pass the recorded
state on, so no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from striate.data import Batch
from striate.scores.likelihood import AnswerTokens
from striate.trace import forward, watch_layers, with_layer_input
from striate.vlm import Vlm
from striate.vlm.modes import Change, Forward, changing, hidden_of, layer_input, override_forward, replace_hidden
from striate.vlm.processors import TOKEN_KEYS

GRAY = 1e-3
"""The value of gray pixels; not 0, which is padding (Idefics drops images of zeros)."""


class Replay:
    """One clean forward pass over a batch of B samples, and reruns of it from any layer on.

    `logits` [N, V] are those of the clean pass at answer positions. The output of every layer is recorded, depth x B x
    T x D numbers: about the size of the logits at all positions, which are never computed. A rerun from layer l costs
    depth - l layers, and one with layer l changed a layer less: all layers together about depth / 2 forward passes.
    Gradients must be off.
    """

    def __init__(self, vlm: Vlm, batch: Batch, answers: AnswerTokens) -> None:
        self.vlm, self.batch, self.answers = vlm, batch, answers
        self.layers = list(vlm.layers)
        senses = [vlm.tower, *(part for part in vlm.projector if isinstance(part, nn.Module))]
        self._encoded: dict[nn.Module, list[Any]] = {module: [] for module in senses}  # outputs of tower and projector
        self._outputs: list[Any] = []  # one per layer
        recorders = {module: _recorder(module, outputs, copy) for module, outputs in self._encoded.items()}
        with override_forward(recorders | {layer: _recorder(layer, self._outputs, _clone) for layer in self.layers}):
            self.logits = answers.logits(vlm, batch)
        self._resumes = self._can_resume()

    def run(self, start: int = 0) -> Tensor:
        """Logits [N, V] of the decoder as it is now, from layer `start` on; layers below replay their outputs."""
        with override_forward(self._senses() | self._players_below(start) if self._resumes else {}):
            return self.answers.logits(self.vlm, self.batch)

    def run_with(self, layer: int, change: Change) -> Tensor:
        """Logits [N, V] with one layer changed."""
        module, output = self.layers[layer], self._outputs[layer]
        # Where a layer passes on more than the hidden state, it has to run.
        own = (lambda *_, **__: output) if self._resumes else module.forward
        with override_forward({module: changing(own, change)}):
            return self.run(layer)

    def logits_after(self, layer: int, positions: Tensor) -> Tensor:
        """Logits [N, V] of the hidden states after a layer at `positions` [B, T], as if it were the last: logit lens.

        Final norm, head, scaling and soft-capping are the model's own (nostalgebraist 2020, "interpreting GPT: the
        logit lens").
        """
        players = self._senses() | _players(self.layers, self._outputs[layer])
        with override_forward(players), self.vlm.head_at(positions):
            return self.vlm.model(**self.batch.inputs, use_cache=False).logits[0]

    def _senses(self) -> dict[nn.Module, Forward]:
        """Forward functions of tower and projector that replay their outputs."""
        return {module: _player(outputs) for module, outputs in self._encoded.items() if outputs}

    def run_with_gray_keys(self, layer: int) -> Tensor:
        """Logits [N, V] with the image tokens' keys and values in one layer those of gray images (`gray`).

        The layer runs on the states of gray images at the image tokens, and its output there is replaced by the
        unchanged one: the text tokens alone see the difference, and in this layer alone.
        """
        own, output, image = self.layers[layer].forward, self._outputs[layer], self.batch.image_mask
        gray = self.gray[layer]  # runs the model, so before the layer is replaced

        def run(*args: Any, **kwargs: Any) -> Any:
            leaving = output if self._resumes else own(*args, **kwargs)
            swapped = layer_input(args, kwargs).clone()
            swapped[image] = gray
            args, kwargs = with_layer_input(args, kwargs, swapped)
            changed = hidden_of(own(*args, **kwargs))
            return replace_hidden(leaving, torch.where(image.unsqueeze(-1), hidden_of(leaving), changed))

        with override_forward({self.layers[layer]: run}):
            return self.run(layer)

    @cached_property
    def gray(self) -> list[Tensor]:
        """The states [M, D] that enter each layer at the M image tokens when every image is gray: its values, as the
        processor normalizes them, are `GRAY`."""
        images = {key: value for key, value in self.batch.inputs.items() if key not in TOKEN_KEYS}
        blank = {key: value.where(value == 0, GRAY) for key, value in images.items() if value.is_floating_point()}
        states: list[Tensor] = []
        with watch_layers(self.vlm, lambda _, entering, __: states.append(entering[self.batch.image_mask])):
            forward(self.vlm, replace(self.batch, inputs={**self.batch.inputs, **blank}))
        return states

    def _players_below(self, start: int) -> dict[nn.Module, Forward]:
        """Forward functions of the layers below, which replay the output of the uppermost."""
        return _players(self.layers[:start], self._outputs[start - 1]) if start else {}

    def _can_resume(self) -> bool:
        """Whether a rerun of the last layer alone gives the clean logits.

        It does not where layers exchange more than the hidden state (such as keys and values of a layer below). There
        every rerun starts from the first layer: slower, and correct.
        """
        self._resumes = True
        try:
            logits = self.run(len(self.layers) - 1)
        except (LookupError, AttributeError, TypeError):  # the last layer needs more from the layers below
            return False
        scale = self.logits.abs().max()
        return bool(((logits - self.logits).abs() <= 1e-3 * scale).all())


def _players(layers: list[nn.Module], output: Any) -> dict[nn.Module, Forward]:
    """Forward functions of the layers: the uppermost replays the output, the others return their input."""
    *others, uppermost = layers
    idle: dict[nn.Module, Forward] = {
        layer: lambda *args, **kwargs: replace_hidden(output, layer_input(args, kwargs)) for layer in others
    }
    # A copy: the model may write into its input when it adds features between layers.
    return idle | {uppermost: lambda *args, **kwargs: _clone(output)}


def _recorder(module: nn.Module, outputs: list[Any], duplicate: Callable[[Any], Any]) -> Forward:
    own = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        outputs.append(duplicate(output))  # Qwen's model writes into the tower's output, others into hidden states
        return output

    return record


def _player(outputs: list[Any]) -> Forward:
    """A forward function that returns the recorded outputs, one per call."""
    left = iter(outputs)
    return lambda *args, **kwargs: copy(next(left))


def _clone(output: Any) -> Any:
    return replace_hidden(output, hidden_of(output).clone())


def divergence(logits: Tensor, changed: Tensor, *, rows: int = 256) -> Tensor:
    """KL(p || q) [N] in nats, >= 0, of the distributions p of `logits` and q of `changed`, both [N, V].

    In float32, `rows` tokens at a time: the logits of many tokens over a large vocabulary take gigabytes.
    """
    parts = []
    for one, other in zip(logits.split(rows), changed.split(rows), strict=True):
        log_p, log_q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)

"""A forward pass that can be run again from any decoder layer on.

What is expensive and does not change is remembered: what tower and projector gave, and the hidden state below the
layer in question. All else is the model's own code: the layers above, masks, position embeddings by kind of layer,
features added between layers (DeepStack), final norm, head and soft-capping. The layers below only hand the
remembered state on, so no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from striate.data import Batch
from striate.score.likelihood import Answers
from striate.trace import entering_state
from striate.vlm import Vlm

Change = Callable[[Tensor, Tensor], Tensor]
"""What a changed layer gives [B, T, D], from what enters it and what leaves it unchanged."""

Forward = Callable[..., Any]


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within it, modules run other functions than their own; theirs come back whatever happens."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:  # somebody else's wrapper, such as accelerate's
                vars(module)["forward"] = own


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in evaluation mode: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Replay:
    """One clean forward pass over a batch of B samples, and reruns of it from any layer on.

    `logits` [N, V] are those of the clean pass at answer positions. What every layer gave is kept, depth x B x T x D
    numbers: about what the logits at all positions would take, which are never made. A rerun from layer l costs
    depth - l layers, and one with layer l changed a layer less: all layers together about depth / 2 forward passes.
    Gradients must be off.
    """

    def __init__(self, vlm: Vlm, batch: Batch, answers: Answers) -> None:
        self.vlm, self.batch, self.answers = vlm, batch, answers
        self.layers = list(vlm.layers)
        senses = [vlm.tower, *(part for part in vlm.projector if isinstance(part, nn.Module))]
        self._seen: dict[nn.Module, list[Any]] = {module: [] for module in senses}
        self._given: list[Any] = []  # by each layer, as it gave it
        recorders = {module: _recorder(module, outputs, copy) for module, outputs in self._seen.items()}
        with replaced(recorders | {layer: _recorder(layer, self._given, _cloned) for layer in self.layers}):
            self.logits = answers.logits(vlm, batch)
        self._resumes = self._proved()

    def run(self, start: int = 0) -> Tensor:
        """Logits [N, V] of the decoder as it is now, from layer `start` on; those below give what they gave."""
        senses = {module: _player(outputs) for module, outputs in self._seen.items() if outputs}
        with replaced(senses | self._handing_on(start) if self._resumes else {}):
            return self.answers.logits(self.vlm, self.batch)

    def changed(self, layer: int, change: Change) -> Tensor:
        """Logits [N, V] with one layer changed."""
        own, given = self.layers[layer].forward, self._given[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            # What else a layer hands on, it hands on by running.
            leaving = given if self._resumes else own(*args, **kwargs)
            return shaped(leaving, change(entering_state(args, kwargs), _hidden(leaving)))

        with replaced({self.layers[layer]: forward}):
            return self.run(layer)

    def _handing_on(self, start: int) -> dict[nn.Module, Forward]:
        """Stand-ins for the layers below: the uppermost gives what it once gave, the others whatever they get."""
        if not start:
            return {}
        *others, uppermost = self.layers[:start]
        below = self._given[start - 1]
        idle: dict[nn.Module, Forward] = {
            layer: lambda *args, **kwargs: shaped(below, entering_state(args, kwargs)) for layer in others
        }
        # A copy: the model may write into what it gets, as it adds features between layers.
        return idle | {uppermost: lambda *args, **kwargs: _cloned(below)}

    def _proved(self) -> bool:
        """Whether a rerun of the last layer alone gives the clean logits.

        It does not where layers exchange more than the hidden state (keys and values of a layer below, say). There
        every rerun starts over: slower, and right.
        """
        self._resumes = True
        try:
            found = self.run(len(self.layers) - 1)
        except (LookupError, AttributeError, TypeError):  # what it wanted from below was not there
            return False
        scale = self.logits.abs().max()
        return bool(((found - self.logits).abs() <= 1e-3 * scale).all())


def _recorder(module: nn.Module, outputs: list[Any], kept: Callable[[Any], Any]) -> Forward:
    own = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        given = own(*args, **kwargs)
        outputs.append(kept(given))  # Qwen's model writes into the tower's output, others into hidden states
        return given

    return record


def _player(outputs: list[Any]) -> Forward:
    """Gives what a module gave, call after call."""
    left = iter(outputs)
    return lambda *args, **kwargs: copy(next(left))


def _hidden(given: Any) -> Tensor:
    """The hidden state in what a layer gave: some families' layers give a tuple."""
    return given[0] if isinstance(given, tuple) else given


def _cloned(given: Any) -> Any:
    return shaped(given, _hidden(given).clone())


def shaped(like: Any, hidden: Tensor) -> Any:
    """A hidden state in the form in which a layer gives it: some give a tuple, with more behind it."""
    return (hidden, *like[1:]) if isinstance(like, tuple) else hidden


def divergence(logits: Tensor, changed: Tensor, *, rows: int = 256) -> Tensor:
    """KL(p || q) [N] in nats, >= 0, of the distributions that logits [N, V] stand for; q is the changed one.

    In float32, `rows` tokens at a time: the logits of many tokens over a large vocabulary take gigabytes.
    """
    found = []
    for one, other in zip(logits.split(rows), changed.split(rows), strict=True):
        log_p, log_q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)

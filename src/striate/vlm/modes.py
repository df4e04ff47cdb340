"""Temporary changes to how a model runs: evaluation mode, other forward functions, other outputs of decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Change = Callable[[Tensor, Tensor], Tensor]
"""The output of a changed layer [B, T, D], from its input and its unchanged output."""


def replace_forward(forwards: Mapping[nn.Module, Forward | None]) -> dict[nn.Module, Forward | None]:
    """Let modules run the given forward functions, or their class's for None; gives those before, to put them back."""
    before = {module: vars(module).get("forward") for module in forwards}  # a wrapper, such as accelerate's, or None
    for module, forward in forwards.items():
        if forward is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = forward
    return before


@contextmanager
def override_forward(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Context in which modules run the given forward functions; their own are restored at the end."""
    before = replace_forward(forwards)
    try:
        yield
    finally:
        replace_forward(before)


def change_layers(layers: Iterable[nn.Module], change: Change) -> AbstractContextManager[None]:
    """Context in which the output of each of the decoder layers is changed.

    The layers still run: their slots of the key-value cache are filled, so that positions are counted correctly, and
    generation with a cache is that of a model with the change.
    """
    return override_forward({layer: changing(layer.forward, change) for layer in layers})


def changing(own: Forward, change: Change) -> Forward:
    """The forward function of a decoder layer with its output changed."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaving = own(*args, **kwargs)
        return replace_hidden(leaving, change(layer_input(args, kwargs), hidden_of(leaving)))

    return forward


def skip(entering: Tensor, leaving: Tensor) -> Tensor:
    """The change of a bypassed layer: its output is its input."""
    return entering


def freeze(tokens: Tensor) -> Change:
    """The change of a layer whose output at `tokens` [B, T] is its input; other tokens still attend to these."""
    return lambda entering, leaving: torch.where(tokens.unsqueeze(-1), entering, leaving)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state [B, T, D] among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output, which is a tuple in some families."""
    return output[0] if isinstance(output, tuple) else output


def replace_hidden(output: Any, hidden: Tensor) -> Any:
    """A layer's output with another hidden state: the tensor, or the first entry of a tuple."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode: no dropout, no gradient checkpointing."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was

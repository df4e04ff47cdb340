"""Temporary changes to how a model runs: evaluation mode, and other forward functions for some of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


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

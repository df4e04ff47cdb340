"""Which short cuts to the loss hold for a model, found by taking them, so that no list of families is needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from striate.data import IGNORED, Batch
from striate.errors import UserError
from striate.score.replay import at_rest
from striate.train.loss import NONE, Shortcuts, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import Vlm, first_line

# Nats a token. Other kernels round otherwise; a record in the wrong place or with a wrong mask is off by far more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def proven(
    vlm: Vlm,
    probe: Batch,
    *,
    packing: Literal["auto", "on", "off"],
    sharded: bool,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Shortcuts, tuple[str, ...]]:
    """The short cuts that give the losses of the plain way on two records, and a line for each that does not.

    Args:
        vlm: the model.
        probe: two records.
        packing: auto, on (not to be had is an error) or off.
        sharded: no process holds the whole model, so nothing but its own forward pass can be asked for.
        autocast: the precision of training.

    Raises:
        UserError: packing is on and cannot be had.
    """
    found, notes = NONE, []
    with torch.no_grad(), autocast(), at_rest(vlm.model):
        plain = answer_losses(vlm, vlm.model, probe)
        for name in ("chunking", "packing"):
            if (name == "chunking" and sharded) or (name == "packing" and packing == "off"):
                continue
            if reason := _refusal(vlm, probe, replace(found, **{name: True}), plain):
                notes.append(f"no {name} for {vlm.model.config.model_type}: {reason}")
            else:
                found = replace(found, **{name: True})
    if packing == "on" and not found.packing:
        raise UserError(f"{notes[-1]}; leave --packing at auto for batches that are padded")
    return found, tuple(notes)


def check_thinning(
    vlm: Vlm, probe: Batch, shortcuts: Shortcuts, autocast: Callable[[], AbstractContextManager[None]]
) -> None:
    """Show the decoder the records without their image tokens.

    Raises:
        UserError: it cannot be shown some tokens only.
    """
    if not shortcuts.packing:
        raise UserError("--image-tokens needs packed rows: leave --packing at auto, or take another model")
    try:
        with torch.no_grad(), autocast(), at_rest(vlm.model), record_by_record(vlm):
            answer_losses(vlm, vlm.model, replace(probe, unseen=probe.image_mask), shortcuts=shortcuts)
    except Exception as error:  # whatever a family trips over
        kind = vlm.model.config.model_type
        raise UserError(f"--image-tokens cannot be had for {kind}: {first_line(error)}") from error


def _refusal(vlm: Vlm, probe: Batch, shortcuts: Shortcuts, plain: Tensor) -> str:
    """Why the model does not take these short cuts; nothing where it does."""
    try:
        if not shortcuts.packing:
            return _difference(answer_losses(vlm, vlm.model, probe, shortcuts=shortcuts), plain)
        with record_by_record(vlm):
            packed = answer_losses(vlm, vlm.model, probe, shortcuts=shortcuts)
            leaking = answer_losses(vlm, vlm.model, _with_other_start(probe), shortcuts=shortcuts)
    except Exception as error:  # whatever a family trips over
        return first_line(error)
    own = int(probe.targets()[0][0].sum())
    if not torch.equal(packed[own:], leaking[own:]):
        return "a record sees the one before it"
    return _difference(packed, plain)


def _difference(losses: Tensor, plain: Tensor) -> str:
    limit = TOLERANCE[torch.bfloat16 if torch.is_autocast_enabled(plain.device.type) else torch.float32]
    off = float((losses - plain).abs().max())
    return "" if off <= limit * max(1.0, float(plain.abs().max())) else f"losses are off by {off:.2g}"


def _with_other_start(probe: Batch) -> Batch:
    """The two records with other answer tokens in the first: the second must not notice."""
    tokens = probe.inputs["input_ids"].clone()
    answer = probe.labels[0] != IGNORED
    first = int(answer.nonzero()[0])
    tokens[0, answer] = tokens[0, first - 1]
    return replace(probe, inputs={**probe.inputs, "input_ids": tokens})

"""Short cuts to the loss: packed rows and chunked logits against the plain way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import templates
import torch
from test_evaluate import in_family, loud
from test_score_causal import family_batch

import striate
from striate.data import Batch
from striate.train.loss import Shortcuts, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import Vlm

PLAIN, CHUNKED = Shortcuts(), Shortcuts(chunking=True)
PACKED, BOTH = Shortcuts(packing=True), Shortcuts(packing=True, chunking=True)


def family(name: str) -> tuple[Vlm, Batch]:
    vlm = loud(in_family(name))
    vlm.train_only(striate.Region.parse("1,3", vlm.depth))
    return vlm, family_batch(vlm, name)


def losses_and_gradients(vlm: Vlm, batch: Batch, shortcuts: Shortcuts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vlm.model.zero_grad()
    with record_by_record(vlm) if shortcuts.packing else nullcontext():
        losses = answer_losses(vlm, vlm.model, batch, shortcuts=shortcuts)
    (losses * torch.linspace(0.5, 1.5, len(losses))).mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shortcuts", [CHUNKED, PACKED, BOTH], ids=["chunked", "packed", "both"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_losses_and_gradients_are_those_of_the_plain_way(
    name: str, shortcuts: Shortcuts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 4 * 128 * 3)  # three rows of logits at a time
    vlm, batch = family(name)
    plain, gradients = losses_and_gradients(vlm, batch, PLAIN)
    losses, others = losses_and_gradients(vlm, batch, shortcuts)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-5)
    assert others.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(others[parameter], gradient, rtol=1e-3, atol=1e-5 * max(scale, 1e-3), msg=parameter)

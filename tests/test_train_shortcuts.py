"""Short cuts to the loss: packed rows and chunked logits against the plain way."""

from __future__ import annotations

from contextlib import nullcontext

import pico
import pytest
import templates
import torch
from test_evaluate import in_family, loud
from test_score_causal import family_batch

import striate
from striate.data import IGNORED, TOKEN_KEYS, Batch, Example, collate
from striate.train.loss import Shortcuts, answer_losses
from striate.train.packing import Row, record_by_record
from striate.train.shortcuts import proven
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


def example(inputs: dict[str, torch.Tensor]) -> Example:
    """One of `pico_prompts` with its last four tokens as the answer."""
    tokens = {name: value[0] for name, value in inputs.items() if name in TOKEN_KEYS}
    labels = tokens["input_ids"].clone()
    labels[:-4] = IGNORED
    vision = {name: value for name, value in inputs.items() if name not in TOKEN_KEYS}
    return Example(tokens | vision, labels, tokens["input_ids"] == 6, "", "")


def two_records(name: str) -> tuple[Vlm, Batch]:
    vlm, prompts = Vlm.of(pico.pico_more(name)), pico.pico_prompts(name)
    return vlm, collate([example(prompts["image"]), example(prompts["text"])], pad_id=0)


@pytest.mark.parametrize("name", sorted(set(pico.MORE) - {"lfm2_vl", "mllama"}))
def test_more_families_take_both_short_cuts(name: str) -> None:
    vlm, probe = two_records(name)
    assert proven(vlm, probe, packing="on", sharded=False, autocast=nullcontext) == (BOTH, ())
    assert proven(vlm, probe, packing="off", sharded=True, autocast=nullcontext) == (PLAIN, ())


@pytest.mark.parametrize(("name", "reason"), [("lfm2_vl", "a record sees the one before it"), ("mllama", "")])
def test_a_family_that_mixes_records_in_a_row_is_found_out(name: str, reason: str) -> None:
    # LFM2 has convolutions over the row, Mllama attends across to the images of a whole row.
    vlm, probe = two_records(name)
    found, notes = proven(vlm, probe, packing="auto", sharded=False, autocast=nullcontext)
    assert found == CHUNKED
    assert len(notes) == 1
    assert notes[0].startswith(f"no packing for {name}: {reason}")
    with pytest.raises(striate.UserError, match=f"no packing for {name}: .*leave --packing at auto"):
        proven(vlm, probe, packing="on", sharded=False, autocast=nullcontext)


def test_attention_goes_back_to_what_it_was() -> None:
    vlm, batch = family("llava")
    config = vlm.model.config.text_config
    before = config._attn_implementation
    with record_by_record(vlm), record_by_record(vlm):
        assert config._attn_implementation != before
        # A padded batch is attended to as ever.
        torch.testing.assert_close(
            answer_losses(vlm, vlm.model, batch), losses_and_gradients(vlm, batch, PACKED)[0], rtol=1e-4, atol=1e-5
        )
    assert config._attn_implementation == before


def test_a_packed_row_has_no_padding_and_keeps_its_order() -> None:
    vlm, batch = family("llava")
    there = batch.inputs["attention_mask"].bool()
    row = Row.packed(vlm, batch)
    assert row.inputs["input_ids"].tolist() == [batch.inputs["input_ids"][there].tolist()]
    assert row.inputs["input_ids"][row.positions].tolist() == batch.inputs["input_ids"][batch.targets()[0]].tolist()
    assert row.lengths == tuple(there.sum(1).tolist())
    starts = [place for length in row.lengths for place in range(length)]
    assert row.inputs["position_ids"].tolist() == [starts]


def test_logits_exist_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, batch = family("llava")
    vocabulary = vlm.model.config.text_config.vocab_size
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 4 * vocabulary * 5)
    sizes: list[int] = []
    vlm.head.register_forward_hook(lambda _, __, logits: sizes.append(logits.shape[1]))
    losses = answer_losses(vlm, vlm.model, batch, shortcuts=CHUNKED)
    assert max(sizes) == 5
    assert sum(sizes) == len(losses)


def test_soft_caps_and_scales_behind_the_head_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gemma caps logits behind the head, Cohere scales them: the head alone would give another loss.
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 1)
    for name in ("llava_gemma2", "cohere2_vision"):
        vlm, batch = two_records(name)
        theirs = vlm.model(**batch.inputs, labels=batch.labels).loss
        ours = answer_losses(vlm, vlm.model, batch, shortcuts=CHUNKED).mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cpu_attends_to_short_records_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, batch = family("llava")
    vlm.model.bfloat16()
    seen: set[torch.dtype] = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *others: torch.Tensor, **settings: object) -> torch.Tensor:
        seen.add(query.dtype)
        return attention(query, *others, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        short = losses_and_gradients(vlm, batch, BOTH)[0]
        assert seen == {torch.float32, torch.bfloat16}  # the tower's is as it was
        seen.clear()
        monkeypatch.setattr("striate.train.packing.SHORT", 1)
        long = losses_and_gradients(vlm, batch, BOTH)[0]
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(short, long, rtol=0.02, atol=0.02)

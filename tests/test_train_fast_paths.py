"""Fast paths to the loss: packed rows and chunked logits against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pico
import pytest
import templates
import torch
from asking import loud
from tracing import family

import striate
from striate.data import IGNORED, TOKEN_KEYS, Batch, Example, collate
from striate.train import packing
from striate.train.loss import FastPaths, answer_losses, verify_fast_paths
from striate.train.packing import ModelInputs, record_by_record
from striate.vlm import Vlm

PLAIN, CHUNKED = FastPaths(), FastPaths(chunking=True)
PACKED, BOTH = FastPaths(packing=True), FastPaths(packing=True, chunking=True)


def losses_and_gradients(vlm: Vlm, batch: Batch, fast_paths: FastPaths) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vlm.model.zero_grad()
    with record_by_record(vlm) if fast_paths.packing else nullcontext():
        losses = answer_losses(vlm, vlm.model, batch, fast_paths=fast_paths)
    (losses * torch.linspace(0.5, 1.5, len(losses))).mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fast_paths", [CHUNKED, PACKED, BOTH], ids=["chunked", "packed", "both"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_losses_and_gradients_are_those_of_the_plain_way(
    name: str, fast_paths: FastPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 4 * 128 * 3)  # three rows of logits at a time
    vlm, batch = family(name)
    plain, gradients = losses_and_gradients(vlm, batch, PLAIN)
    losses, others = losses_and_gradients(vlm, batch, fast_paths)
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
def test_more_families_take_both_fast_paths(name: str) -> None:
    vlm, probe = two_records(name)
    assert verify_fast_paths(vlm, probe, packing="on", sharded=False, autocast=nullcontext) == (BOTH, ())
    assert verify_fast_paths(vlm, probe, packing="off", sharded=True, autocast=nullcontext) == (PLAIN, ())


@pytest.mark.parametrize(("name", "reason"), [("lfm2_vl", "a record sees the one before it"), ("mllama", "")])
def test_a_family_that_mixes_packed_records_is_detected(name: str, reason: str) -> None:
    # LFM2 has convolutions over the row, Mllama attends across to the images of a whole row.
    vlm, probe = two_records(name)
    found, notes = verify_fast_paths(vlm, probe, packing="auto", sharded=False, autocast=nullcontext)
    assert found == CHUNKED
    assert len(notes) == 1
    assert notes[0].startswith(f"no packing for {name}: {reason}")
    with pytest.raises(striate.UserError, match=f"no packing for {name}: .*--packing auto"):
        verify_fast_paths(vlm, probe, packing="on", sharded=False, autocast=nullcontext)


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("volume", [lambda vlm: vlm, loud], ids=["quiet", "loud"])
@pytest.mark.parametrize("name", ["llava_llama", "llava_gemma2", "glm4v", "mistral3"])
def test_bfloat16_takes_what_rounding_explains_and_no_more(
    name: str, volume: Callable[[Vlm], Vlm], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, probe = two_records(name)
    volume(vlm).model.bfloat16()
    assert verify_fast_paths(vlm, probe, packing="on", sharded=False, autocast=in_bfloat16) == (BOTH, ())
    positions = packing._position_ids
    monkeypatch.setattr(packing, "_position_ids", lambda vlm, batch: 2 * positions(vlm, batch))
    found, notes = verify_fast_paths(vlm, probe, packing="auto", sharded=False, autocast=in_bfloat16)
    assert (found, notes[0].partition(":")[0]) == (CHUNKED, f"no packing for {vlm.model.config.model_type}")
    assert "losses are off by" in notes[0]


def test_a_module_that_was_frozen_in_evaluation_mode_stays_in_it() -> None:
    vlm, probe = two_records("llava_llama")
    vlm.model.train()
    vlm.tower.eval()
    verify_fast_paths(vlm, probe, packing="auto", sharded=False, autocast=nullcontext)
    assert vlm.model.training
    assert vlm.layers[0].training
    assert not any(module.training for module in vlm.tower.modules())


def test_the_attention_implementation_is_restored() -> None:
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
    row = ModelInputs.packed(vlm, batch)
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
    losses = answer_losses(vlm, vlm.model, batch, fast_paths=CHUNKED)
    assert max(sizes) == 5
    assert sum(sizes) == len(losses)


def test_soft_caps_and_scales_behind_the_head_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gemma caps logits behind the head, Cohere scales them: the head alone would give another loss.
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 1)
    for name in ("llava_gemma2", "cohere2_vision"):
        vlm, batch = two_records(name)
        theirs = vlm.model(**batch.inputs, labels=batch.labels).loss
        ours = answer_losses(vlm, vlm.model, batch, fast_paths=CHUNKED).mean()
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

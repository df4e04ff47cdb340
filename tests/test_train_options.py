"""Options that change what is learnt, or how it is held: fewer image tokens, a projector that stops, 4-bit layers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import templates
import torch
from pico import pico_llava
from test_train import OPTIONS, weights, write_data
from test_train_memory import tune
from test_train_shortcuts import BOTH, family

import striate
from striate.data import Batch
from striate.train import TrainOptions
from striate.train.loss import answer_losses
from striate.train.nf4 import bring_back, hold_in_nf4
from striate.train.packing import Row, record_by_record
from striate.train.shortcuts import check_thinning
from striate.train.thinning import Thinning
from striate.vlm import Vlm

# Families whose decoder is not to be had with some of its tokens, and the word that says why.
WHOLE = {"qwen3_vl": "visual_pos_masks", "gemma3": "tokens in a row of", "paligemma": "tokens in a row of"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("pico") / "llava")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and 128 weights: whole blocks of 64 that share a scale."""
    return pico_llava(tmp_path_factory.mktemp("pico") / "wide", hidden_size=64, intermediate_size=128, head_dim=16)


def losses(vlm: Vlm, batch: Batch) -> torch.Tensor:
    with record_by_record(vlm), torch.no_grad():
        return answer_losses(vlm, vlm.model, batch, shortcuts=BOTH)


def half_unseen(batch: Batch) -> Batch:
    return Thinning(0.5, seed=0).of(batch, torch.Generator().manual_seed(1))


def test_a_thinned_record_is_the_whole_one_without_the_tokens() -> None:
    vlm, batch = family("llava")
    batch = half_unseen(batch)
    assert batch.unseen is not None
    assert 0 < int(batch.unseen.sum()) < int(batch.image_mask.sum())
    by_hand = []
    body, inputs = vlm.model.base_model, batch.inputs
    with torch.no_grad():
        features = torch.cat(list(body.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter(batch.image_mask.unsqueeze(-1), features)
        for row in range(len(batch)):
            there = inputs["attention_mask"][row].bool() & ~batch.unseen[row]
            places = torch.arange(len(there))[there]
            hidden = body.language_model(inputs_embeds=embeds[row : row + 1, there], position_ids=places[None])[0][0]
            labels = batch.labels[row][there]
            answers = (labels != -100).nonzero().flatten()
            chances = vlm.head(hidden)[answers - 1].log_softmax(dim=-1)
            by_hand.append(-chances[torch.arange(len(answers)), labels[answers]])
    torch.testing.assert_close(losses(vlm, batch), torch.cat(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_what_is_unseen_has_no_part_in_a_loss(name: str) -> None:
    vlm, batch = family(name)
    blind = replace(batch, unseen=batch.image_mask)
    if reason := WHOLE.get(name):
        with pytest.raises(striate.UserError, match=f"--image-tokens cannot be had for {name}: .*{reason}"):
            check_thinning(vlm, batch, BOTH, nullcontext)
        return
    check_thinning(vlm, batch, BOTH, nullcontext)
    other = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"] * 1.5}  # zeros stay: padding
    assert torch.equal(losses(vlm, blind), losses(vlm, replace(blind, inputs=other)))
    assert not torch.equal(losses(vlm, batch), losses(vlm, replace(batch, inputs=other)))
    torch.testing.assert_close(losses(vlm, replace(batch, unseen=batch.image_mask & False)), losses(vlm, batch))


def test_a_thinned_row_counts_the_tokens_that_are_shown() -> None:
    vlm, batch = family("llava")
    thin = half_unseen(batch)
    row, whole = Row.packed(vlm, thin), Row.packed(vlm, batch)
    assert sum(row.lengths) == row.positions.shape[1] == sum(whole.lengths) - int(thin.unseen.sum())  # type: ignore[union-attr]
    assert int(row.positions.sum()) == int(whole.positions.sum())  # no answer is lost
    assert row.inputs["input_ids"].equal(whole.inputs["input_ids"])  # the model puts all features in


def test_most_early_steps_are_thinned_and_the_last_ones_see_all() -> None:
    batch = family("llava")[1]
    thinning = Thinning(0.25, seed=3)
    thin = [step for step in range(50) if thinning.in_step([batch], step, 50)[0].unseen is not None]
    assert thin == [step for step in range(40) if step % 10]
    once, again = (thinning.in_step([batch], 7, 50)[0].unseen for _ in range(2))
    assert once.equal(again)  # type: ignore[union-attr, arg-type]
    assert not once.equal(thinning.in_step([batch], 8, 50)[0].unseen)  # type: ignore[union-attr, arg-type]
    assert Thinning(1.0, seed=3).in_step([batch], 7, 50)[0] is batch


def test_a_model_tunes_on_fewer_image_tokens(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=4)
    whole, thin = (tune(model, data, tmp_path / f"{n}", replace(options, image_tokens=n)) for n in (1.0, 0.5))
    first, second = ([entry["loss"] for entry in run.history()] for run in (whole, thin))
    assert first[0] == second[0]  # the first step sees all
    assert first[1] != second[1]
    for wrong, words in ((0.0, "a share above 0"), (1.5, "a share above 0")):
        with pytest.raises(striate.UserError, match=words):
            tune(model, data, tmp_path / f"wrong {wrong}", replace(options, image_tokens=wrong))
    with pytest.raises(striate.UserError, match="needs packed rows: leave --packing at auto"):
        tune(model, data, tmp_path / "padded", replace(options, image_tokens=0.5, packing="off"))


def test_a_projector_stops_after_its_share_of_the_steps(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, warmup=0.0, schedule="constant")

    def after(steps: int, projector: str) -> dict[str, torch.Tensor]:
        name = f"{steps} {projector}".replace("%", "")
        run = tune(model, data, tmp_path / name, replace(options, steps=steps), projector=projector)
        return weights(run.path)

    early, stopped, whole = after(3, "train"), after(6, "50%"), after(6, "train")
    bridge = [name for name in early if "multi_modal_projector" in name]
    assert bridge
    assert all(torch.equal(early[name], stopped[name]) for name in bridge)
    assert not all(torch.equal(whole[name], stopped[name]) for name in bridge)
    assert not all(torch.equal(early[name], stopped[name]) for name in early)  # the layers went on
    with pytest.raises(striate.UserError, match="train, freeze or a share of the steps such as 30%"):
        after(1, "half")


def test_layers_in_four_bits_multiply_as_their_weights_read_back(wide: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes").functional
    vlm = striate.load(wide, device="cpu")
    region = striate.Region.parse("1", vlm.depth)
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    outside = [name for name in vlm.linear_modules(striate.Region.parse("all", vlm.depth)) if ".layers.1." not in name]
    hold_in_nf4(vlm, region, torch.float32, torch.device("cpu"))
    for name in outside:
        held: Any = vlm.model.get_submodule(name)
        # Half the widest gap between NF4's levels, of the largest weight, and a little for scales in 8 bits.
        original = before[f"{name}.weight"]
        assert held.weight.numel() * held.weight.element_size() * 2 == original.numel()
        read = functional.dequantize_4bit(held.weight.data, held.weight.quant_state).float()
        assert 0 < float((read - original).abs().max()) < 0.17 * float(original.abs().max())
        states = torch.randn(3, held.in_features)
        torch.testing.assert_close(held(states), states @ read.T, rtol=1e-4, atol=1e-5)
    bring_back(vlm, region)
    after = dict(vlm.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_region_tunes_beside_layers_in_four_bits(wide: Path, data: Path, tmp_path: Path, method: Any) -> None:
    pytest.importorskip("bitsandbytes")
    options = replace(OPTIONS, steps=3, learning_rate=1e-3, frozen_layers="nf4")
    run = tune(wide, data, tmp_path / "run", options, method=method)
    before, after = weights(wide), weights(run.path)
    assert after.keys() == before.keys()
    frozen = [name for name in before if ".layers." in name and ".layers.1." not in name and ".layers.3." not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not all(torch.equal(before[name], after[name]) for name in before if ".layers.1." in name)
    plain = tune(wide, data, tmp_path / "plain", replace(options, frozen_layers="as_saved"), method=method)
    pairs = zip(run.history(), plain.history(), strict=True)
    assert all(0 < abs(one["loss"] - other["loss"]) < 0.1 for one, other in pairs)


def test_four_bits_need_their_package(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("striate.train.fitting.find_spec", lambda name: None)
    with pytest.raises(striate.UserError, match=r"--frozen-layers nf4 needs .*pip install bitsandbytes"):
        tune(model, data, tmp_path / "run", replace(TrainOptions(), frozen_layers="nf4"))

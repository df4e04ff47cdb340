"""Layers bypassed, frozen, reverted, and their gradients: against full passes with a layer replaced, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import templates
import torch
from asking import answered, in_family, loud, record
from pico import DEPTH, pico_llava
from torch import nn
from tracing import family_batch
from transformers import AutoModelForCausalLM, LlamaConfig

from striate.data import Batch, Record, collate, encode
from striate.errors import UserError
from striate.region import Region
from striate.scores.backbone import Backbone
from striate.scores.causal import METRICS, Causal, skip
from striate.scores.gradient import Gradient
from striate.scores.likelihood import AnswerTokens, perplexity
from striate.scores.replay import GRAY, Replay, divergence
from striate.scores.revert import parse_groups, revert
from striate.vlm import Vlm, load

CAUSAL = ("layer_contribution", "bypass_perplexity")
EVERYTHING = ("layer_contribution", "visual_swap", "bypass_perplexity", "revert_perplexity")

RECORDS = [
    answered(record("what is this ?", image=10), "a red cat"),
    answered(record("is this a dog ?"), "no"),
    answered(record("is the cat in the picture red or green ?", image=250), "green cat in the car"),
    answered(record("what ?", image=90), "two dog"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def vlm(folder: Path) -> Vlm:
    """Tuned: its layers are three times what they were in the folder."""
    vlm = load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for layer in vlm.layers:
            for parameter in layer.parameters():
                parameter.mul_(3)
    return vlm


def batch_of(vlm: Vlm, records: list[Record], side: str = "right") -> Batch:
    return collate([encode(one, vlm.processor) for one in records], pad_id=vlm.pad_token_id, side=side)


class Changed(nn.Module):
    """A layer in the place of another, seen from outside: whatever its family, it takes and gives the same."""

    def __init__(self, layer: nn.Module, frozen: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.frozen = layer, frozen

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "frozen") else getattr(self.layer, name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.layer(hidden, *args, **kwargs)
        whole = given[0] if isinstance(given, tuple) else given
        changed = torch.where(self.frozen[..., None], hidden, whole)
        return (changed, *given[1:]) if isinstance(given, tuple) else changed


def starting_over(vlm: Vlm, batch: Batch, layer: int, frozen: torch.Tensor) -> torch.Tensor:
    """All logits [B, T, V] of a full pass with one layer replaced."""
    own = vlm.layers[layer]
    vlm.layers[layer] = Changed(own, frozen)
    try:
        with torch.no_grad():
            return vlm.model(**batch.inputs, use_cache=False).logits
    finally:
        vlm.layers[layer] = own


def brute_force(vlm: Vlm, batch: Batch) -> dict[str, torch.Tensor]:
    """KL by sample and layer, and the bypass loss, in plain loops over full passes."""
    with torch.no_grad():
        clean = vlm.model(**batch.inputs, use_cache=False).logits.log_softmax(-1)
    shape = len(batch), vlm.depth
    found = {kind: torch.zeros(shape, dtype=torch.float64) for kind in ("image", "text", "bypass", "count")}
    masks = {"image": batch.image_mask, "text": ~batch.image_mask, "bypass": torch.ones_like(batch.image_mask)}
    for layer in range(vlm.depth):
        for kind, mask in masks.items():
            logits = starting_over(vlm, batch, layer, mask).log_softmax(-1)
            for row, place in (batch.labels != -100).nonzero().tolist():
                p, q = clean[row, place - 1].double(), logits[row, place - 1].double()
                found[kind][row, layer] += (
                    -q[batch.labels[row, place]] if kind == "bypass" else (p.exp() * (p - q)).sum()
                )
                found["count"][row, layer] += 1 / 3
    return found


def by_name(scores: list[Any]) -> dict[str, Any]:
    return {score.name: score for score in scores}


def measured(vlm: Vlm, batches: list[Batch], names: tuple[str, ...] = CAUSAL, **options: Any) -> dict[str, Any]:
    causal = Causal(vlm, names, **options)
    for batch in batches:
        causal.add(batch)
    return by_name(causal.scores())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_reruns_equal_full_passes_with_the_layer_replaced(name: str) -> None:
    vlm = loud(in_family(name))
    batch = family_batch(vlm, name)
    found, expected = measured(vlm, [batch]), brute_force(vlm, batch)
    count = expected["count"]
    seen = batch.image_mask.any(1)
    contribution = found["layer_contribution"]
    image = (expected["image"] / count)[seen].mean(0)
    assert image.max() > 1e-5  # far above the tolerance
    assert contribution.values == pytest.approx(image.tolist(), rel=1e-3, abs=1e-6)
    assert contribution.parts["image"] == contribution.values
    assert contribution.parts["text"] == pytest.approx((expected["text"] / count).mean(0).tolist(), rel=1e-3, abs=1e-6)
    assert contribution.n == int(seen.sum())
    bypass = (expected["bypass"].sum(0) / count.sum(0)).exp()
    assert found["bypass_perplexity"].values == pytest.approx(bypass.tolist(), rel=1e-4)
    assert found["bypass_perplexity"].n == len(batch)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_every_family_resumes_at_the_given_layer(name: str) -> None:
    vlm = loud(in_family(name))
    batch = family_batch(vlm, name)
    calls = [0] * vlm.depth
    with torch.no_grad():
        replay = Replay(vlm, batch, AnswerTokens.of(batch))

        def counted(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls[index] += 1
                return own(*args, **kwargs)

            return forward

        for index, layer in enumerate(vlm.layers):
            vars(layer)["forward"] = counted(index, layer.forward)
        for index in range(vlm.depth):
            replay.run_with(index, skip)
    # Each layer runs again for each layer below it, and for no other: depth / 2 passes in all.
    assert calls == list(range(vlm.depth))


def swapped(vlm: Vlm, batch: Batch, layer: int) -> torch.Tensor:
    """All logits [B, T, V] with keys and values replaced where they are made, and the image tokens' output kept."""
    module, image = vlm.layers[layer], batch.image_mask[..., None]
    blank = {key: value.where(value == 0, GRAY) for key, value in batch.inputs.items() if value.is_floating_point()}
    outputs: dict[tuple[str, bool], torch.Tensor] = {}
    parts = {"k": module.self_attn.k_proj, "v": module.self_attn.v_proj, "layer": module}  # type: ignore[union-attr]

    def note(name: str, gray: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name, gray] = output[0] if isinstance(output, tuple) else output

        return hook

    def replaced(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new = torch.where(image, outputs[name, name != "layer"], hidden)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    with torch.no_grad():
        for gray, inputs in ((False, batch.inputs), (True, {**batch.inputs, **blank})):
            hooks = [part.register_forward_hook(note(name, gray)) for name, part in parts.items()]
            vlm.model(**inputs, use_cache=False)
            for hook in hooks:
                hook.remove()
        hooks = [part.register_forward_hook(replaced(name)) for name, part in parts.items()]
        logits = vlm.model(**batch.inputs, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    return logits


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"])
def test_a_visual_swap_is_that_of_keys_and_values(name: str) -> None:
    vlm = loud(in_family(name))
    batch = family_batch(vlm, name)
    found = measured(vlm, [batch], ("visual_swap",))["visual_swap"]
    positions, tokens = batch.targets()
    counts = positions.sum(dim=1).tolist()
    seen = batch.image_mask.any(1)
    with torch.no_grad():
        clean = vlm.model(**batch.inputs, use_cache=False).logits
    for layer in range(vlm.depth):
        losses = [
            nn.functional.cross_entropy(logits[positions], tokens, reduction="none").split(counts)
            for logits in (clean, swapped(vlm, batch, layer))
        ]
        lost = torch.stack([new.mean() - old.mean() for old, new in zip(*losses, strict=True)])
        assert found.values[layer] == pytest.approx(float(lost[seen].mean()), rel=1e-2, abs=1e-5)
    assert max(map(abs, found.values)) > 1e-3
    assert found.n == int(seen.sum())


def test_experts_are_changed_like_any_layer(vlm: Vlm) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = {**pico.FAMILIES["llava"]["text_config"], "model_type": "qwen3_moe", **experts}
    whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    moe = loud(Vlm.of(pico.pico("llava", text_config=text, **whole)))
    batch = batch_of(vlm, RECORDS)
    found, expected = measured(moe, [batch]), brute_force(moe, batch)
    bypass = (expected["bypass"].sum(0) / expected["count"].sum(0)).exp()
    assert found["bypass_perplexity"].values == pytest.approx(bypass.tolist(), rel=1e-4)
    text_only = (expected["text"] / expected["count"]).mean(0)
    assert found["layer_contribution"].parts["text"] == pytest.approx(text_only.tolist(), rel=1e-3, abs=1e-6)


def test_tower_runs_once(vlm: Vlm) -> None:
    batch, runs = batch_of(vlm, RECORDS), []  # the first use of the processor runs the tower, too
    first = next(module for module in vlm.tower.modules() if isinstance(module, nn.Linear))
    handle = first.register_forward_hook(lambda *_: runs.append(1))
    measured(vlm, [batch])
    handle.remove()
    assert len(runs) == 1


def test_scores_do_not_depend_on_batch_size_or_padding(vlm: Vlm, folder: Path) -> None:
    together = measured(vlm, [batch_of(vlm, RECORDS)], EVERYTHING, backbone=folder)
    assert {*together} == {*EVERYTHING}
    for batches in (
        [batch_of(vlm, [one]) for one in RECORDS],
        [batch_of(vlm, RECORDS, side="left")],
        [batch_of(vlm, RECORDS[:3]), batch_of(vlm, []), batch_of(vlm, RECORDS[3:])],
    ):
        other = measured(vlm, batches, EVERYTHING, backbone=folder)
        for name, score in together.items():
            assert other[name].values == pytest.approx(score.values, rel=1e-3, abs=1e-5)
            assert other[name].stderr == pytest.approx(score.stderr, rel=1e-3, abs=1e-5)
            assert other[name].n == score.n == (3 if "images" in METRICS[name].needs else 4)
            assert score.range == METRICS[name].range


def test_a_layer_that_does_nothing_can_be_bypassed_and_contributes_nothing(vlm: Vlm) -> None:
    with torch.no_grad():
        vlm.layers[2].self_attn.o_proj.weight.zero_()
        vlm.layers[2].mlp.down_proj.weight.zero_()
    causal = Causal(vlm, CAUSAL)
    causal.add(batch_of(vlm, RECORDS))
    found = by_name(causal.scores())
    value, error = causal.perplexity()
    assert found["bypass_perplexity"].values[2] == pytest.approx(value, rel=1e-6)
    assert found["bypass_perplexity"].stderr[2] == pytest.approx(error, rel=1e-6)
    assert found["bypass_perplexity"].values[1] != pytest.approx(value, rel=1e-3)
    assert found["layer_contribution"].parts["text"][2] == pytest.approx(0, abs=1e-6)
    assert found["layer_contribution"].values[2] == pytest.approx(0, abs=1e-6)


def test_the_last_layers_image_tokens_reach_no_answer(vlm: Vlm) -> None:
    score = measured(vlm, [batch_of(vlm, RECORDS)], ("layer_contribution",))["layer_contribution"]
    assert score.values[-1] == 0.0
    assert min(score.values[:-1]) > 0


def test_where_layers_share_more_than_states_reruns_start_over(vlm: Vlm) -> None:
    batch = batch_of(vlm, RECORDS)
    expected = brute_force(vlm, batch)
    shared: dict[str, torch.Tensor] = {}
    first, last = vlm.layers[0], vlm.layers[-1]
    attention, onward = first.self_attn.forward, last.forward

    def lend(*args: Any, **kwargs: Any) -> Any:
        given = attention(*args, **kwargs)
        shared["values"] = given[0]
        return given

    vars(first.self_attn)["forward"] = lend
    vars(last)["forward"] = lambda *args, **kwargs: onward(*args, **kwargs) + 0 * shared.pop("values")
    found = measured(vlm, [batch])
    bypass = (expected["bypass"].sum(0) / expected["count"].sum(0)).exp().tolist()
    assert found["bypass_perplexity"].values == pytest.approx(bypass, rel=1e-4)


def test_perplexity_by_hand() -> None:
    # Losses 2 and 6 over 1 and 3 tokens: rate 2, no spread. 2 and 4 over 1 and 1: rate 3, each 1 off.
    value, error = perplexity(torch.tensor([[2.0], [6.0]]), torch.tensor([1, 3]))
    assert (float(value), float(error)) == pytest.approx((math.exp(2), 0.0))
    value, error = perplexity(torch.tensor([2.0, 4.0]), torch.tensor([1, 1]))
    # var(r) = 2 / 1 * (1 + 1) / 2^2 = 1
    assert (float(value), float(error)) == pytest.approx((math.exp(3), math.exp(3)))
    assert math.isnan(perplexity(torch.tensor([2.0]), torch.tensor([1]))[1])


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.2, 0.8]])
    found = divergence(p.clamp(min=1e-30).log() + 7, q.log() - 3, rows=2)
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2), 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_samples_without_answers_images_or_numbers(vlm: Vlm) -> None:
    batch = batch_of(vlm, RECORDS)
    batch.labels[1] = -100
    for measure in (Causal(vlm, CAUSAL), Gradient(vlm)):
        with pytest.raises(UserError, match=r"^record 'dog' has no answer, and a loss needs one"):
            measure.add(replace(batch, ids=("a", "dog", "b", "c")))
        assert measure.scores() == []
    words = Causal(vlm, CAUSAL)
    words.add(batch_of(vlm, RECORDS[1:2]))
    with pytest.raises(UserError, match=r"no record has an image$"):
        words.scores()
    with torch.no_grad():
        vlm.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    for measure in (Causal(vlm, CAUSAL), Gradient(vlm)):
        with pytest.raises(UserError, match=r"^the unchanged model's loss on record 'x' is nan"):
            measure.add(replace(batch_of(vlm, RECORDS[:1]), ids=("x",)))


# Reverting


def state(vlm: Vlm) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}


def same(vlm: Vlm, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in vlm.model.state_dict().items())


def nll_of(vlm: Vlm, batch: Batch) -> float:
    answers = AnswerTokens.of(batch)
    with torch.no_grad():
        return float(answers.nll(answers.logits(vlm, batch)).mean())


def test_reverting_a_layer_equals_a_model_with_the_backbones_layer(vlm: Vlm, folder: Path) -> None:
    batch, before = batch_of(vlm, RECORDS), state(vlm)
    found = measured(vlm, [batch], ("revert_perplexity",), backbone=folder)["revert_perplexity"]
    assert same(vlm, before)
    plain = load(folder, dtype="float32", device="cpu")
    for layer in range(DEPTH):
        own = vlm.layers[layer]
        vlm.layers[layer] = plain.layers[layer]
        assert found.values[layer] == pytest.approx(math.exp(nll_of(vlm, batch)), rel=1e-5)
        vlm.layers[layer] = own


def test_a_model_reverted_to_itself_is_as_it_was(folder: Path) -> None:
    vlm = load(folder, dtype="float32", device="cpu")
    causal = Causal(vlm, ("revert_perplexity",), backbone=folder)
    causal.add(batch_of(vlm, RECORDS))
    assert causal.scores()[0].values == pytest.approx([causal.perplexity()[0]] * DEPTH, rel=1e-6)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_weights_as_they_were(
    vlm: Vlm, folder: Path, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, batch = state(vlm), batch_of(vlm, RECORDS)
    causal = Causal(vlm, EVERYTHING, backbone=folder)
    causal.add(batch)
    done = causal.scores()
    pointers = {name: tensor.data_ptr() for name, tensor in vlm.model.state_dict().items()}
    mlp, calls = vlm.layers[2].mlp, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if not torch.equal(mlp.up_proj.weight, before[f"{vlm.parts.layers}.2.mlp.up_proj.weight"]):
            raise stop
        return type(mlp).forward(mlp, *args)

    monkeypatch.setitem(vars(mlp), "forward", interrupted)
    with pytest.raises(stop):
        causal.add(batch)
    assert same(vlm, before)
    assert pointers == {name: tensor.data_ptr() for name, tensor in vlm.model.state_dict().items()}
    assert not any("forward" in vars(module) for module in vlm.model.modules() if module is not mlp)
    assert repr(causal.scores()) == repr(done)  # what was measured before is kept


def test_groups_reverted(vlm: Vlm, folder: Path) -> None:
    before, batches = state(vlm), [batch_of(vlm, RECORDS[:2]), batch_of(vlm, RECORDS[2:])]
    groups = parse_groups("0-1,2-3,all,each", DEPTH)
    words = [batch_of(vlm, RECORDS[1:2])]
    found = revert(vlm, groups, backbone=folder, sets={"visual": batches, "text": words})
    assert same(vlm, before)
    visual = found["visual"]
    whole = batch_of(vlm, RECORDS)
    assert visual.tuned.value == pytest.approx(math.exp(nll_of(vlm, whole)), rel=1e-5)
    plain = load(folder, dtype="float32", device="cpu")
    assert visual.backbone.value == pytest.approx(math.exp(nll_of(plain, whole)), rel=1e-5)
    assert visual.groups["all"] == visual.backbone
    assert (visual.backbone.n, found["text"].tuned.n) == (4, 1)
    alone = measured(vlm, batches, ("revert_perplexity",), backbone=folder)["revert_perplexity"]
    assert [visual.groups[str(layer)].value for layer in range(DEPTH)] == pytest.approx(alone.values, rel=1e-5)
    assert [visual.groups[str(layer)].stderr for layer in range(DEPTH)] == pytest.approx(alone.stderr, rel=1e-4)
    for layer in (0, 1):
        vlm.layers[layer] = plain.layers[layer]
    assert visual.groups["0-1"].value == pytest.approx(math.exp(nll_of(vlm, whole)), rel=1e-5)
    with pytest.raises(UserError, match="the text set has no samples"):
        revert(vlm, groups, backbone=folder, sets={"text": []})
    with pytest.raises(UserError, match="the group 'a' is for 8 layers, this model has 4"):
        revert(vlm, {"a": Region((0,), 8)}, backbone=folder, sets={})


def test_one_layer_of_the_backbone_is_in_memory_at_a_time(
    vlm: Vlm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, tuned = Backbone(vlm, folder), state(vlm)
    held: list[int] = []

    def differing(*_: Any) -> None:
        weights = vlm.model.state_dict()
        changed = {name for name in tuned if not torch.equal(weights[name], tuned[name])}
        held.append(len({name.removeprefix(vlm.parts.layers).split(".")[1] for name in changed}))

    for layer in vlm.layers:
        layer.mlp.register_forward_hook(differing)
    with backbone.revert(range(DEPTH)):
        nll_of(vlm, batch_of(vlm, RECORDS[:1]))
    assert held == [1] * DEPTH


def test_an_unmerged_adapter_is_switched_off_in_its_layer(folder: Path) -> None:
    from peft import get_peft_model

    from striate.train.adapter import lora_config

    vlm, batch = load(folder, dtype="float32", device="cpu"), None
    batch = batch_of(vlm, RECORDS)
    plain = math.exp(nll_of(vlm, batch))
    adapted = get_peft_model(vlm.model, lora_config(vlm, Region((1, 2), DEPTH), rank=4, alpha=32, projector=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=10)
    adapted.get_parameter(next(n for n, p in adapted.named_parameters() if p.requires_grad)).requires_grad_(False)
    trains = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    causal = Causal(vlm, ("revert_perplexity",))
    causal.add(batch)
    (score,), (tuned, _) = causal.scores(), causal.perplexity()
    assert score.values[0] == pytest.approx(tuned, rel=1e-6)
    assert score.values[3] == pytest.approx(tuned, rel=1e-6)
    assert len({round(value, 4) for value in score.values}) == 3
    found = revert(vlm, parse_groups("1-2", DEPTH), backbone=None, sets={"visual": [batch]})["visual"]
    assert found.tuned.value == pytest.approx(tuned, rel=1e-6)
    assert tuned != pytest.approx(plain, rel=1e-4)
    assert found.groups["1-2"].value == pytest.approx(plain, rel=1e-6)
    assert found.backbone.value == pytest.approx(plain, rel=1e-6)
    assert trains == {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    adapted.merge_adapter()
    with pytest.raises(UserError, match="adapters are merged but still attached"):
        Causal(vlm, ("revert_perplexity",))


def test_a_plain_language_model_is_a_backbone_and_a_wrong_one_is_named(vlm: Vlm, tmp_path: Path) -> None:
    def language_model(**changes: Any) -> Path:
        text = {**pico.FAMILIES["llava"]["text_config"], **changes}
        text.pop("model_type")
        AutoModelForCausalLM.from_config(LlamaConfig(**text)).save_pretrained(tmp_path / "llm")
        return tmp_path / "llm"

    folder = language_model(vocab_size=60)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with Backbone(vlm, folder).layer(1):
        for name, tensor in plain.model.layers[1].state_dict().items():
            assert torch.equal(vlm.layers[1].state_dict()[name], tensor)
    with pytest.raises(UserError, match=r"llm has 6 decoder layers, the model 4: not its backbone"):
        Backbone(vlm, language_model(num_hidden_layers=6))
    with pytest.raises(UserError, match=r"model.layers.0.mlp.gate_proj.weight is 48 x 32, the model's is 64 x 32"):
        Backbone(vlm, language_model(intermediate_size=48))
    with pytest.raises(UserError, match=r"needs a backbone \(--backbone\), or a model with unmerged adapters"):
        Causal(vlm, EVERYTHING)
    biased = in_family("qwen2_vl")
    with pytest.raises(UserError, match=r"llm has no self_attn.q_proj.bias in layer 0: it is not this"):
        Backbone(biased, language_model())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "phi3"])
def test_experts_and_fused_projections_are_reverted(kind: str, tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = {**pico.FAMILIES["llava"]["text_config"], "model_type": kind}
    text |= experts if kind != "phi3" else {}
    vlm = Vlm.of(pico.pico("llava", text_config=text))
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(vlm.model.config.text_config)
    plain.save_pretrained(tmp_path / "llm")
    before = state(vlm)
    backbone = Backbone(vlm, tmp_path / "llm")
    for layer in range(DEPTH):
        with backbone.layer(layer):
            for name, tensor in plain.model.layers[layer].state_dict().items():
                assert torch.equal(vlm.layers[layer].state_dict()[name], tensor), name
    assert same(vlm, before)


def test_groups_from_text() -> None:
    def layers(texts: Any, depth: int = 8) -> dict[str, tuple[int, ...]]:
        return {name: region.layers for name, region in parse_groups(texts, depth).items()}

    assert layers("0-1, 6-7") == layers(["0-1", "6-7"]) == {"0-1": (0, 1), "6-7": (6, 7)}
    assert layers("each", 3) == {"0": (0,), "1": (1,), "2": (2,)}
    assert layers("sliding:2", 4) == {"0-1": (0, 1), "1-2": (1, 2), "2-3": (2, 3)}
    assert layers("uniform:2,7") == {"uniform:2": (0, 4), "7": (7,)}
    for text, message in (
        ("", "no group of layers is named; accepted: 8-15,16-23"),
        ("sliding:9", "'sliding:9' means runs of 9 layers; this model has 8"),
        ("6-9", "layer 9 does not exist; this model's depth is 8"),
        ("none", "the group 'none' has no layers"),
        ("every", "unknown region form 'every'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_groups(text, 8)


# Gradients


def test_gradient_equals_autograd(vlm: Vlm) -> None:
    rows = []
    for one in RECORDS:
        batch = batch_of(vlm, [one])
        logits = vlm.model(**batch.inputs).logits[0, :-1].log_softmax(-1)
        at = batch.labels[0, 1:] != -100
        loss = -logits[at].gather(1, batch.labels[0, 1:][at][:, None]).mean()
        row = []
        for layer in vlm.layers:
            gradients = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            row.append(torch.cat([gradient.flatten() for gradient in gradients]).square().mean().sqrt())
        rows.append(torch.stack(row))
    expected = torch.stack(rows)
    for batches in ([batch_of(vlm, RECORDS)], [batch_of(vlm, [one]) for one in RECORDS]):
        gradient = Gradient(vlm)
        for batch in batches:
            gradient.add(batch)
        (score,) = gradient.scores()
        assert score.values == pytest.approx(expected.mean(0).tolist(), rel=1e-4)
        assert score.stderr == pytest.approx((expected.std(0) / 2).tolist(), rel=1e-3)
        assert score.n == 4


def test_gradients_leave_nothing_behind(vlm: Vlm) -> None:
    head = vlm.head.weight
    head.requires_grad_(False)
    norm = vlm.layers[0].input_layernorm.weight
    norm.grad = kept = torch.ones_like(norm)
    vlm.model.train()
    Gradient(vlm).add(batch_of(vlm, RECORDS[:1]))
    assert vlm.model.training
    assert {name for name, p in vlm.model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}
    assert norm.grad is kept
    assert [p.grad for p in vlm.model.parameters() if p is not norm] == [None] * (len(list(vlm.model.parameters())) - 1)
    assert not any(p._post_accumulate_grad_hooks for p in vlm.model.parameters())
    norm.data.fill_(torch.nan)
    with pytest.raises(UserError, match="loss on record"):
        Gradient(vlm).add(batch_of(vlm, RECORDS[:1]))
    assert norm.grad is kept

"""Image tokens that pass by some layers: against every layer run on every token, with image tokens reverted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pico
import processors
import pytest
import templates
import torch
from test_evaluate import in_family, loud
from test_score_causal import family_batch
from test_train_fast_paths import two_records
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModelForImageTextToText

import striate
from striate.data import Batch
from striate.region import Region
from striate.routing import (
    ENTRY,
    multiply_adds,
    read_route,
    resolve,
    route,
    running_route,
    running_tokens,
    verify,
    write_route,
)
from striate.studies.cost.section import FORMULAS
from striate.train.loss import FastPaths, answer_losses
from striate.train.packing import record_by_record
from striate.vlm import Vlm, select

PADDED, PACKED = FastPaths(), FastPaths(packing=True, chunking=True)
ALTERNATING = "0,2"


def alternating(vlm: Vlm) -> Region:
    return Region.parse(ALTERNATING, vlm.depth)


def image_id(batch: Batch) -> int:
    return int(batch.inputs["input_ids"][batch.image_mask][0])


@contextmanager
def reverted(vlm: Vlm, region: Region, image: int) -> Iterator[None]:
    """The slow way: image tokens leave the layers outside the region as they entered them."""
    kept: list[torch.Tensor] = []

    def see(_: torch.nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        kept[:] = [(settings["input_ids"] if "input_ids" in settings else args[0]) == image]

    def restore(_: torch.nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else settings["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        after = torch.where(kept[0][..., None], before, after)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    with ExitStack() as hooks:
        hooks.enter_context(vlm.model.register_forward_pre_hook(see, with_kwargs=True))
        for layer in set(range(vlm.depth)) - set(region):
            hooks.enter_context(vlm.layers[layer].register_forward_hook(restore, with_kwargs=True))
        yield


def losses_and_gradients(
    vlm: Vlm, batch: Batch, fast_paths: FastPaths = PADDED
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vlm.model.zero_grad()
    with record_by_record(vlm) if fast_paths.packing else nullcontext():
        losses = answer_losses(vlm, vlm.model, batch, fast_paths=fast_paths)
        (losses * torch.linspace(0.5, 1.5, len(losses))).mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


@contextmanager
def checkpointed(vlm: Vlm) -> Iterator[None]:
    """Within it, the model trains, and layers 1 and 2 compute their activations again."""
    layers = [vlm.layers[layer] for layer in (1, 2)]
    for layer in layers:
        vars(layer)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
    vlm.model.train()
    try:
        yield
    finally:
        vlm.model.eval()
        for layer in layers:
            layer.gradient_checkpointing = False


def assert_same(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.fixture(scope="module", params=templates.FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Vlm, Batch]:
    """A model of which decoder layers and projector train, and a batch: one image, none, one, several."""
    vlm = loud(in_family(request.param))
    select(vlm, Region.parse("all", vlm.depth))
    return vlm, family_batch(vlm, request.param)


quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor


@quiet
def test_losses_and_gradients_are_those_of_the_slow_way(family: tuple[Vlm, Batch]) -> None:
    vlm, batch = family
    with reverted(vlm, alternating(vlm), image_id(batch)):
        slow = losses_and_gradients(vlm, batch)
    plain = losses_and_gradients(vlm, batch)
    assert (slow[0] - plain[0]).abs().max() > 1e-3
    with route(vlm, alternating(vlm), image_token_id=image_id(batch)):
        assert_same(losses_and_gradients(vlm, batch), slow)
        assert_same(losses_and_gradients(vlm, batch, PACKED), slow)
        with checkpointed(vlm):
            assert_same(losses_and_gradients(vlm, batch), slow)
            assert_same(losses_and_gradients(vlm, batch, PACKED), slow)
    torch.testing.assert_close(losses_and_gradients(vlm, batch)[0], plain[0], rtol=0, atol=0)


TOGETHER = {**templates.FAMILIES, **dict.fromkeys(processors.FAMILIES)}


def prompts(vlm: Vlm, batch: Batch, side: str = "right") -> dict[str, torch.Tensor]:
    """The batch without its answers, padded on a side, with what a processor gives for images."""
    inputs = dict(batch.inputs)
    there = inputs["attention_mask"].bool() & (batch.labels == -100)
    order = (there if side == "left" else ~there).byte().argsort(dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            filler = vlm.pad_token_id if name == "input_ids" else 0
            inputs[name] = torch.where(there, inputs[name], filler).gather(1, order)
    return inputs


def generated(vlm: Vlm, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """New tokens, the scores they were taken by behind them."""
    found: Any = vlm.model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=vlm.pad_token_id,
        output_scores=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    return torch.cat([tokens.double(), *(score.double()[: len(tokens), :50] for score in found.scores)], dim=1)


@quiet
def test_decoding_with_a_cache_is_decoding_without_one(family: tuple[Vlm, Batch]) -> None:
    vlm, batch = family
    inputs, image = prompts(vlm, batch, "left"), image_id(batch)
    with reverted(vlm, alternating(vlm), image):
        slow = generated(vlm, inputs)
    with route(vlm, alternating(vlm), image_token_id=image):
        torch.testing.assert_close(generated(vlm, inputs), slow, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(generated(vlm, inputs, use_cache=False), slow, rtol=1e-4, atol=1e-4)
        beams = generated(vlm, inputs, num_beams=3)
        torch.testing.assert_close(generated(vlm, inputs, num_beams=3, use_cache=False), beams, rtol=1e-4, atol=1e-4)


@quiet
def test_a_cache_has_the_usual_shape_and_padding_may_be_on_either_side(family: tuple[Vlm, Batch]) -> None:
    vlm, batch = family
    found, caches = [], []
    with torch.no_grad():
        plain = vlm.model(**prompts(vlm, batch), use_cache=True).past_key_values
        with route(vlm, alternating(vlm), image_token_id=image_id(batch)):
            for side in ("right", "left"):
                inputs = prompts(vlm, batch, side)
                output = vlm.model(**inputs, use_cache=True)
                caches.append(output.past_key_values)
                found.append(output.logits[inputs["attention_mask"].bool() & (inputs["input_ids"] != image_id(batch))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    shapes = [[layer.keys.shape for layer in cache.layers] for cache in (plain, caches[0])]
    assert shapes[0] == shapes[1]


@quiet
def test_a_route_of_all_layers_is_the_plain_model_bit_for_bit(family: tuple[Vlm, Batch]) -> None:
    vlm, batch = family
    inputs = prompts(vlm, batch, "left")
    plain, tokens = losses_and_gradients(vlm, batch), generated(vlm, inputs)
    with route(vlm, Region.parse("all", vlm.depth), image_token_id=image_id(batch)):
        routed = losses_and_gradients(vlm, batch)
        assert torch.equal(generated(vlm, inputs), tokens)
    assert torch.equal(routed[0], plain[0])
    assert all(torch.equal(routed[1][name], gradient) for name, gradient in plain[1].items())


OWN = sorted(set(processors.FAMILIES) - set(templates.FAMILIES))
REGIONS = {"lfm3_vl": "0,1,3"}  # the others are convolutions
FEW = sorted(set(pico.MORE) - set(OWN) - {"lfm2_vl", "mllama"})


@quiet
@pytest.mark.parametrize("name", OWN)
def test_more_families_are_routed(name: str) -> None:
    vlm = loud(in_family(name))
    batch = family_batch(vlm, "paligemma" if name in processors.IMAGE_NEEDED else name)
    region = Region.parse(REGIONS.get(name, ALTERNATING), vlm.depth)
    if name == "mllama":
        with pytest.raises(striate.UserError, match="layer 1 of this mllama model does not attend to keys and values"):
            verify(vlm, region, batch)
        return
    verify(vlm, region, batch)
    with torch.no_grad():
        with reverted(vlm, region, image_id(batch)):
            slow = answer_losses(vlm, vlm.model, batch)
        with route(vlm, region, image_token_id=image_id(batch)):
            torch.testing.assert_close(answer_losses(vlm, vlm.model, batch), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_more_language_models_are_routed(name: str) -> None:
    vlm, batch = two_records(name)
    select(vlm, Region.parse("all", vlm.depth))
    with reverted(vlm, alternating(vlm), 6):
        slow = losses_and_gradients(vlm, batch)
    with route(vlm, alternating(vlm), image_token_id=6):
        assert_same(losses_and_gradients(vlm, batch), slow)
        assert_same(losses_and_gradients(vlm, batch, PACKED), slow)


@pytest.mark.parametrize(("name", "layer"), [("lfm2_vl", 0), ("qwen3_5", 0), ("mllama", 1)])
def test_layers_that_attend_in_another_way_have_to_be_routed(name: str, layer: int) -> None:
    vlm, batch = two_records(name)
    region = Region.parse("all", vlm.depth) - Region((layer,), vlm.depth)
    with pytest.raises(striate.UserError, match=f"layer {layer} of this {name} model does not attend"):
        verify(vlm, region, batch)
    with route(vlm, region, image_token_id=6), pytest.raises(striate.UserError, match=f"layer {layer} of this {name}"):
        answer_losses(vlm, vlm.model, batch)


@pytest.fixture
def llava() -> tuple[Vlm, Batch]:
    return two_records("llava_llama")


def test_what_attends_otherwise_is_found_out(llava: tuple[Vlm, Batch]) -> None:
    vlm, batch = llava
    layer, own = vlm.layers[1], vlm.layers[1].forward

    def leaks(states: torch.Tensor, **settings: Any) -> torch.Tensor:
        return own(states, **settings) + states.mean(dim=1, keepdim=True)

    vars(layer)["forward"] = leaks
    with pytest.raises(striate.UserError, match="llava cannot be routed through 0,2: its logits are off by"):
        verify(vlm, alternating(vlm), batch)


def test_adapters_in_any_layer_train_alike(llava: tuple[Vlm, Batch]) -> None:
    vlm, batch = llava
    names = list(vlm.linear_modules(Region.parse("0,1", vlm.depth)))
    adapted = peft.get_peft_model(vlm.model, peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False))

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        adapted.zero_grad()
        losses = answer_losses(vlm, adapted, batch)
        losses.mean().backward()
        return losses.detach(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}

    with reverted(vlm, alternating(vlm), 6):
        slow = gradients()
    with route(vlm, alternating(vlm)):
        assert_same(gradients(), slow)


def test_attention_may_be_eager(llava: tuple[Vlm, Batch]) -> None:
    vlm, batch = llava
    vlm.model.set_attn_implementation("eager")
    select(vlm, Region.parse("all", vlm.depth))
    with reverted(vlm, alternating(vlm), 6):
        slow = losses_and_gradients(vlm, batch)
    with route(vlm, alternating(vlm)):
        assert_same(losses_and_gradients(vlm, batch), slow)
        assert_same(losses_and_gradients(vlm, batch, PACKED), slow)


def kept_bytes(vlm: Vlm, batch: Batch) -> int:
    """Bytes kept for the backward pass."""
    held: dict[int, torch.Tensor] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        losses = answer_losses(vlm, vlm.model, batch)
    del losses
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_no_activation_of_an_image_token_is_kept_outside_the_route() -> None:
    # What a layer more keeps does not depend on the number of image tokens.
    kept = {}
    for depth in (4, 8):
        for size in (32, 96):
            tower = {**pico.MORE["llava_llama"]["vision_config"], "image_size": size}
            changes = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
            text = {"model_type": "llama", **pico._TEXT, "num_hidden_layers": depth}
            vlm = Vlm.of(pico.pico("llava", vision_config=tower, text_config=text, **changes))
            select(vlm, Region.parse("0", depth))
            number = (size // 8) ** 2
            ids = torch.cat([torch.arange(10, 14), torch.full((number,), 6), torch.arange(20, 36)])[None]
            labels = torch.where(torch.arange(ids.shape[1]) < number + 8, -100, ids)
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.ones(1, 3, size, size),
            }
            with route(vlm, Region.parse("0", depth)):
                kept[depth, size] = kept_bytes(vlm, Batch(inputs, labels, ids == 6, ("",)))
    assert kept[8, 96] - kept[4, 96] == kept[8, 32] - kept[4, 32]
    assert kept[4, 96] > kept[4, 32]


RAW = {operation: partial(formula) for operation, formula in FORMULAS.items() if operation not in flop_registry}
for formula in RAW.values():
    vars(formula)["_get_raw"] = True


@pytest.mark.parametrize("fast_paths", [PADDED, PACKED])
@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_of_a_pass_outlives_it(llava: tuple[Vlm, Batch], fast_paths: FastPaths, recomputed: bool) -> None:
    # Without a reference cycle: activations in one would stay until Python looks for cycles, many steps later.
    vlm, batch = llava
    tokens: list[weakref.ref[Any]] = []
    hook = vlm.layers[1].register_forward_pre_hook(lambda *_: tokens.append(weakref.ref(running_tokens(vlm.model))))
    gc.disable()
    try:
        with route(vlm, alternating(vlm)), checkpointed(vlm) if recomputed else nullcontext():
            losses_and_gradients(vlm, batch, fast_paths)
        assert tokens
        assert [one for one in tokens if one() is not None] == []
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("name", ["llava_llama", "llava_phi3", "llava_gemma2", "qwen3_vl"])
def test_the_formula_counts_what_is_multiplied(name: str) -> None:
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160}
    vlm = Vlm.of(pico.pico_more(name, **wide)) if name in pico.MORE else in_family(name)
    prompt = pico.pico_prompts(name)["image"] if name in pico.MORE else family_batch(vlm, name).inputs
    image = int(vlm.image_token_id or 6)
    one = {
        key: value[:1] if key in ("input_ids", "attention_mask", "mm_token_type_ids") else value
        for key, value in prompt.items()
    }
    if name == "qwen3_vl":
        patches = int(one["image_grid_thw"][0].prod())
        one |= {"image_grid_thw": one["image_grid_thw"][:1], "pixel_values": one["pixel_values"][:patches]}
        there = one["attention_mask"][0].bool()
        one |= {key: one[key][:, there] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in one}
    images = int((one["input_ids"] == image).sum())
    for region in (alternating(vlm), Region.parse("all", vlm.depth)):
        with torch.no_grad(), route(vlm, region, image_token_id=image):
            vlm.model(**one)  # what a first pass learns is not counted
            with FlopCounterMode(display=False, custom_mapping=RAW) as counter:
                vlm.model(**one)
        counts = counter.get_flop_counts()
        found = sum(sum(counts[name].values()) for name in counts if name.rpartition(".")[0].endswith(vlm.parts.layers))
        expected = 2 * multiply_adds(vlm, region, image=images, text=one["input_ids"].shape[1] - images)
        assert found == pytest.approx(expected, rel=0.02)


def test_a_checkpoint_stays_plain_and_one_call_turns_its_route_on(tmp_path: Path, llava: tuple[Vlm, Batch]) -> None:
    vlm, batch = llava
    with route(vlm, alternating(vlm)), torch.no_grad():
        routed = vlm.model(**batch.inputs).logits
        write_route(vlm.model.config, alternating(vlm))
        vlm.model.save_pretrained(tmp_path)
    with torch.no_grad():
        plain = vlm.model(**batch.inputs).logits
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(model(**batch.inputs).logits, plain)
        found = route(model)
        assert found.region == alternating(vlm)
        assert torch.equal(model(**batch.inputs).logits, routed)
        found.remove()
        assert torch.equal(model(**batch.inputs).logits, plain)
    write_route(vlm.model.config, Region.parse("all", vlm.depth))
    assert not hasattr(vlm.model.config, ENTRY)
    assert read_route(vlm.model.config) is None


def test_a_copy_of_a_routed_model_runs_its_own_weights(llava: tuple[Vlm, Batch]) -> None:
    vlm, batch = llava
    with route(vlm, alternating(vlm)), torch.no_grad():
        before = vlm.model(**batch.inputs).logits
        copied = deepcopy(vlm.model)
        for parameter in vlm.model.parameters():
            parameter.zero_()
        assert torch.equal(copied(**batch.inputs).logits, before)


def test_a_route_ends_with_its_block_though_layers_were_dropped(model: Path) -> None:
    vlm = striate.load(model)
    with route(vlm, [0, 3], image_token_id=vlm.image_token_id) as routed:
        striate.drop_layers(vlm, [1])
        assert running_route(vlm.model) is routed
        assert routed.region == Region((0, 2), 3)
    assert not any("forward" in vars(module) for module in vlm.model.modules())
    with route(vlm, [2]), pytest.raises(striate.UserError, match="the route has no layer"):
        striate.drop_layers(vlm, [2])
    assert vlm.depth == 3


def test_forms_of_a_route() -> None:
    trained = Region.parse("1,3", 8)
    assert resolve("none", trained) is None
    assert str(resolve("same", trained)) == "0,1,3"
    assert str(resolve("2,5", trained)) == "2,5"
    assert resolve("all", trained) is None
    assert resolve(trained, trained) == trained


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-9", "--route 0-9: layer 9 does not exist; this model's depth is 8"),
        ("auto", "unknown region form 'auto'.*; or none, same"),
        ("first:0", "asks for 0"),
        (Region((0, 2), 6), "the route 0,2 is for 6 decoder layers, this model has 8"),
        (Region((), 8), "the route has no layer"),
    ],
)
def test_a_bad_form_of_a_route(text: Region | str, message: str) -> None:
    with pytest.raises(striate.UserError, match=message):
        resolve(text, Region.parse("1,3", 8))


def test_bad_routes(llava: tuple[Vlm, Batch]) -> None:
    vlm, _ = llava
    with pytest.raises(striate.UserError, match="the route 0,2 is for 6 decoder layers, this model has 4"):
        route(vlm, Region.parse("0,2", 6))
    with pytest.raises(striate.UserError, match="the route has no layer"):
        route(vlm, Region.parse("none", 4))
    with pytest.raises(striate.UserError, match=f"this llava model has no route: its config has no '{ENTRY}'"):
        route(vlm)
    setattr(vlm.model.config, ENTRY, [0, 2])
    with pytest.raises(striate.UserError, match=f"the config holds no route under '{ENTRY}': expected"):
        route(vlm)
    with route(vlm, alternating(vlm)):
        with pytest.raises(striate.UserError, match="this llava model is routed already: remove that route first"):
            route(vlm, alternating(vlm))
        with pytest.raises(striate.UserError, match="finds image tokens in input_ids"):
            vlm.model(inputs_embeds=torch.zeros(1, 4, 32))
    vlm.model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(striate.UserError, match="flash_attention_2 does not: load the model with sdpa"):
        route(vlm, alternating(vlm))

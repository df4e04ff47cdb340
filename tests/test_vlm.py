"""The parts of twelve families, found without per-model code, and what trains by exact name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from pico import DEPTH, FAMILIES, pico, pico_llava
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig

import striate
from striate.region import Region
from striate.routing import route
from striate.runs.cli import main
from striate.train import lora_config
from striate.vlm import Vlm, find_parts, load_on_meta, select
from striate.vlm.reading import read_model
from striate.weights import tensors

# What a person reads off the model's code, to hold the rule against.
TOWERS = {"idefics3": "model.vision_model", "smolvlm": "model.vision_model"} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "model.visual"
)
PROJECTORS = {
    "idefics3": ("model.connector",),
    "smolvlm": ("model.connector",),
    "qwen2_vl": ("model.visual.merger",),
    "qwen2_5_vl": ("model.visual.merger",),
    "qwen3_vl": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    "llava_next": ("model.multi_modal_projector", "model.image_newline"),
    "llava_onevision": ("model.multi_modal_projector", "model.image_newline"),
}
LAYERS = dict.fromkeys(("idefics3", "smolvlm"), "model.text_model.layers")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_family(family: str) -> None:
    vlm = Vlm.of(pico(family))
    assert vlm.parts.tower == TOWERS.get(family, "model.vision_tower")
    assert vlm.parts.projector == PROJECTORS.get(family, ("model.multi_modal_projector",))
    assert vlm.parts.layers == LAYERS.get(family, "model.language_model.layers")
    assert vlm.depth == DEPTH
    assert vlm.head is vlm.model.get_output_embeddings()
    assert isinstance(vlm.image_token_id, int)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_only_sets_exactly_the_plan(family: str) -> None:
    vlm = Vlm.of(pico(family))
    region = Region((1, 3), DEPTH)
    plan = select(vlm, region)
    trained = {name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}
    assert trained == set(plan.names)
    assert plan.trainable == sum(p.numel() for p in vlm.model.parameters() if p.requires_grad)
    assert plan.total == sum(p.numel() for p in vlm.model.parameters())
    # Exactly the modules of layers 1 and 3, by identity and not by name.
    inside = {id(p) for layer in region for p in vlm.layers[layer].parameters()}
    named = dict(vlm.model.named_parameters())
    assert {id(named[name]) for name in plan.layers} == inside
    frozen = select(vlm, region, projector=False)
    assert frozen.names == plan.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_names_only_the_regions_linear_modules(family: str) -> None:
    vlm = Vlm.of(pico(family))
    targets = vlm.linear_modules(Region((2,), DEPTH))
    inside = {id(module) for module in vlm.layers[2].modules() if isinstance(module, torch.nn.Linear)}
    assert {id(vlm.model.get_submodule(name)) for name in targets} == inside
    assert len(targets) == 7


def test_the_tower_trains_on_request_and_the_merger_inside_it_counts_once() -> None:
    vlm = Vlm.of(pico("qwen2_5_vl"))
    plan = select(vlm, Region((), DEPTH), projector=True, tower=True)
    assert not set(plan.projector) & set(plan.tower)
    below = {name for name, _ in vlm.model.named_parameters() if name.startswith("model.visual.")}
    assert set(plan.projector) | set(plan.tower) == below


def test_nothing_to_train_and_other_depths_are_refused() -> None:
    vlm = Vlm.of(pico("llava"))
    with pytest.raises(striate.UserError, match="nothing would train"):
        select(vlm, Region((), DEPTH), projector=False)
    with pytest.raises(striate.UserError, match="32 decoder layers, this model has 4"):
        select(vlm, Region((0,), 32))
    with pytest.raises(striate.UserError, match="32 decoder layers, this model has 4"):
        vlm.linear_modules(Region((0,), 32))


def test_a_region_may_be_named_by_text_or_numbers() -> None:
    vlm = Vlm.of(pico("llava"))
    region = Region((1, 3), DEPTH)
    assert select(vlm, [1, 3]).names == select(vlm, "1,3").names == select(vlm, region).names
    expected = lora_config(vlm, region).target_modules
    assert lora_config(vlm, "1,3").target_modules == lora_config(vlm, [3, 1]).target_modules == expected
    with route(vlm, "1,3") as routed:
        assert routed.region == region


def test_a_model_without_known_parts_is_rejected() -> None:
    bart = BartForConditionalGeneration(
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32,
            encoder_attention_heads=2, decoder_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(striate.UserError, match="bart is an encoder-decoder"):
        find_parts(bart)
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    )
    with pytest.raises(striate.UserError, match="no vision tower of its own; found only: embed_tokens"):
        find_parts(llama)


def test_logits_at_positions_are_the_models_own() -> None:
    vlm = Vlm.of(pico("gemma3"))  # one with a soft-capped, tied head
    ids = torch.randint(10, 100, (2, 7))
    positions = torch.zeros(2, 7, dtype=torch.bool)
    positions[0, 2] = positions[0, 5] = positions[1, 6] = True
    with torch.no_grad():
        whole = vlm.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        with vlm.head_at(positions):
            some = vlm.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        again = vlm.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(some[0], whole[positions])
    torch.testing.assert_close(again, whole)


def test_load_reads_folders_and_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    folder = pico_llava(tmp_path / "llava")
    vlm = striate.load(folder, dtype="bfloat16", device="cpu", attn="eager")
    assert vlm.model.dtype == torch.bfloat16
    assert vlm.model.config._attn_implementation == "eager"
    assert vlm.image_token_id == vlm.tokenizer.convert_tokens_to_ids("<image>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(striate.UserError, match=r"empty is not a model folder: it has no config\.json"):
        striate.load(tmp_path / "empty")
    with pytest.raises(striate.UserError, match="no model at 'no/such-model'"):
        striate.load("no/such-model")
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "text")
    with pytest.raises(striate.UserError, match="llama model, which is not an image-text-to-text model"):
        striate.load(tmp_path / "text")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    # transformers fills what is missing with random numbers and a warning.
    folder = pico_llava(tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(striate.UserError, match=r"lacks 9 weights of a llava model, such as model\..*\.layers\.4"):
        striate.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(striate.UserError, match=r"has no model\.safetensors: weights are read from safetensors only"):
        striate.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_has_the_models_parts_and_sizes(family: str, tmp_path: Path) -> None:
    vlm = Vlm.of(pico(family))
    vlm.model.config.save_pretrained(tmp_path)
    meta = load_on_meta(tmp_path)
    assert meta.parts == vlm.parts
    assert meta.device.type == "meta"
    assert meta.model.dtype == vlm.model.dtype
    assert select(meta, Region((1,), DEPTH)) == select(vlm, Region((1,), DEPTH))


def test_inspect_reads_a_folder_with_no_more_than_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico("idefics3").config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "model.text_model.layers (depth 4)" in shown
    assert "model.connector" in shown
    assert "published" not in shown
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cannot build the idefics3 model from its config: embed_dim must be divisible by num_heads" in error
    assert error.count("\n") == 1


def test_inspect_lists_published_sets_for_the_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico_llava(tmp_path, num_hidden_layers=40)
    assert main(["inspect", str(tmp_path)]) == 0
    assert re.findall(r"published +(\S+) +(\S+)", capsys.readouterr().out) == [("known:vica", "0,6,8-10,13,14,16")]


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_a_config_without_the_image_token_gets_advice(name: str, tmp_path: Path) -> None:
    folder = pico_llava(tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    written = config.pop("image_token_index", None) or config.pop("image_token_id")
    (folder / "config.json").write_text(json.dumps(config))
    vlm = striate.load(folder)
    message = rf"expects image token 32000, its processor writes {written} \(<image>\): set (\w+) to 6 in config.json"
    with pytest.raises(striate.UserError, match=message):
        _ = vlm.processor
    (folder / "config.json").write_text(json.dumps({**config, name: written}))
    assert striate.load(folder).processor.image_token == "<image>"


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_tower_with_short_names_is_saved_under_the_published_ones(family: str, tmp_path: Path) -> None:
    """transformers 5 writes `vision_tower.encoder...` for a model made from a config: vLLM knows no such names."""
    pico(family).save_pretrained(tmp_path / "short")
    model, _ = read_model(str(tmp_path / "short"), AutoConfig.from_pretrained(tmp_path / "short"))
    model.save_pretrained(tmp_path / "saved")
    short, saved = (sorted(one.name for one in tensors(tmp_path / name)) for name in ("short", "saved"))
    assert not any("vision_model" in name for name in short)
    assert saved == sorted(re.sub(r"(?<=vision_tower\.)", "vision_model.", name) for name in short)
    again, _ = read_model(str(tmp_path / "saved"), model.config)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())

"""New LVLMs: both parts keep their weights, and plain transformers loads and runs the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_tokenizer
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import striate
from striate.studies.assemble import assemble
from striate.studies.assemble.processor import wording
from striate.weights import tensors

SIZE = {"height": 32, "width": 32}
TOWER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = pico_tokenizer()
    config = LlamaConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, vocab_size=len(tokenizer),
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def test_the_default_of_a_language_models_templates_is_taken() -> None:
    tokenizer = pico_tokenizer()
    expected = wording(None, tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ 'other' }}"}
    assert wording(None, tokenizer) == expected
    assert "other" not in expected.template


def ask(folder: Path) -> torch.Tensor:
    """Logits and a generated answer in plain transformers; returns the image features' shape by way of the prompt."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.new("RGB", (50, 40), "red")], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    assert torch.isfinite(model(**inputs).logits).all()
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    return (inputs["input_ids"] == model.config.image_token_id).sum()


def test_fresh_tower(llm: Path, tmp_path: Path) -> None:
    run = assemble(vision="tiny", llm=str(llm), out=tmp_path / "run", image_size=32, patch_size=8, dtype="float32")
    assert ask(run.checkpoint) == 16
    vlm = striate.load(run.path)
    assert type(vlm.model).__name__ == "LlavaForConditionalGeneration"
    stored = {one.name for one in tensors(run.checkpoint) if one.name.startswith("vision_tower.")}
    assert len(stored) > 1
    assert all(name.startswith("vision_tower.vision_model.") for name in stored)  # as published: vLLM knows no other
    assert vlm.model.config.vision_feature_layer == -1
    made = run.info["options"]  # a report sets runs apart by them
    assert (made["image_size"], made["patch_size"], made["dtype"]) == (32, 8, "float32")
    language = AutoModelForCausalLM.from_pretrained(llm)
    ids = torch.tensor([[2, 8, 9, 10]])
    torch.testing.assert_close(vlm.model(input_ids=ids).logits, language(input_ids=ids).logits)


def test_pooling_quarters_the_image_tokens(llm: Path, tmp_path: Path) -> None:
    run = assemble(vision="tiny", llm=str(llm), out=tmp_path / "run", image_size=32, patch_size=8, pool=2)
    assert ask(run.checkpoint) == 4
    with pytest.raises(striate.UserError, match="pool is 3"):
        assemble(vision="tiny", llm=str(llm), out=tmp_path / "three", pool=3)


def test_clip_tower_gives_patches_without_the_class_token(llm: Path, tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size=SIZE, crop_size=SIZE).save_pretrained(tmp_path / "clip")
    run = assemble(vision=str(tmp_path / "clip"), llm=str(llm), out=tmp_path / "run")
    assert ask(run.checkpoint) == 16
    assert striate.load(run.path).model.config.vision_feature_layer == -2


def test_of_a_two_tower_checkpoint_the_vision_half_is_taken(llm: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))
    whole.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessorPil(size=SIZE).save_pretrained(tmp_path / "siglip")
    run = assemble(vision=str(tmp_path / "siglip"), llm=str(llm), out=tmp_path / "run", dtype="float32")
    ours = striate.load(run.path).tower.state_dict()
    theirs = whole.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ask(run.checkpoint) == 16


def test_trained_projector(llm: Path, tmp_path: Path) -> None:
    first = assemble(vision="tiny", llm=str(llm), out=tmp_path / "a", image_size=32, patch_size=8, dtype="float32")
    projector = striate.load(first.path).projector[0]
    weights = {name: value + 1 for name, value in projector.state_dict().items()}
    save_file(weights, tmp_path / "projector.safetensors")
    settings = {"vision": "tiny", "llm": str(llm), "image_size": 32, "patch_size": 8, "dtype": "float32"}
    second = assemble(**settings, projector=tmp_path / "projector.safetensors", out=tmp_path / "b")
    found = striate.load(second.path).projector[0].state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    save_file({"linear_1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(striate.UserError, match=r"other\.safetensors does not fit: found .*\(2, 2\).*expected"):
        assemble(**settings, projector=tmp_path / "other.safetensors", out=tmp_path / "c")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seed": 10**20}, "--seed 100000000000000000000: 0 to 4294967295"),
        ({"patch_size": 0}, "--patch-size 0: at least 1"),
        ({"image_size": 10, "patch_size": 14}, "--image-size 10: at least 14"),
        ({"image_size": 14, "patch_size": 14, "pool": 2}, "--image-size 14: at least 28"),
        ({"feature_layer": 99}, "--feature-layer 99: the tower has 5 hidden states, -5 to 4"),
        ({"feature_layer": -6}, "--feature-layer -6: the tower has 5 hidden states"),
    ],
    ids=str,
)
def test_a_model_that_could_not_see_is_not_assembled(
    llm: Path, tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(striate.UserError, match=f"^{words}"):
        assemble(vision="tiny", llm=str(llm), out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_missing_parts_are_reported(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(striate.UserError, match=r"no vision encoder at 'huge'.*tiny, small, base"):
        assemble(vision="huge", llm=str(llm), out=tmp_path / "a")
    with pytest.raises(striate.UserError, match=r"no language model at .*expected a folder, a hub id or a \.gguf file"):
        assemble(vision="tiny", llm=str(tmp_path / "none"), out=tmp_path / "b")
    assert not (tmp_path / "a").exists()

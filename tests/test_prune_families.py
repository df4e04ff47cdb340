"""Cut, reload and cached generation, family by family; and the layers that a family needs at their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import templates
import torch
from asking import in_family
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from striate.errors import UserError
from striate.prune import Numbering, Surgery, bypass, drop_layers, protected_layers
from striate.prune.proof import observe, verify_cut, verify_saved
from striate.prune.protected import protected_by_config
from striate.region import Region
from striate.roundtrip import Inputs, probes
from striate.vlm import Vlm, load

DEPTH = 6
WITH_PROCESSOR = [name for name in templates.FAMILIES if name != "mistral3"]  # whose processor needs torchvision
KINDS = {"lfm2_vl": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]}
KINDS |= dict.fromkeys(("aya_vision", "cohere2_vision", "llava_gemma2"), ["sliding_attention", "full_attention"] * 3)


def in_more(name: str) -> tuple[PreTrainedModel, dict[str, Inputs]]:
    kinds = {"layer_types": KINDS[name]} if name in KINDS else {}
    return pico.pico_more(name, depth=DEPTH, **kinds), pico.pico_prompts(name)


def with_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, dict[str, Inputs]]:
    settings = pico.FAMILIES[name]
    deeper = {**settings, "text_config": {**settings["text_config"], "num_hidden_layers": DEPTH}}
    monkeypatch.setitem(pico.FAMILIES, name, deeper)
    vlm = in_family(name)
    with torch.no_grad():
        for parameter in vlm.model.parameters():  # fresh weights are so small that layers hardly matter
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    return vlm.model, probes(vlm)


def test_a_processor_that_needs_an_image_gives_no_text_to_verify_with() -> None:
    vlm = in_family("got_ocr2")
    assert [*probes(vlm)] == ["image"]
    assert drop_layers(vlm, [1]).vlm.depth == 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its processor
def test_a_model_that_fails_in_the_verification_is_refused_and_stays_whole() -> None:
    vlm = in_family("ernie4_5_vl_moe")  # transformers does not generate with it without a cache
    with pytest.raises(UserError, match=r"layers 1 cannot be cut from this .* with them bypassed the model fails"):
        drop_layers(vlm, [1])
    assert vlm.depth == 4


def cut_and_reload(
    model: PreTrainedModel, prompts: dict[str, Inputs], folder: Path, layers: tuple[int, ...], **save: Any
) -> Vlm:
    """Save a model, cut layers from the checkpoint with every verification, load the result."""
    source, target = folder / "source", folder / "cut"
    model.save_pretrained(source, **save)
    vlm = load(source, dtype="float32", device="cpu")
    numbers = Numbering(Region(layers, vlm.depth))
    surgery = Surgery.of(vlm, source, numbers)
    expected = verify_cut(vlm, numbers, prompts)
    assert vlm.depth == numbers.depth
    surgery.write(source, target)
    verify_saved(
        target, expected, prompts, numbers=numbers, device=torch.device("cpu"), dtype="float32", attn=None
    )  # fmt: skip
    return load(target, device="cpu")


def check(model: PreTrainedModel, prompts: dict[str, Inputs], folder: Path, layers: tuple[int, ...]) -> None:
    whole = Vlm.of(model)
    with bypass(whole, layers):
        bypassed = observe(whole, prompts)
    found = observe(cut_and_reload(model, prompts, folder, layers), prompts)
    untouched = observe(whole, prompts)
    for name, tensor in bypassed.items():
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(untouched[name], tensor) for name, tensor in bypassed.items())
    for prompt in prompts:
        cached, uncached = (found[f"text generated for the {prompt} prompt with{out} cache"] for out in ("", "out"))
        assert torch.equal(cached, uncached)


# The first layer keeps the cache's length, and what is left changes its neighbors and the order of its kinds.
LAYERS = dict.fromkeys((*WITH_PROCESSOR, *pico.MORE), (0, 3, 5)) | {"qwen3_vl": (3, 5), "mllama": (0, 4)}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_a_family_with_its_processor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*with_processor(name, monkeypatch), tmp_path, LAYERS[name])


@pytest.mark.parametrize("name", pico.MORE)
def test_a_family_of_more(name: str, tmp_path: Path) -> None:
    check(*in_more(name), tmp_path, LAYERS[name])


def test_what_is_protected() -> None:
    assert protected_layers(Vlm.of(pico.pico("llava"))) == {}
    assert protected_layers(Vlm.of(pico.pico("qwen3_vl"))) == dict.fromkeys(
        (0, 1), "DeepStack adds image features behind it, by its number"
    )
    mllama = Vlm.of(pico.pico_more("mllama"))
    assert protected_layers(mllama) == dict.fromkeys((1, 3), "its cross-attention is how the image gets in")
    assert set(protected_by_config(AutoConfig.for_model("gemma3n"), 35)) == set(range(35))
    gemma = AutoConfig.for_model(
        "gemma3n", text_config={"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 15}
    )  # the last 15 share with the last sliding and the last full layer before them
    assert set(protected_by_config(gemma, 35)) == {18, 19, *range(20, 35)}


def test_protection_is_no_more_than_the_proof_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = with_processor("qwen3_vl", monkeypatch)
    with pytest.raises(UserError, match=r"layers 1 cannot be cut from this qwen3_vl model: .* for the image prompt"):
        cut_and_reload(model, prompts, tmp_path, (1,))
    assert not (tmp_path / "cut").exists()


def test_layers_listed_by_number_keep_their_place(tmp_path: Path) -> None:
    model, prompts = in_more("mllama")
    vlm = cut_and_reload(model, prompts, tmp_path, (0, 4))
    assert vlm.model.config.text_config.cross_attention_layers == [0, 2]
    assert set(protected_layers(vlm)) == {0, 2}


def test_experts_and_layers_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every second layer has experts, every third no rotation: llama4 lists the one by number, the other layer by layer.
    text = {
        "moe_layers": [1, 3, 5], "no_rope_layers": [1, 1, 0, 1, 1, 0], "num_local_experts": 2,
        "intermediate_size_mlp": 64, "attention_chunk_size": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "projector_input_dim": 32, "projector_output_dim": 32,
        "vision_output_dim": 32,
    }  # fmt: skip
    settings = {"vision_config": vision, "text_config": pico.MORE["llava_llama"]["text_config"]}
    monkeypatch.setitem(pico.MORE, "llama4", settings)
    model = pico.pico_more("llama4", depth=DEPTH, model_type="llama4_text", **text)
    prompts = {"text": pico.pico_prompts("llava_llama")["text"]}
    vlm = cut_and_reload(model, prompts, tmp_path, (0, 3))
    config = vlm.model.config.get_text_config()
    assert (config.moe_layers, config.no_rope_layers) == ([0, 3], [1, 0, 1, 0])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")
    assert len(Vlm.of(loaded).layers) == 4

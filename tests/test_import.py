"""Original checkpoints, built tiny by their published names, against a direct computation from their tensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from paper import PAPER, full_size
from pico import WORDS
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import gelu, linear
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import striate
from striate.runs.run import Run
from striate.studies.assemble import assemble
from striate.studies.assemble.original import TOWERS
from striate.studies.assemble.processor import for_tower, pad_to_square

ENDS = ["</s>", "<|end_of_text|>", "<|endoftext|>"]
VOCABULARY = ["<pad>", "<unk>", "<s>", *ENDS, "USER:", "ASSISTANT:", *WORDS]
SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 256, "vocab_size": len(VOCABULARY), "pad_token_id": 0,
         "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8}  # fmt: skip
# original model_type: language model, tower, end of an answer
ORIGINALS = {
    "llava_llama": ("llama", "clip_vision_model", "</s>"),
    "bunny-llama": ("llama", "siglip_vision_model", "<|end_of_text|>"),
    "bunny-phi3": ("phi3", "siglip_vision_model", "<|endoftext|>"),
}


def save_tokenizer(folder: Path) -> None:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=ENDS,
    ).save_pretrained(folder)  # fmt: skip


class Tiny:
    """The parts of a tiny original, and what they compute."""

    def __init__(self, folder: Path, kind: str):
        torch.manual_seed(0)
        self.folder, self.kind = folder, kind
        text, tower, self.end = ORIGINALS[kind]
        self.language = AutoModelForCausalLM.from_config(AutoConfig.for_model(text, **SIZES)).eval()
        self.tower = AutoModel.from_config(AutoConfig.for_model(tower, **TOWER)).eval()
        for module in (self.language, self.tower):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        self.projector = {f"{n}.{k}": torch.randn(24, *s) for n, w in (("0", 16), ("2", 24)) for k, s in
                          (("weight", (w,)), ("bias", ()))}  # fmt: skip
        self.class_tokens = int(tower.startswith("clip"))

    def features(self, pixels: Tensor) -> Tensor:
        """What LLaVA and Bunny put in the place of an image: [tokens, dim]."""
        inner = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0, self.class_tokens :]
        hidden = gelu(linear(inner, self.projector["0.weight"], self.projector["0.bias"]))
        return linear(hidden, self.projector["2.weight"], self.projector["2.bias"])

    def logits(self, before: list[int], pixels: Tensor, after: list[int]) -> Tensor:
        embed = self.language.get_input_embeddings()
        parts = [embed(torch.tensor(before)), self.features(pixels), embed(torch.tensor(after))]
        return self.language(inputs_embeds=torch.cat(parts)[None]).logits

    def config(self, **changes: Any) -> dict[str, Any]:
        text = {k: v for k, v in self.language.config.to_dict().items() if k != "rope_parameters"}
        images = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16, "mm_vision_select_layer": -2,
                  "mm_vision_tower": "somebody/a-tower", "image_aspect_ratio": "pad", "use_mm_proj": True,
                  "tokenizer_model_max_length": 2048, "rope_theta": 5000.0}  # fmt: skip
        self.language.config.rope_parameters["rope_theta"] = 5000.0
        self.language.model.rotary_emb.__init__(self.language.config)  # type: ignore[misc]
        return text | images | {"model_type": self.kind} | changes

    def whole(self, *, tower: bool) -> dict[str, Tensor]:
        tensors = dict(self.language.state_dict())
        tensors |= {f"model.mm_projector.{name}": value for name, value in self.projector.items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # as old transformers saved it
        if tower:
            inside = "model.vision_tower.vision_tower.vision_model."
            tensors |= {inside + name: value for name, value in self.tower.state_dict().items()}
        return {name: value.clone() for name, value in tensors.items()}

    def save(self, **changes: Any) -> Path:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config(**changes)))
        save_tokenizer(self.folder)
        return self.folder

    def save_bin(self, tensors: dict[str, Tensor]) -> None:
        """In two shards, as liuhaotian/llava-v1.5-* are."""
        names = sorted(tensors)
        half = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(half.values()):
            torch.save({name: tensors[name] for name in names if half[name] == file}, self.folder / file)
        (self.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": half}))

    def save_tower(self, folder: Path) -> str:
        self.tower.save_pretrained(folder)
        return str(folder)

    def save_base(self, folder: Path) -> str:
        self.language.save_pretrained(folder)
        save_tokenizer(folder)
        return str(folder)


def check_logits(run: Run, tiny: Tiny, **tolerance: float) -> None:
    """The imported model in plain transformers says what the original's own tensors do."""
    model = AutoModelForImageTextToText.from_pretrained(run.checkpoint).eval()
    assert isinstance(model, LlavaForConditionalGeneration)
    pixels = torch.randn(1, 3, 32, 32)
    before, after = [2, 6, 9], [10, 11, 12, 7]
    ids = torch.tensor([before + [model.config.image_token_id] * 16 + after])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits
        wanted = tiny.logits(before, pixels, after)
    torch.testing.assert_close(found[..., : wanted.shape[-1]].float(), wanted, **tolerance)
    assert (found.argmax(-1) < wanted.shape[-1]).all()  # never the image token
    vlm = striate.load(run.path)  # which refuses checkpoints that lack weights
    assert vlm.depth == 3


@pytest.mark.parametrize("kind", ORIGINALS)
def test_whole_checkpoints(kind: str, tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "original", kind)
    tiny.save()
    if kind == "llava_llama":  # shards that are pickled, and no tower: LLaVA loads CLIP by its name
        tiny.save_bin(tiny.whole(tower=False))
    else:  # Bunny unfreezes its tower, and keeps it
        save_file(tiny.whole(tower=True), tiny.folder / "model.safetensors")
    run = assemble(import_=str(tiny.folder), vision=tiny.save_tower(tmp_path / "tower"), out=tmp_path / "run")
    check_logits(run, tiny)
    config = json.loads((run.checkpoint / "config.json").read_text())
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == ("default" if tiny.class_tokens else "full")
    processor = AutoProcessor.from_pretrained(run.checkpoint)
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "what is this ? "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    system = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions.")  # fmt: skip
    text = processor.apply_chat_template(turns)
    assert text == f"{system} USER: <image>\nwhat is this ? ASSISTANT: a cat{tiny.end}"
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
    assert prompt == f"{system} USER: <image>\nwhat is this ? ASSISTANT:"
    inputs = processor(text=[prompt], images=[Image.new("RGB", (50, 20), "red")], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    model = AutoModelForImageTextToText.from_pretrained(run.checkpoint)
    ends = sorted({VOCABULARY.index("</s>"), VOCABULARY.index(tiny.end)})  # the tokenizer's, and the wording's
    assert model.generation_config.eos_token_id == (ends if ends[1:] else ends[0])


def test_the_own_tower_wins_and_unread_layers_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(tmp_path / "original", "bunny-llama")
    monkeypatch.setitem(TOWERS, "a-tower", TOWER | {"model_type": "siglip_vision_model"})
    tiny.save()
    tensors = {name: value for name, value in tiny.whole(tower=True).items() if "encoder.layers.2." not in name}
    save_file(tensors, tiny.folder / "model.safetensors")
    run = assemble(import_=str(tiny.folder), out=tmp_path / "run")
    check_logits(run, tiny)
    assert striate.load(run.path).model.config.vision_feature_layer == -1


@pytest.mark.parametrize("kind", ["llava_llama", "bunny-phi3"])
def test_lora_deltas_are_merged_into_their_base(kind: str, tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "llava-lora", kind)
    tiny.save()
    base = tiny.save_base(tmp_path / "base")
    deltas = {}
    for name, module in tiny.language.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            a, b = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
            deltas |= {f"base_model.model.{name}.lora_{half}.weight": v for half, v in (("A", a), ("B", b))}
            module.weight.data += 8 / 2 * b @ a
    torch.save(deltas, tiny.folder / "adapter_model.bin")
    adapter = {"r": 2, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (tiny.folder / "adapter_config.json").write_text(json.dumps(adapter))
    beside = {f"base_model.model.model.mm_projector.{name}": value for name, value in tiny.projector.items()}
    torch.save(beside, tiny.folder / "non_lora_trainables.bin")
    tower = tiny.save_tower(tmp_path / "tower")
    run = assemble(import_=str(tiny.folder), llm=base, vision=tower, out=tmp_path / "run")
    check_logits(run, tiny, rtol=1e-4, atol=1e-4)
    with pytest.raises(striate.UserError, match=r"LoRA deltas: give --llm.*lmsys/vicuna-7b-v1\.5"):
        assemble(import_=str(tiny.folder), vision=tower, out=tmp_path / "none")
    (tiny.folder / "adapter_config.json").write_text(json.dumps(adapter | {"use_dora": True}))
    with pytest.raises(striate.UserError, match="sets use_dora to True: only plain LoRA"):
        assemble(import_=str(tiny.folder), llm=base, vision=tower, out=tmp_path / "dora")


def stage_1(tiny: Tiny) -> None:
    tiny.save()
    weights = {f"model.mm_projector.{name}": value for name, value in tiny.projector.items()}
    torch.save(weights, tiny.folder / "mm_projector.bin")


@pytest.mark.parametrize("kind", ORIGINALS)
def test_stage_1_projectors_go_both_ways(kind: str, tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "pretrain", kind)
    stage_1(tiny)
    parts = {"llm": tiny.save_base(tmp_path / "base"), "vision": tiny.save_tower(tmp_path / "tower")}
    run = assemble(import_=str(tiny.folder / "mm_projector.bin"), **parts, out=tmp_path / "run")
    check_logits(run, tiny)
    back = assemble(export_projector=str(run.path), out=tmp_path / "back").checkpoint
    found = torch.load(back / "mm_projector.bin", weights_only=True)
    wanted = torch.load(tiny.folder / "mm_projector.bin", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((back / "config.json").read_text())["model_type"] == kind
    again = assemble(import_=str(tmp_path / "back"), **parts, out=tmp_path / "again")
    check_logits(again, tiny)


def test_types_are_kept_or_changed(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "original", "llava_llama")
    tiny.save()
    save_file({k: v.half() for k, v in tiny.whole(tower=True).items()}, tiny.folder / "model.safetensors")
    tower = tiny.save_tower(tmp_path / "tower")
    kept = assemble(import_=str(tiny.folder), vision=tower, out=tmp_path / "kept")
    assert striate.load(kept.path).model.dtype == torch.float16
    changed = assemble(import_=str(tiny.folder), vision=tower, out=tmp_path / "changed", dtype="bfloat16")
    assert striate.load(changed.path).model.dtype == torch.bfloat16


def test_padding_is_that_of_the_originals() -> None:
    for kind, color in (("clip_vision_model", (122, 116, 104)), ("siglip_vision_model", (127, 127, 127))):
        own = for_tower(AutoConfig.for_model(kind, **TOWER))
        image = Image.effect_noise((60, 32), 90).convert("RGB")
        square = Image.new("RGB", (60, 60), color)
        square.paste(image, (0, 14))
        found = pad_to_square(own)(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, own(square, return_tensors="pt")["pixel_values"])


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def test_bad_checkpoints_are_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Tiny(tmp_path / "original", "llava_llama")
    tiny.save()
    tower = tiny.save_tower(tmp_path / "tower")
    weights = tiny.folder / "pytorch_model.bin"

    def refused(tensors: Any, match: str, **options: Any) -> None:
        torch.save(tensors, weights)
        with pytest.raises(striate.UserError, match=match):
            assemble(import_=str(tiny.folder), **{"vision": tower, **options}, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    whole = tiny.whole(tower=False)
    refused(whole, "give --vision, the folder of somebody/a-tower", vision=None)
    with pytest.MonkeyPatch.context() as known:
        known.setitem(TOWERS, "a-tower", TOWER | {"model_type": "clip_vision_model"})
        refused(whole, "holds no weights of its vision tower: give --vision, the folder of somebody", vision=None)
    refused({k: v for k, v in whole.items() if "layers.1.mlp.up" not in k}, r"lacks 1 tensors.*layers\.1\.mlp\.up_proj")
    refused(whole | {"model.image_newline": torch.ones(24)}, r"no place for 1 tensors.*image_newline")
    refused(whole | {"model.mm_projector.0.weight": torch.ones(24, 8)}, r"projector does not fit.* 24 x 8 .*24 x 16")
    refused({"model.norm.weight": Code()}, "would run code when it is read; use a safetensors version")
    assert "never run" not in capsys.readouterr().out
    weights.write_bytes(pickle.dumps([1], protocol=2)[:-1])
    with pytest.raises(striate.UserError, match=r"pytorch_model\.bin"):
        assemble(import_=str(tiny.folder), vision=tower, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mistral"}, r"holds a mistral model: an original of llava_llama, llava, bunny-llama"),
        ({"mm_projector_type": "linear"}, "has a linear projector: a plain LLaVA supports mlp2x_gelu only"),
        ({"use_s2": True}, "sets use_s2"),
        ({"mm_use_im_start_end": True}, "sets mm_use_im_start_end"),
    ],
)
def test_other_originals_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "original", "llava_llama")
    tiny.save(**changes)
    with pytest.raises(striate.UserError, match=match):
        assemble(import_=str(tiny.folder), out=tmp_path / "run")


def test_missing_or_foreign_parts_are_reported(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "original", "llava_llama")
    stage_1(tiny)
    tower = tiny.save_tower(tmp_path / "tower")
    with pytest.raises(striate.UserError, match="a projector alone: give --llm"):
        assemble(import_=str(tiny.folder), vision=tower, out=tmp_path / "run")
    with pytest.raises(striate.UserError, match="no model at 'nowhere/at-all'"):
        assemble(import_=str(tiny.folder), vision=tower, llm="nowhere/at-all", out=tmp_path / "run")
    phi = Tiny(tmp_path / "phi", "bunny-phi3").save_base(tmp_path / "phi3")
    with pytest.raises(striate.UserError, match="is a phi3 model: llama was expected"):
        assemble(import_=str(tiny.folder), vision=tower, llm=phi, out=tmp_path / "run")
    with pytest.raises(striate.UserError, match="takes over projector, feature layer and pool"):
        assemble(import_=str(tiny.folder), pool=2, out=tmp_path / "run")
    with pytest.raises(striate.UserError, match="give --vision and --llm"):
        assemble(out=tmp_path / "run")


PUBLISHED = {"llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "bunny-llama-3-8b": 8.46, "bunny-phi3-mini-4b": 4.25}


@pytest.mark.parametrize("name", PAPER)
def test_full_size_parameters_are_the_published_ones(name: str) -> None:
    model = full_size(name)
    assert model.num_parameters() == PAPER[name][1]
    assert round(model.num_parameters() / 1e9, 2) == PUBLISHED[name]
    assert model.config.vision_feature_layer == -2

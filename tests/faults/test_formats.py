"""Formats of checkpoints: what goes in is read as `transformers` reads it, or refused; what comes out loads again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_llava
from safetensors.torch import load_file, save_file
from test_score_weights import by_name, language_model, shard
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

import striate
from striate import roundtrip
from striate.errors import UserError
from striate.roundtrip import verify
from striate.runs.evaluating import evaluate
from striate.runs.pruning import prune
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.training import tune
from striate.scores.weights import weight_scores
from striate.train import TrainOptions
from striate.vlm import load, reading
from striate.vlm.reading import check_config
from striate.weights import INDEX, WEIGHTS, tensors

OPTIONS = TrainOptions(
    batch=2, micro_batch=2, steps=1, warmup=0, learning_rate=1e-3, projector_learning_rate=1e-3, device="cpu",
    dtype="bfloat16",
)  # fmt: skip
FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
    "modules_to_not_convert": ["lm_head", "model.vision_tower", "model.multi_modal_projector"],
}  # fmt: skip
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
OTHERS = (
    "gptq", "awq", "compressed-tensors", "mxfp4", "hqq", "torchao", "auto-round", "fbgemm_fp8", "quanto", "aqlm",
    "eetq", "higgs", "bitnet", "vptq", "spqr", "modelopt", "nvfp4", "of tomorrow",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # As wide as a block of bitsandbytes: narrower ones its CPU kernels cannot run.
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    return pico_llava(tmp_path_factory.mktemp("pico") / "llava", **sizes)


Names = dict[str, Tensor]


def rewritten(
    model: Path, folder: Path, change: Callable[[Names], Names | None] = lambda _: None, **config: Any
) -> Path:
    """A copy of a checkpoint with other weights and other entries in its config ("text_config.key" for inner ones)."""
    shutil.copytree(model, folder)
    found = load_file(folder / WEIGHTS)
    save_file({k: v.contiguous() for k, v in (change(found) or found).items()}, folder / WEIGHTS, {"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        (about["text_config"] if key.startswith("text_") else about)[key.removeprefix("text_")] = value
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def in_type(dtype: torch.dtype) -> Callable[[Names], Names]:
    return lambda found: {name: tensor.to(dtype) for name, tensor in found.items()}


def in_fp8(found: Names) -> Names:
    """The decoder's matrices as DeepSeek and Qwen publish theirs: a scale for each block."""
    quantized = in_type(torch.bfloat16)(found)
    for name, weight in found.items():
        if ".layers." in name and name.startswith("language_model") and weight.dim() == 2:
            blocks = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # B 16 B 16
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            quantized[name] = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
            quantized[f"{name}_scale_inv"] = scale[:, 0, :, 0]
    return quantized


def in_bitsandbytes(model: Path, folder: Path, bits: int) -> Path:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    shutil.copytree(model, folder)
    options: dict[str, Any] = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
    AutoModelForImageTextToText.from_pretrained(model, **options).save_pretrained(folder)
    return folder


LORA = ("float16", "FP8", "head that is tied in the config alone")
FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "float16": lambda model, to: rewritten(model, to, in_type(torch.float16), dtype="float16"),
    "bfloat16": lambda model, to: rewritten(model, to, in_type(torch.bfloat16), dtype="bfloat16"),
    "FP8": lambda model, to: rewritten(model, to, in_fp8, dtype="bfloat16", quantization_config=FP8),
    "bitsandbytes, 4 bits": lambda model, to: in_bitsandbytes(model, to, 4),
    "bitsandbytes, 8 bits": lambda model, to: in_bitsandbytes(model, to, 8),
    "head that is tied in the config alone": lambda model, to: rewritten(
        model, to, tie_word_embeddings=True, text_tie_word_embeddings=True
    ),
    "plain weights, config of 4 bits": lambda model, to: rewritten(model, to, quantization_config=BNB),
}


def state(folder: Path) -> Names:
    """What plain transformers makes of a checkpoint, which it has to fit to the last key."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # says peft, and sees to it
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in FORMATS), *((name, "lora") for name in LORA)]
)
def test_what_is_trained_on_any_format_loads_again(
    model: Path, data: Path, tmp_path: Path, name: str, method: Any, note_fault: Callable[..., None]
) -> None:
    source = FORMATS[name](model, tmp_path / "source")
    run = tune(source, data=data, out=tmp_path / "run", method=method, region="1", options=OPTIONS)
    before, after = load(source, device="cpu", dequantize=True).model.state_dict(), state(run.checkpoint)
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: one.dtype for key, one in before.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    learned = {key for key in before if (".layers.1." in key and "language" in key) or "multi_modal_projector" in key}
    whole = bool(changed) and changed <= learned
    said = run.info.get("warnings", [])
    assert len(said) == ("bit" in name or name == "FP8"), said
    note_fault(f"checkpoint to train on: {name}", 1, int(whole))
    assert whole, sorted(changed - learned)


@pytest.mark.parametrize("name", ["float16", "FP8", "bitsandbytes, 8 bits"])
def test_any_format_is_evaluated_and_pruned(model: Path, data: Path, tmp_path: Path, name: str) -> None:
    source = FORMATS[name](model, tmp_path / "source")
    evaluate(source, data=data, out=tmp_path / "eval", options=ReadOptions(samples=1, device="cpu"))
    prune(source, layers="3", region="none", out=tmp_path / "pruned")
    run = Run.open(tmp_path / "pruned")
    assert load(run.checkpoint, device="cpu").depth == 3


def test_quantizations_that_cannot_be_trained_are_refused_before_weights_are_read(
    model: Path, data: Path, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    wrong = []
    folder = rewritten(model, tmp_path / "model")
    (folder / WEIGHTS).write_bytes(b"not to be read")
    plain = json.loads((folder / "config.json").read_text())
    for method in OTHERS:
        for place in ("", "text_config"):
            about = json.loads(json.dumps(plain))
            (about[place] if place else about)["quantization_config"] = {"quant_method": method, "bits": 4}
            (folder / "config.json").write_text(json.dumps(about))
            with pytest.raises(UserError) as refused:
                reading.read_model(str(folder), AutoConfig.from_pretrained(folder), dequantize=True)
            if f"is quantized ({method}) and cannot be trained" not in str(refused.value):
                wrong.append(f"{method}: {refused.value}")
    note_fault(
        "quantized checkpoints that cannot be trained (GPTQ, AWQ ...)", 2 * len(OTHERS), 2 * len(OTHERS) - len(wrong)
    )
    assert wrong == []


@pytest.mark.parametrize("name", ["FP8", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"])
def test_quantized_weights_without_a_word_in_the_config_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    source = FORMATS[name](model, tmp_path / "source")
    about = json.loads((source / "config.json").read_text())
    del about["quantization_config"]
    (source / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"holds quantized weights .*, but its config\.json has no quantization_config"):
        load(source, device="cpu")


def as_published(found: Names) -> Names:
    """The names of the tower's weights in checkpoints on the hub."""
    return {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): found[name] for name in found}


@pytest.mark.parametrize("name", ["FP8", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"])
def test_dequantized_weights_are_saved_under_the_names_that_were_read(model: Path, tmp_path: Path, name: str) -> None:
    """vLLM and transformers 4 know no other names; transformers 5 reads both."""
    published = rewritten(model, tmp_path / "published", as_published)
    vlm = load(FORMATS[name](published, tmp_path / "source"), device="cpu", dequantize=True)
    vlm.model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(published / WEIGHTS).keys()


# What is left over


def with_more(**more: str) -> Callable[[Names], Names]:
    return lambda found: found | {name: torch.ones(2) for name in more.values()}


DECODER = "language_model.model.layers"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("score.weight", "has 1 weights that a llava model does not use, such as score.weight"),
        (f"{DECODER}.4.eh_proj.weight", "weights that a llava model does not use"),
        ("vision_tower.vision_model.embeddings.position_ids", ""),
        (f"{DECODER}.0.self_attn.rotary_emb.inv_freq", ""),
    ],
)
def test_weights_that_are_left_over_are_named(model: Path, tmp_path: Path, name: str, note: str) -> None:
    notes = load(rewritten(model, tmp_path / "model", with_more(name=name)), device="cpu").notes
    assert len(notes) == bool(note)
    assert note in "".join(notes)


def test_layers_that_the_config_does_not_speak_of_are_refused(model: Path, tmp_path: Path) -> None:
    source = rewritten(model, tmp_path / "model", text_num_hidden_layers=3, text_layer_types=None)
    with pytest.raises(UserError, match=r"weights of model\..*\.layers\.3, but its config\.json has only 3 layers"):
        load(source, device="cpu")


def test_adapters_that_were_saved_unmerged_are_named(model: Path, tmp_path: Path) -> None:
    def unmerged(found: Names) -> Names:
        lora = {f"{DECODER}.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 64)}
        return {name.replace("q_proj.weight", "q_proj.base_layer.weight"): one for name, one in found.items()} | lora

    with pytest.raises(UserError, match=r"lacks 6 weights .* LoRA adapters that are not merged"):
        load(rewritten(model, tmp_path / "model", unmerged), device="cpu")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/'base"}))
    lines = r"""merge them .*from_pretrained\("some/'base"\); PeftModel.*adapters'\)\.merge_and_unload\(\)"""
    for opener in (lambda: load(adapters), lambda: tune(adapters, data=tmp_path, out=tmp_path / "run")):
        with pytest.raises(UserError, match=lines):
            opener()


# Two readers of one folder


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"gone": "model-00001-of-00002.safetensors"}}))


def older_shards(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    save_file({name: torch.zeros_like(one) for name, one in whole.items()}, folder / "aa.safetensors")
    shutil.copy(folder / "aa.safetensors", folder / "model.fp16.safetensors")
    shutil.copy(folder / "aa.safetensors", folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(whole, "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def shards_and_backups(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    shard(folder)
    save_file({name: torch.zeros_like(one) for name, one in whole.items()}, folder / "zz-backup.safetensors")
    (folder / "broken.safetensors").write_bytes(b"")  # nobody reads it


def an_empty_shard(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    save_file({"nothing": torch.ones(0, 4)}, folder / "empty.safetensors")
    (folder / INDEX).write_text(
        json.dumps(index | {"weight_map": index["weight_map"] | {"nothing": "empty.safetensors"}})
    )


def another_name(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(about | {"transformers_weights": "weights.safetensors"}))


def no_metadata(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)


def names_of_4_52(folder: Path) -> None:
    def renamed(name: str) -> str:
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
        return name if name.startswith("lm_head") else f"model.{name}"

    found = load_file(folder / WEIGHTS)
    assert any(name.startswith("language_model.model.") for name in found)
    save_file({renamed(name): one for name, one in found.items()}, folder / WEIGHTS, {"format": "pt"})


LAYOUTS = (
    stale_index, older_shards, shards_and_backups, an_empty_shard, another_name, no_metadata, names_of_4_52
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_sees_what_transformers_loads(
    tmp_path: Path, layout: Callable[[Path], None], note_fault: Callable[..., None]
) -> None:
    model, backbone = pico_llava(tmp_path / "llava"), language_model(tmp_path / "llm")
    plain = AutoModelForImageTextToText.from_pretrained(model)
    expected = by_name(weight_scores(model, backbone))
    assert expected["parameter_change"].values[0] > 1
    layout(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    assert all(torch.equal(one, loaded[name]) for name, one in plain.state_dict().items())
    same = by_name(weight_scores(model, backbone)) == expected
    ours = load(model, device="cpu").model.state_dict()
    same &= all(torch.equal(one, ours[name]) for name, one in loaded.items())
    prune(model, layers="3", region="none", out=tmp_path / "pruned")
    run = Run.open(tmp_path / "pruned")
    kept = AutoModelForImageTextToText.from_pretrained(run.checkpoint).state_dict()
    same &= all(torch.equal(one, loaded[name]) for name, one in kept.items()) and len(kept) == len(loaded) - 9
    note_fault("layouts of a model folder (stale index, backups, old names ...)", 1, int(same))
    assert same


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    model = pico_llava(tmp_path / "llava")
    shard(model)
    (model / "model-00002-of-00004.safetensors").unlink()
    for reader in (lambda: load(model), lambda: weight_scores(model, model), lambda: tensors(model)):
        with pytest.raises(UserError, match=r"lacks model-00002-of-00004\.safetensors, which .* lists; download it"):
            reader()


def test_pickles_are_named_with_the_way_out(tmp_path: Path) -> None:
    model = pico_llava(tmp_path / "llava")
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    for reader in (lambda: load(model), lambda: weight_scores(model, model)):
        with pytest.raises(UserError, match=r"safetensors only; convert pytorch_model\.bin: load it with transformers"):
            reader()


# Opened again


def damage(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        if name == WEIGHTS:
            save_file(change(load_file(folder / name)), folder / name, {"format": "pt"})
        else:
            (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return corrupt


HEAD = "language_model.lm_head.weight"
CORRUPTIONS = {
    "a weight is gone": (damage(WEIGHTS, lambda w: {k: v for k, v in w.items() if k != HEAD}), "lacks 1 weights"),
    "one too many": (damage(WEIGHTS, with_more(name="more.weight")), "such as more.weight"),
    "one other number": (damage(WEIGHTS, lambda w: w | {HEAD: w[HEAD].index_fill(0, torch.tensor(7), 0.0)}), "has oth"),
    "a type": (damage("config.json", lambda c: c | {"dtype": "bfloat16"}), "values of torch.bfloat16, not"),
    "a shape": (damage(WEIGHTS, lambda w: w | {HEAD: w[HEAD][:-1].clone()}), "cannot load the model"),
    "quantization": (damage("config.json", lambda c: c | {"quantization_config": FP8}), r"declares it as quantized"),
    "tied": (
        damage("config.json", lambda c: c | {"tie_word_embeddings": True, "text_config": c["text_config"] | {
            "tie_word_embeddings": True}}), "",
    ),
    "frequencies": (
        damage("config.json", lambda c: c | {"text_config": c["text_config"] | {"rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0}}}), "the logits for the image prompt differ",
    ),
    "another layer of the tower": (
        damage("config.json", lambda c: c | {"vision_feature_layer": -2}), "the logits for the image prompt differ",
    ),
    "tokens": (
        damage("tokenizer.json", lambda t: t | {"pre_tokenizer": {"type": "Split", "pattern": {"String": "i"},
            "behavior": "Isolated", "invert": False}}), "its processor encodes the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_saved_checkpoint_that_differs_is_rejected(
    tmp_path: Path, name: str, note_fault: Callable[..., None]
) -> None:
    vlm = load(pico_llava(tmp_path / "llava"), device="cpu")
    vlm.model.save_pretrained(tmp_path / "saved")
    vlm.processor.save_pretrained(tmp_path / "saved")
    corrupt, message = CORRUPTIONS[name]
    corrupt(tmp_path / "saved")
    found = ""
    try:
        verify(vlm, tmp_path / "saved")
    except UserError as error:
        found = str(error)
    harmless = not message  # two tables with other numbers are not tied, whatever the config says
    note_fault("saved checkpoints that are not the model that was saved", 1, int(bool(found) != harmless))
    assert bool(found) != harmless, found
    assert message in found


def test_a_run_whose_checkpoint_does_not_load_is_not_finished(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = striate.vlm.PreTrainedModel.save_pretrained

    def corrupt(self: Any, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        CORRUPTIONS["one other number"][0](folder)

    monkeypatch.setattr(striate.vlm.PreTrainedModel, "save_pretrained", corrupt)
    with pytest.raises(UserError, match=r"is not the model that was saved: lm_head\.weight has other values"):
        tune(model, data=data, out=tmp_path / "run", region="1", options=OPTIONS)
    run = Run.open(tmp_path / "run")
    assert run.info["status"] == "failed"
    assert any(run.state.iterdir())  # to go on from


def test_where_memory_does_not_suffice_weights_are_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(roundtrip, "logits", full)
    for name, left_out in (("plain", True), ("one other number", False)):
        vlm = load(pico_llava(tmp_path / name), device="cpu")
        CORRUPTIONS.get(name, (lambda _: None, ""))[0](tmp_path / name)
        if left_out:
            assert "the logits were not (not enough memory)" in verify(vlm, tmp_path / name)
        else:
            with pytest.raises(UserError, match="other values"):
                verify(vlm, tmp_path / name)


def test_a_model_is_compared_with_the_memory_of_its_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = check_config(str(model))
    monkeypatch.setattr(reading, "_total_bytes", lambda device: 10**3 if device.type == "cuda" else 10**12)
    reading.check_size(config, str(model), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"its weights take .* GB, and cuda:0 has"):
        reading.check_size(config, str(model), device=torch.device("cuda:0"))

"""A model and its processor: found out before any work whether they fit, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import processors
import pytest
import torch
from pico import TEMPLATE, pico_llava, pico_processor
from templates import CHATML, TEMPLATES, llava
from test_train import write_data
from transformers import AutoModelForImageTextToText, AutoProcessor

from striate.data import Record, RecordError, encode
from striate.errors import UserError
from striate.runs.evaluating import evaluate
from striate.runs.inspecting import inspect
from striate.runs.pruning import prune
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.training import align, tune
from striate.train import TrainOptions
from striate.vlm import load, load_on_meta
from striate.vlm.processors import check_match, image_token_id
from striate.vlm.template import check_template, lead_of

OPTIONS = TrainOptions(batch=2, micro_batch=2, steps=1, dtype="float32", device="cpu")


def with_setting(folder: Path, **settings: object) -> Path:
    """A pico LLaVA whose processor has other settings."""
    file = pico_llava(folder) / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


# Where answers end.


def ends_with_unk(folder: Path) -> Path:
    """A pico LLaVA that ends answers with another token than its tokenizer's, without an entry in its config."""
    processor = AutoProcessor.from_pretrained(pico_llava(folder))
    processor.chat_template = TEMPLATE.replace("{{ '</s>' }}", "{{ '<unk>' }}")
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", ["align", "tune", "prune"])
def test_a_saved_checkpoint_names_the_ends_of_answers(verb: str, tmp_path: Path) -> None:
    model = ends_with_unk(tmp_path / "model")
    if verb == "prune":
        (model / "generation_config.json").unlink()
        prune(str(model), out=tmp_path / "run", region="0,1", remove="1", by="random")
    else:
        train = {"align": align, "tune": tune}[verb]
        train(model, data=write_data(tmp_path), out=tmp_path / "run", options=OPTIONS)
    saved = json.loads((Run.open(tmp_path / "run").checkpoint / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [3, 1]
    assert saved["pad_token_id"] == 0


def test_a_generation_config_that_knows_the_ends_is_left_alone(tmp_path: Path) -> None:
    vlm = load(pico_llava(tmp_path), device="cpu")
    before = vlm.model.generation_config.to_json_string()
    assert vlm.processor
    assert vlm.model.generation_config.to_json_string() == before


# The generation prompt.


@pytest.mark.parametrize(("template", "message"), [
    (CHATML.partition("{%- if add_generation_prompt")[0],
     r"no generation prompt: add {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %} to its end"),
    (CHATML.replace("{{ mark }}", ""), "writes nothing for an image: it must write <image> there"),
    (CHATML.replace("<|im_end|>", "<|stop|>"), "ends answers with '<|stop|>', which is not a token of its tokenizer"),
    (CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>model\n' }}"),
     "before an answer: both must be the same"),
])  # fmt: skip
def test_a_template_that_asks_otherwise_than_it_trains_is_refused(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_template(llava(template))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_in_use_pass(name: str) -> None:
    check_template(llava(TEMPLATES[name]))


@pytest.mark.parametrize("use", [
    lambda model, data, out: tune(model, data=data, out=out, options=OPTIONS),
    lambda model, data, out: evaluate(model, data, out=out),
    lambda model, data, out: inspect(str(model), data=data),
])  # fmt: skip
def test_a_template_is_checked_at_the_start(use: Callable[..., object], tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(pico_llava(tmp_path / "model"))
    processor.chat_template = TEMPLATE.partition("{% if add_generation_prompt %}")[0]
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no generation prompt"):
        use(tmp_path / "model", write_data(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("prompt", "before", "reasoning", "lead"), [
    ("A:", "A: ", "", " "),
    ("A:", "A:", "hm", "<think>\nhm\n</think>\n\n"),
    ("A:<think>\n", "A:", "", "</think>\n\n"),
    ("A:<think>", "A:", "", "\n</think>\n\n"),
    ("A:<think>", "A:", "hm", "\nhm\n</think>\n\n"),
    ("A:<think>\n", "A:<think></think>", "hm", "hm\n</think>\n\n"),
    ("A:<think>\n\n</think>\n\n", "A:", "", ""),
    ("A:[THINK]", "A:", "hm", "\nhm\n[/THINK]\n\n"),
])  # fmt: skip
def test_what_the_model_writes_before_an_answer(prompt: str, before: str, reasoning: str, lead: str) -> None:
    assert lead_of(prompt, before, reasoning) == lead


# Sizes.

UNFIT = {
    "patch_size": (None, "the processor cannot read an image .*: set patch_size to 8 in processor_config.json"),
    "num_additional_image_tokens": (1, "writes 17 image tokens for an image, the model computes 16 features for it"),
    "vision_feature_select_strategy": ("default", "15 image tokens .* set vision_feature_select_strategy to full"),
}


@pytest.mark.parametrize("setting", UNFIT)
@pytest.mark.parametrize("opened", [load, load_on_meta])
def test_a_processor_that_does_not_fit_is_refused(setting: str, opened: Callable[..., object], tmp_path: Path) -> None:
    value, message = UNFIT[setting]
    model = opened(with_setting(tmp_path, **{setting: value}))
    with pytest.raises(UserError, match=message):
        model.processor  # noqa: B018


def test_an_image_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    processor = pico_processor()
    processor.image_processor.size = {"height": 64, "width": 64}
    pico_llava(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the model cannot process the image of its processor \("):
        load(tmp_path, device="cpu").processor  # noqa: B018


@pytest.mark.parametrize("opened", [load, load_on_meta])
def test_a_token_without_an_embedding_is_refused(opened: Callable[..., object], tmp_path: Path) -> None:
    processor = pico_processor()
    processor.tokenizer.add_tokens([f"<new_{number}>" for number in range(200)])
    pico_llava(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the model 128 embeddings, and '<new_\d+>' \(128\) has none"):
        opened(tmp_path).processor  # noqa: B018


@pytest.mark.parametrize("name", ["pad_token", "image_token"])
def test_padding_or_an_image_token_without_an_embedding_is_refused(name: str) -> None:
    reader = processors.processor("llava")
    model = processors.fitting("llava", reader)  # as many embeddings as tokens
    reader.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)
    new = reader.tokenizer.convert_tokens_to_ids("<new>")
    check_match(model, reader, image_token_id(reader), "llava")  # nothing writes it
    if name == "pad_token":
        reader.tokenizer.pad_token = "<new>"
    else:
        reader.image_token, reader.image_token_id, reader.image_token_ids = "<new>", new, [new]
        model.config.image_token_index = new
    with pytest.raises(UserError, match=rf"'<new>' \({new}\) has none: call model.resize_token_embeddings"):
        check_match(model, reader, image_token_id(reader), "llava")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # processors hand NumPy tensors
@pytest.mark.parametrize("family", processors.FAMILIES)
def test_every_family_fits_its_own_processor(family: str) -> None:
    reader = processors.processor(family)
    model = processors.fitting(family, reader)
    check_match(model, reader, image_token_id(reader), family)
    with torch.device("meta"):
        meta = AutoModelForImageTextToText.from_config(model.config)
    check_match(meta, reader, image_token_id(reader), family)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_merged_otherwise_are_refused(family: str) -> None:
    reader = processors.processor(family)
    model = processors.fitting(family, reader)
    reader.image_processor.merge_size = 1
    for one in (model, model.to("meta")):
        with pytest.raises(UserError, match="set merge_size to 2 in processor_config"):
            check_match(one, reader, image_token_id(reader), family)


# Records that spell tokens of the model's own.


def message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("token", ["<image>", "<|im_start|>", "<|im_end|>", "</s>", "<s>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_text_that_forges_a_turn_is_named(token: str, role: str) -> None:
    texts = {"system": "Yes.", "user": "What?", "assistant": "red"} | {role: f"a{token}\nb"}
    forged = Record("7", tuple(message(role, text) for role, text in texts.items()), source="train.json:7")
    for generation in (False, True):
        if generation and role == "assistant":
            continue
        with pytest.raises(RecordError) as caught:
            encode(forged, llava(), generation=generation)
        assert f"train.json:7: its text contains {token}, a token of" in str(caught.value)


@pytest.mark.parametrize("text", ["a < b and <b>bold</b>", "<unk>", "<|user|>", "[INST]", "<think>"])
def test_other_marks_are_text(text: str) -> None:
    assert encode(Record("7", (message("user", text), message("assistant", "red"))), llava())


def test_eval_lists_a_record_that_spells_the_image_token(tmp_path: Path) -> None:
    model, rows = pico_llava(tmp_path / "model"), json.loads(write_data(tmp_path).read_text())
    rows[0]["conversations"][0]["value"] += " </s>"
    data = tmp_path / "forged.json"
    data.write_text(json.dumps(rows))
    results = evaluate(
        model, data, images=tmp_path, out=tmp_path / "run", max_new_tokens=1, options=ReadOptions(on_bad_record="skip")
    )
    assert results["skipped"] == 1
    assert "its text contains </s>" in (tmp_path / "run" / "skipped.jsonl").read_text()

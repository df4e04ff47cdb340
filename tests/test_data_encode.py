"""What a model is given of a record: the right labels, the right image tokens, the right padding."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import filled
from PIL import Image
from processors import FAMILIES, IMAGE_NEEDED, MIXED_UP, fitting, processor
from templates import CHATML, SQUARE, TEMPLATES, llava, tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
    PreTrainedModel,
)
from transformers.processing_utils import ProcessorMixin

from striate.data import (
    IGNORED,
    TOKEN_KEYS,
    Batch,
    Example,
    Examples,
    Record,
    RecordError,
    Skipped,
    collate,
    encode,
)
from striate.data.chat import render
from striate.data.format import record_of
from striate.data.images import ImageFolder
from striate.errors import UserError
from striate.vlm.processors import image_token_id


def noise_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# PaliGemma's processor hands NumPy a list of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL, TALL, WIDE = noise_image(20, 18), noise_image(30, 90), noise_image(100, 40)


def turn(role: str, *parts: str | None) -> dict:
    """One message; `None` stands for an image."""
    contents = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": contents}


def record(*messages: dict, images: tuple = ()) -> Record:
    return Record("7", messages, images, source="train.json:7")


ONE = record(turn("user", None, "What colour?"), turn("assistant", "red"), images=(TALL,))
TWO = record(turn("user", "Is", None, "a mat, and", None, "?"), turn("assistant", "no, a cat"), images=(SMALL, WIDE))
LONG = record(
    turn("user", None, "What colour?"),
    turn("assistant", "red"),
    turn("user", "And", None, "?"),
    turn("assistant", "two dogs"),
    images=(TALL, WIDE),
)
TEXT = record(turn("user", "What is red?"), turn("assistant", "a bird"))


def labeled_texts(example: Example, processor: LlavaProcessor) -> list[str]:
    """The runs of labeled tokens, decoded."""
    runs = groupby(example.labels.tolist(), key=lambda label: label == IGNORED)
    return [processor.tokenizer.decode(list(run)) for ignored, run in runs if not ignored]


# Labels.

ENDS = {  # what is learned of the answers "red" and "two dogs"
    "vicuna": [" red</s>", " two dogs</s>"],
    "llava-1.5": [" red", " two dogs</s>"],
    "llama-3": ["red<|eot_id|>", "two dogs<|eot_id|>"],
    "chatml": ["red<|im_end|>", "two dogs<|im_end|>"],
    "phi-3": ["red<|end|>", "two dogs<|end|>"],
    "gemma": ["red<end_of_turn>", "two dogs<end_of_turn>"],
    "mistral": [" red </s>", " two dogs </s>"],
    "idefics3": [" red<end_of_utterance>", " two dogs<end_of_utterance>"],
    "text only": ["red<|im_end|>", "two dogs<|im_end|>"],
    "printed": ["red<|im_end|>", "two dogs<|im_end|>"],
    "thinking": ["red<|im_end|>", "two dogs<|im_end|>"],
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_labels_are_the_answers_and_their_end_tokens(name: str, adds_bos: bool) -> None:
    reader = llava(TEMPLATES[name], adds_bos)
    example = encode(LONG, reader)
    assert labeled_texts(example, reader) == ENDS[name]
    assert labeled_texts(encode(replace(LONG, messages=LONG.messages[:2]), reader), reader)[0].strip() in (
        "red </s>",
        "red" + ENDS[name][1].strip().removeprefix("two dogs"),
    )
    assert example.image_mask.sum() == 2 * 16
    assert torch.equal(example.image_mask, example.inputs["input_ids"] == image_token_id(reader))


@pytest.mark.parametrize("name", sorted(set(ENDS) - {"mistral"}))
def test_a_system_prompt_has_no_labels(name: str) -> None:
    reader = llava(TEMPLATES[name])
    prompted = replace(LONG, messages=(turn("system", "Answer briefly."), *LONG.messages))
    example = encode(prompted, reader)
    assert labeled_texts(example, reader) == ENDS[name]
    assert "Answer briefly." in reader.tokenizer.decode(example.inputs["input_ids"])


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_with_a_loss_mark_has_no_labels(name: str) -> None:
    reader = llava(TEMPLATES[name])
    whole = encode(LONG, reader)
    for turns, expected in (([1], ENDS[name][1:]), ([3], ENDS[name][:1])):
        marked = tuple(m | {"learn": False} if index in turns else m for index, m in enumerate(LONG.messages))
        example = encode(replace(LONG, messages=marked), reader)
        assert labeled_texts(example, reader) == expected
        assert all(torch.equal(example.inputs[key], whole.inputs[key]) for key in whole.inputs)
    unlearnt = tuple(message | {"learn": False} for message in LONG.messages)
    with pytest.raises(RecordError, match="there is no token to learn from"):
        encode(replace(LONG, messages=unlearnt), reader)


# Line breaks beside images.

# As LLaVA 1.5 on the hub: images first, every text on a line of its own.
OWN_LINES = CHATML.replace("parts(message)", "lines(message)").replace(
    "{%- for message in messages",
    """
{%- macro lines(message) -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] if message['role'] == 'assistant' else '\\n' + part['text'] -}}
{%- endfor -%}
{%- endmacro -%}
{%- for message in messages""",
    1,
)
# As InternVL, and the templates that striate makes of language models' own: a line break behind every image.
OWN_BREAK = CHATML.replace("{{ mark }}", "{{ mark + '\\n' }}")
# As Gemma 3: every text is trimmed.
TRIMMED = CHATML.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")

BETWEEN = "one:\n<image>\ntwo:\n<image>\nSame?"
LAYOUTS = {  # what a template writes of the question `BETWEEN`
    "vicuna": BETWEEN, "chatml": BETWEEN, "phi-3": BETWEEN, "gemma": BETWEEN, "mistral": BETWEEN, "llama-3": BETWEEN,
    "idefics3": BETWEEN, "text only": BETWEEN, "printed": BETWEEN, "llava-1.5": BETWEEN, "thinking": BETWEEN,
    OWN_LINES: "<image><image>\none:\ntwo:\nSame?",
    OWN_BREAK: BETWEEN,
    TRIMMED: "one:<image>two:<image>Same?",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_the_text_is_kept(name: str) -> None:
    reader = llava(TEMPLATES.get(name, name))
    answer = turn("assistant", "no")
    as_parts = record(turn("user", "one:\n", None, "\ntwo:\n", None, "\nSame?"), answer, images=(SMALL, WIDE))
    messages = [{"from": "human", "value": BETWEEN}, {"from": "gpt", "value": "no"}]
    as_text = record_of({"image": [SMALL, WIDE], "conversations": messages}, "train.json:7", ImageFolder(Path()))
    texts = [render(reader, list(one.messages), "") for one in (as_parts, as_text)]
    assert LAYOUTS[name] in texts[0]
    assert texts[0] == texts[1]
    if name == OWN_BREAK:  # the template's own line break is there once, whether or not the record has one, too
        plain = [render(reader, [turn("user", None, text), answer], "") for text in ("What?", "\nWhat?")]
        assert plain[0] == plain[1]
        assert "<image>\nWhat?" in plain[0]


@pytest.mark.parametrize("question", [
    ["one:\n", None, "\ntwo:"], [None, "\nWhat?"], ["What?\n", None], [None, "\n", None, "\n\nWhat?"], ["a", None, "b"],
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_formats_give_the_same_tokens(family: str, question: list[str | None]) -> None:
    reader = processor(family)
    images = [SMALL] * question.count(None)
    value = "".join("<image>" if part is None else part for part in question)
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "red"}]
    as_text = record_of({"images": images, "conversations": turns}, "train.json:7", ImageFolder(Path()))
    as_parts = record(turn("user", *question), turn("assistant", "red"), images=tuple(images))
    ours, theirs = (encode(one, reader).inputs["input_ids"] for one in (as_text, as_parts))
    assert torch.equal(ours, theirs)


def test_captions_of_stage_one() -> None:
    reader = llava(TEMPLATES["plain"])
    example = encode(record(turn("user", None), turn("assistant", "a red cat"), images=(SMALL,)), reader)
    assert reader.tokenizer.decode(example.inputs["input_ids"]) == "<image>" * 16 + "a red cat</s>"
    assert labeled_texts(example, reader) == ["a red cat</s>"]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_prompt_is_what_training_saw_before_the_answer(name: str, adds_bos: bool) -> None:
    reader = llava(TEMPLATES[name], adds_bos)
    prompt = encode(LONG, reader, generation=True)
    trained = encode(LONG, reader)
    first_answer, last_answer = ((trained.labels != IGNORED).nonzero()[place].item() for place in (0, -1))
    assert first_answer < len(prompt) <= last_answer
    assert torch.equal(prompt.inputs["input_ids"], trained.inputs["input_ids"][: len(prompt)])
    assert (trained.labels[len(prompt) :] != IGNORED).any()
    assert (prompt.labels == IGNORED).all()


@pytest.mark.parametrize(("name", "adds_bos", "count"), [
    ("llama-3", False, 1), ("llama-3", True, 1), ("vicuna", False, 0), ("vicuna", True, 1),
])  # fmt: skip
def test_the_first_token_is_there_once(name: str, adds_bos: bool, count: int) -> None:
    reader = llava(TEMPLATES[name], adds_bos)
    for generation in (False, True):
        tokens = encode(ONE, reader, generation=generation).inputs["input_ids"].tolist()
        assert tokens.count(reader.tokenizer.bos_token_id) == count
        assert tokens[:1] == [reader.tokenizer.bos_token_id] or not count


def test_a_tokenizer_cannot_end_the_prompt() -> None:
    reader = llava(TEMPLATES["vicuna"], adds_bos=True)  # writes </s> behind every text
    assert reader.tokenizer("red").input_ids[-1] == reader.tokenizer.eos_token_id
    prompt = encode(ONE, reader, generation=True)
    assert reader.tokenizer.decode(prompt.inputs["input_ids"]).endswith("ASSISTANT:")


def test_labels_of_a_sentencepiece_tokenizer() -> None:
    reader = llava(TEMPLATES["vicuna"], spaces=True)
    example = encode(LONG, reader)
    labels = example.labels[example.labels != IGNORED].tolist()
    assert "▁red" in reader.tokenizer.convert_ids_to_tokens(labels)
    assert [text.strip() for text in labeled_texts(example, reader)] == ["red</s>", "two dogs</s>"]


READERS = {name: llava(TEMPLATES[name]) for name in ("chatml", "llama-3", "vicuna", "phi-3", "idefics3", "gemma")}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<[\ue000\ue001"), min_size=1, max_size=12)
ANSWERS = WORDS.filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["chatml", "llama-3", "vicuna", "phi-3", "idefics3", "gemma"]),
    exchanges=st.lists(st.tuples(WORDS, st.booleans(), ANSWERS), min_size=1, max_size=4),
)
def test_the_labels_of_any_conversation_decode_to_its_answers(
    name: str, exchanges: list[tuple[str, bool, str]]
) -> None:
    reader = READERS[name]
    messages, images = [], []
    for question, has_image, answer in exchanges:
        messages += [turn("user", *([None] if has_image else []), question), turn("assistant", answer)]
        images += [SMALL] * has_image
    example = encode(record(*messages, images=tuple(images)), reader)
    trims = name in ("llama-3", "gemma")
    lead, end = ENDS[name][0].split("red")
    answers = [answer.strip() if trims else answer for _, _, answer in exchanges]
    assert labeled_texts(example, reader) == [lead + answer + end for answer in answers]
    assert example.image_mask.sum() == 16 * len(images)


def test_turns_after_the_last_answer_are_dropped() -> None:
    reader = llava()
    asked_again = replace(ONE, messages=(*ONE.messages, turn("user", "And", None)), images=(TALL, WIDE))
    assert torch.equal(encode(asked_again, reader).labels, encode(ONE, reader).labels)
    assert encode(asked_again, reader, generation=True).image_mask.sum() == 32


def test_all_of_a_plain_text_has_labels() -> None:
    reader = llava(adds_bos=True)
    example = encode(Record("1", (), text="two dogs"), reader)
    bos, eos = reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id
    assert example.inputs["input_ids"][0] == bos
    assert labeled_texts(example, reader) == ["two dogs"]
    assert example.labels[0] == IGNORED
    assert (example.labels != eos).all()


# What goes wrong.


@pytest.mark.parametrize(("bad", "name", "message"), [
    (record(turn("user", "Hm?")), "chatml", "there is no answer to learn from"),
    (record(turn("system", "x"), *TEXT.messages), "mistral", "rejects the conversation (Only user and"),
    (record(turn("user", "\ue000answer\ue001"), turn("assistant", "red")), "chatml", "changes the answers"),
    (replace(ONE, messages=(turn("user", None, "a literal <image>"), ONE.messages[1])), "chatml",
     "its text contains <image>, a token of the model's chat template"),
    (Record("1", (), text=" ", source="train.json:7"), "chatml", "neither a conversation nor text"),
    (Record("1", (), text="an <image>", source="train.json:7"), "chatml", "1 <image> in the model's prompt for 0"),
    (replace(ONE, images=(b"no image",)), "chatml", "is not an image"),
])  # fmt: skip
def test_a_bad_record_is_named(bad: Record, name: str, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        encode(bad, llava(TEMPLATES[name]))
    assert str(caught.value).startswith("train.json:7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RecordError, match="lone surrogate"):
        encode(record(turn("user", None, "What \ud800?"), turn("assistant", "red"), images=(TALL,)), llava())


def test_a_template_that_writes_nothing() -> None:
    with pytest.raises(RecordError, match="writes nothing"):
        encode(record(turn("user", "What?")), llava(TEMPLATES["plain"]), generation=True)


def test_a_template_that_changes_answers_is_refused() -> None:
    upper = "(parts(message) | upper if message['role'] == 'assistant' else parts(message))"
    with pytest.raises(RecordError, match="changes the answers"):
        encode(ONE, llava(TEMPLATES["chatml"].replace("parts(message)", upper)))


# transformers leaves the files of the templates open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_default_of_several_chat_templates_is_used(tmp_path: Path) -> None:
    one, several = llava(TEMPLATES["chatml"]), llava(TEMPLATES["chatml"])
    several.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ 'no image, no end' }}"}
    several.save_pretrained(tmp_path)
    loaded = LlavaProcessor.from_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates").is_dir()
    assert isinstance(loaded.chat_template, dict)
    for generation in (False, True):
        expected, *found = (encode(ONE, reader, generation=generation) for reader in (one, several, loaded))
        for example in found:
            assert torch.equal(example.inputs["input_ids"], expected.inputs["input_ids"])
            assert torch.equal(example.labels, expected.labels)


@pytest.mark.parametrize("template", [None, {"tool_use": TEMPLATES["chatml"]}])
def test_processors_that_will_not_do(template: dict[str, str] | None) -> None:
    reader = llava()
    reader.chat_template = template
    for generation in (False, True):
        with pytest.raises(UserError, match="no chat template"):
            encode(ONE, reader, generation=generation)
    reader = llava(TEMPLATES["chatml"])
    reader.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        encode(ONE, reader)
    reader = llava()
    reader.get_text_with_replacements = lambda text, *_: ([text[0].upper()], [[]])
    with pytest.raises(UserError, match="LlavaProcessor changes the text of a conversation"):
        encode(ONE, reader)


def test_too_long_is_dropped_or_cut_behind_the_images() -> None:
    reader = llava()
    whole = encode(LONG, reader)
    last_image = int(whole.image_mask.nonzero().max())
    for limit in range(1, len(whole) + 1):
        if limit < len(whole):
            with pytest.raises(RecordError, match=f"{len(whole)} tokens, more than --max-length {limit}") as caught:
                encode(LONG, reader, max_length=limit)
            assert caught.value.too_long
        if limit <= last_image:
            with pytest.raises(RecordError):
                encode(LONG, reader, max_length=limit, truncate_text=True)
        else:
            cut = encode(LONG, reader, max_length=limit, truncate_text=True)
            assert torch.equal(cut.labels, whole.labels[:limit])
            assert cut.image_mask.sum() == 32
            assert all(len(cut.inputs[key]) == limit for key in ("input_ids", "attention_mask"))
    with pytest.raises(RecordError):  # the question alone does not fit: nothing would be learned
        encode(TEXT, reader, max_length=4, truncate_text=True)
    with pytest.raises(RecordError):  # a prompt is never cut
        encode(TEXT, reader, max_length=4, truncate_text=True, generation=True)


# Families.

END = dict.fromkeys(FAMILIES, "<|im_end|>") | {
    **dict.fromkeys(("granite_docling", "idefics2", "idefics3", "smolvlm"), "<end_of_utterance>"),
    "gemma3": "<end_of_turn>",
    "paligemma": "</s>",
}
ANSWERED = {"one": (ONE, ["red"]), "two": (TWO, ["no, a cat"]), "long": (LONG, ["red", "two dogs"]),
            "text": (TEXT, ["a bird"])}  # fmt: skip


def taken(family: str) -> dict[str, tuple[Record, list[str]]]:
    """The records, with their answers, that a family takes."""
    refused = {"got_ocr2": ("text",), "paligemma": ("text", "long")}.get(family, ())
    return {name: asked for name, asked in ANSWERED.items() if name not in refused}


def num_features(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """How many features a model's own image path gives to its decoder."""
    holder = next(module for module in (model, model.base_model) if hasattr(module, "get_image_features"))
    found = holder.get_image_features(**{key: value for key, value in inputs.items() if key not in TOKEN_KEYS})
    features = getattr(found, "pooler_output", found)
    features = [features] if isinstance(features, Tensor) else features
    return sum(one.numel() // one.shape[-1] for one in features)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_have_labels_and_every_image_feature_has_its_token(family: str) -> None:
    """One image, two of them cut up in other ways, a conversation, and text alone."""
    reader = processor(family)
    model = fitting(family, reader)
    for asked, answers in taken(family).values():
        example = encode(asked, reader)
        assert [text.strip() for text in labeled_texts(example, reader)] == [answer + END[family] for answer in answers]
        inputs = collate([example], pad_id=0).inputs
        if family == "mllama":  # whose features stay outside of the row: a token marks each image
            assert example.image_mask.sum() == len(asked.images)
        elif asked.images:
            assert example.image_mask.sum() == num_features(model, inputs)
        else:
            assert not example.image_mask.any()
        assert model(**inputs).logits.shape[1] == len(example)  # it compares the numbers itself


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*MIXED_UP}))
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_equals_its_examples_one_by_one(family: str, side: str) -> None:
    reader = processor(family)
    model = fitting(family, reader)
    records = [asked for asked, _ in taken(family).values()]
    if family == "mllama":  # in whose model a token before any image looks at all places for images, empty ones too
        filled(model)  # or the gates of its cross-attention are shut
        records = [ONE, replace(ONE, messages=(turn("user", "Is", None, "a mat?"), turn("assistant", "two dogs")))]
    examples = [encode(one, reader) for one in records]
    batch = collate(examples, pad_id=0, side=side)
    with torch.no_grad():
        together = logits(model, batch)
        for row, example in enumerate(examples):
            alone = logits(model, collate([example], pad_id=0))[0]
            there = batch.inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, there], alone)


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """With positions that count from a record's first token, as `generate` has them."""
    return model(**model.prepare_inputs_for_generation(**batch.inputs, is_first_iteration=True)).logits


def own_batch(reader, records: list[Record], side: str) -> dict:
    """What the family's own processor makes of the records in one call."""
    images = [list(one.images) for one in records]
    options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    if "mm_token_type_ids" in reader.model_input_names:
        options["return_mm_token_type_ids"] = True
    if type(reader).__name__ == "PaliGemmaProcessor":
        marks = ["<image>" * len(one) for one in images]
        texts = [mark + "\n".join(p["text"] for p in one.messages[0]["content"] if "text" in p)
                 for mark, one in zip(marks, records, strict=True)]  # fmt: skip
        answers = [one.messages[1]["content"][0]["text"] for one in records]
        output = reader(text=texts, suffix=answers, images=images, **options)
        return {key: value for key, value in output.items() if key != "labels"}
    texts = [render(reader, list(one.messages), "") for one in records]
    return dict(reader(text=texts, images=images, add_special_tokens=False, **options))


# GOT-OCR 2 takes one list of images for all texts; Mllama's processor lets padding look at images.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"got_ocr2", "mllama"}))
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_what_the_processor_makes_of_it(family: str, side: str) -> None:
    reader = processor(family)
    batch = collate([encode(one, reader) for one in (ONE, TWO)], pad_id=0, side=side)
    own = own_batch(reader, [ONE, TWO], side)
    assert batch.inputs.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(batch.inputs[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*IMAGE_NEEDED}))
def test_text_only_records_share_a_batch(family: str) -> None:
    reader = processor(family)
    batch = collate([encode(one, reader) for one in (TEXT, ONE, LONG)], pad_id=0)
    images = collate([encode(one, reader) for one in (ONE, LONG)], pad_id=0)
    for key, value in batch.inputs.items():
        by_record = key in TOKEN_KEYS or family == "mllama"  # whose image tensors have a row a record
        assert torch.equal(value[1:] if by_record else value, images.inputs[key]), key
    text_only = collate([encode(TEXT, reader)], pad_id=0)
    assert text_only.inputs.keys() <= {*TOKEN_KEYS}
    assert not text_only.image_mask.any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_images_that_are_looked_across_to_have_a_row_a_record(side: str) -> None:
    reader = processor("mllama")
    batch = collate([encode(one, reader) for one in (ONE, TWO)], pad_id=0, side=side)
    own = own_batch(reader, [ONE, TWO], side)
    seen = batch.inputs["attention_mask"].bool()
    assert batch.inputs.keys() == own.keys()
    for key, value in own.items():
        mine = batch.inputs[key]
        if key == "cross_attention_mask":  # its own goes on over the padding, which nobody reads
            value, mine = (one * seen[:, :, None, None] for one in (value, mine))
        torch.testing.assert_close(mine, value, rtol=0, atol=0, msg=key)
    mixed = collate([encode(one, reader) for one in (TEXT, ONE, LONG)], pad_id=0, side=side)
    assert {len(value) for value in mixed.inputs.values()} == {3}
    assert not mixed.inputs["cross_attention_mask"][0].any()


def test_logits_do_not_depend_on_the_batch_with_cross_attention() -> None:
    reader = processor("mllama")
    model = filled(fitting("mllama", reader))
    records = [encode(one, reader) for one in (TEXT, ONE, LONG)]
    together = model(**collate(records, pad_id=0).inputs).logits
    # The record with most images: in transformers, tokens before the first one look across to the padding of others.
    alone = model(**collate(records[-1:], pad_id=0).inputs).logits[0]
    torch.testing.assert_close(together[-1, : len(records[-1])], alone, rtol=1e-4, atol=1e-4)


def test_mllama_looks_at_an_image_from_its_token_on() -> None:
    reader = processor("mllama")
    batch = collate([encode(one, reader) for one in (TWO, TEXT, ONE)], pad_id=0)
    seen = batch.inputs["cross_attention_mask"].sum(dim=-1)  # B T images: number of tiles
    first, second = batch.image_mask[0].nonzero().flatten().tolist()
    length = int(batch.inputs["attention_mask"][0].sum())
    assert seen[0, :, 0].nonzero().flatten().tolist() == list(range(first, second))
    assert seen[0, :, 1].nonzero().flatten().tolist() == list(range(second, length))
    assert seen[0].amax(dim=0).tolist() == [4, 3]  # tiles
    assert not seen[1].any()
    assert seen[2, -1].tolist() == [0, 0]  # padding, and an image that is not there
    assert not batch.inputs["pixel_values"][1].any()


@pytest.mark.parametrize("family", ["gemma3", "idefics2", "idefics3", "internvl"])
def test_words_between_images_may_stand_in_what_images_grow_into(family: str) -> None:
    reader = processor(family)
    asked = (turn("user", None, "i", None, "global", "\n", None, "of"), turn("assistant", "image"))
    again = (turn("user", "row", None, "_1"), turn("assistant", "_col_"))
    example = encode(record(*asked, *again, images=(TALL, WIDE, SMALL, TALL)), reader)
    assert [text.strip() for text in labeled_texts(example, reader)] == ["image" + END[family], "_col_" + END[family]]


def test_a_prompt_of_the_processor_has_no_labels() -> None:
    reader = processor("janus")
    prompt = "You are a helpful language and vision assistant."
    for asked in (LONG, Record("1", (), text="two dogs")):
        example = encode(asked, reader)
        assert reader.tokenizer.decode(example.inputs["input_ids"]).startswith(prompt)
        assert not any(prompt in text for text in labeled_texts(example, reader))
    assert labeled_texts(example, reader) == ["two dogs"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_first_token_of_the_processor_is_there_once(adds_bos: bool) -> None:
    images, tokens = MllamaImageProcessorPil(size=SQUARE), tokenizer(adds_bos, image_token="<image>")
    reader = MllamaProcessor(images, tokens, chat_template=TEMPLATES["chatml"])
    for asked in (TEXT, Record("1", (), text="two dogs")):
        example = encode(asked, reader)
        assert example.inputs["input_ids"].tolist().count(tokens.bos_token_id) == 1
        assert example.labels[0] == IGNORED


def test_image_tokens_that_a_processor_does_not_name() -> None:
    # The mark in the prompt grows into other tokens: the features' own, and those between them.
    tokens = tokenizer(atom="<IMG_ATOM>", start="<IMG_START>", end="<IMG_END>", grid="<IMG_GRID>")
    images = Ovis2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=False)
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        reader = Ovis2Processor(images, tokens, chat_template=TEMPLATES["chatml"], image_seq_length=5)
    example = encode(TWO, reader)
    assert example.image_mask.sum() == 2 * 5
    shown = reader.tokenizer.convert_ids_to_tokens(example.inputs["input_ids"][example.image_mask])
    assert set(shown) == {"<IMG_ATOM>"}
    assert labeled_texts(example, reader) == ["no, a cat<|im_end|>"]


def test_paligemma_takes_question_and_answer_apart() -> None:
    reader = processor("paligemma")
    example = encode(ONE, reader)
    assert labeled_texts(example, reader) == ["red</s>"]
    assert torch.equal(example.inputs["token_type_ids"] == 1, example.labels != IGNORED)
    prompt = encode(ONE, reader, generation=True)
    assert reader.tokenizer.decode(prompt.inputs["input_ids"]) == "<image>" * 16 + "<s>What colour?\n"
    with pytest.raises(RecordError, match="one question and one answer"):
        encode(LONG, reader)
    with pytest.raises(RecordError, match="rejects the record"):
        encode(TEXT, reader)


def test_paligemma_reads_plain_text_without_looking_ahead() -> None:
    reader = processor("paligemma")
    model = fitting("paligemma", reader)
    whole = encode(Record("", messages=(), text="a red cat on a blue mat"), reader)
    start = {key: value[:3] for key, value in whole.inputs.items()}
    with torch.no_grad():
        seen, alone = (
            model(**{key: value[None] for key, value in inputs.items()}).logits[0, :3]
            for inputs in (whole.inputs, start)
        )
    torch.testing.assert_close(seen, alone)


# Batches.


def test_padding_on_either_side() -> None:
    reader = llava()
    examples = [encode(one, reader) for one in (ONE, TEXT, LONG)]
    right, left = (collate(examples, pad_id=0, side=side) for side in ("right", "left"))
    for row, example in enumerate(examples):
        length = len(example)
        for batch, kept in ((right, slice(length)), (left, slice(-length, None))):
            rest = torch.ones(batch.labels.shape[1], dtype=torch.bool)
            rest[kept] = False
            assert torch.equal(batch.labels[row, kept], example.labels)
            assert torch.equal(batch.image_mask[row, kept], example.image_mask)
            assert torch.equal(batch.inputs["input_ids"][row, kept], example.inputs["input_ids"])
            assert (batch.labels[row, rest] == IGNORED).all()
            assert not batch.image_mask[row, rest].any()
            assert batch.inputs["attention_mask"][row].sum() == length
    assert right.ids == ("7", "7", "7")
    assert len(right) == 3


def test_a_batch_moves_and_keeps_its_integers() -> None:
    batch = collate([encode(ONE, llava())], pad_id=0).to("cpu", torch.bfloat16)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert batch.inputs["input_ids"].dtype == batch.labels.dtype == torch.long
    assert batch.image_mask.dtype == torch.bool


def test_bad_records_travel_with_the_batch() -> None:
    records = [ONE, replace(ONE, images=(b"no image",)), replace(LONG, source="train.json:9")]
    examples = Examples(records, llava(), max_length=len(encode(ONE, llava())))
    loader = DataLoader(examples, 3, num_workers=2, collate_fn=lambda items: collate(items, pad_id=0))
    (batch,) = loader
    assert len(batch) == 1
    assert [(one.source, one.too_long) for one in batch.skipped] == [
        ("train.json:7", False),
        ("train.json:9", True),
    ]
    empty = collate([Skipped("train.json:1", "no image")], pad_id=0)
    assert len(empty) == 0
    assert empty.labels.shape == (0, 0)
    assert empty.inputs == {}


def test_errors_and_examples_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(RecordError("train.json:3", "the answer is empty", too_long=True)))
    assert str(error) == "train.json:3: the answer is empty"
    assert error.too_long
    examples = pickle.loads(pickle.dumps(Examples([ONE], llava())))
    assert torch.equal(examples[0].labels, encode(ONE, llava()).labels)


def test_lengths_order_records_without_opening_images() -> None:
    unread = replace(LONG, images=(b"", b""))
    examples = Examples([TEXT, ONE, unread], llava())
    text, one, two = examples.lengths
    assert text < one < two
    assert one - text >= 16 - 4
    assert two >= 32
    assert Examples([TEXT], llava()).lengths == [text]

"""Chat templates of public families: what is learned, how it is asked, where it ends, and what is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from chats import CHATS, REASON, Chat, reader
from PIL import Image
from processors import fitting
from torch import Tensor, nn

from striate.data import IGNORED, Example, Record, encode
from striate.errors import UserError
from striate.evaluation import answer, answers, resolve
from striate.vlm import Vlm
from striate.vlm.template import end_tokens, set_stop_tokens

IMAGE = Image.new("RGB", (32, 32), "red")


def turn(role: str, text: str, *, image: bool = False) -> dict:
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def record(*turns: dict, system: bool = False) -> Record:
    messages = (*([turn("system", "Be brief.")] if system else []), *turns)
    images = (IMAGE,) * sum(part["type"] == "image" for message in messages for part in message["content"])
    return Record("7", messages, images, source="train.json:7")


ASKED = turn("user", "What is it?", image=True)
ONE = (ASKED, turn("assistant", "red"))
TWO = (*ONE, turn("user", "And?"), turn("assistant", "two dogs"))


def labeled_texts(example: Example, tokenizer) -> list[str]:
    runs = groupby(example.labels.tolist(), key=lambda label: label == IGNORED)
    return [tokenizer.decode(list(run)) for ignored, run in runs if not ignored]


def is_prefix(asked: Example, example: Example) -> bool:
    """Whether learning begins where the question, asked, ends."""
    size = len(asked)
    same = torch.equal(asked.inputs["input_ids"], example.inputs["input_ids"][:size])
    return same and [label == IGNORED for label in example.labels[size - 1 : size + 1].tolist()] == [True, False]


@pytest.mark.parametrize("name", CHATS)
def test_answers_their_ends_and_the_prompt(name: str, note_fault: Callable[..., None]) -> None:
    chat, processor = CHATS[name], reader(CHATS[name].template)
    last = chat.last or chat.end
    for turns, others in ((ONE, []), (TWO, ["red"])):
        for system in {False, chat.system}:
            asked = record(*turns, system=system)
            example = encode(asked, processor)
            found = labeled_texts(example, processor.tokenizer)
            final = turns[-1]["content"][-1]["text"]
            assert found[:-1] == [chat.middle + text + chat.end for text in others]
            assert found[-1] == chat.lead + final + last
            assert is_prefix(encode(asked, processor, generation=True), example)
    note_fault("chat templates: another prompt than was learned", 2, 2, "0")


REASONING = [name for name in CHATS if CHATS[name].reasoned]


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("way", ["apart", "inline"])
def test_reasoning_is_learned(name: str, way: str, note_fault: Callable[..., None]) -> None:
    chat, processor = CHATS[name], reader(CHATS[name].template)
    inline = turn("assistant", f"<think>\n{REASON}\n</think>\n\nred")
    reasoned = inline if way == "inline" else turn("assistant", "red") | {"reasoning_content": REASON}
    for asked in (record(ASKED, reasoned), record(*TWO[:-1], reasoned)):
        example = encode(asked, processor)
        assert labeled_texts(example, processor.tokenizer)[-1] == chat.reasoned + "red" + (chat.last or chat.end)
        assert is_prefix(encode(asked, processor, generation=True), example)
        assert resolve(asked).answers == ("red",)
    note_fault("reasoning dropped, or learned behind another prompt", 2, 2, "0")


@pytest.mark.parametrize("name", CHATS)
def test_an_empty_block_in_an_answer_is_the_templates_own_or_text(name: str) -> None:
    chat, processor = CHATS[name], reader(CHATS[name].template)
    asked = record(ASKED, turn("assistant", "<think>\n\n</think>\n\nred"))
    lead = chat.lead if "think" in chat.template else chat.lead + "<think>\n\n</think>\n\n"
    assert labeled_texts(encode(asked, processor), processor.tokenizer) == [lead + "red" + (chat.last or chat.end)]
    assert is_prefix(encode(asked, processor, generation=True), encode(asked, processor))


def test_reasoning_where_the_prompt_leaves_no_place_for_it_is_refused() -> None:
    processor = reader(CHATS["qwen3, not thinking"].template)
    reasoned = turn("assistant", "red") | {"reasoning_content": REASON}
    with pytest.raises(UserError, match="before an answer: both must be the same"):
        encode(record(ASKED, reasoned), processor)


class Parrot(nn.Module):
    """A head that says the tokens of a text, then goes on with others for ever."""

    def __init__(self, tokens: Tensor, size: int, start: int):
        super().__init__()
        self.tokens, self.size, self.start = tokens, size, start
        self.seen = 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.size)
        place = self.seen
        self.seen += 1
        logits[:, -1, self.tokens[place] if place < len(self.tokens) else self.start] = 1
        return logits


def parrot(chat: Chat, reasoning: str = "") -> tuple[Vlm, Record]:
    """A model that has learned one answer to the letter."""
    processor = reader(chat.template)
    said = turn("assistant", "red") | ({"reasoning_content": reasoning} if reasoning else {})
    example = encode(record(ASKED, said), processor)
    model = fitting("llava", processor)
    tokens = example.labels[example.labels != IGNORED]
    model.lm_head = Parrot(tokens, len(processor.tokenizer), processor.tokenizer.convert_tokens_to_ids("cat"))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    vlm = Vlm.of(model)
    vlm.__dict__["processor"] = processor
    return vlm, record(ASKED)


@pytest.mark.parametrize(
    ("name", "reasoning"), [*((name, "") for name in CHATS), *((name, REASON) for name in REASONING)]
)
def test_an_end_stops_and_reasoning_is_not_scored(name: str, reasoning: str, note_fault: Callable[..., None]) -> None:
    vlm, asked = parrot(CHATS[name], reasoning)
    assert dict(answer(vlm, [asked], max_new_tokens=40)) == {0: "red"}
    note_fault("what was learned as the end does not end", 1, 1, "0")


@pytest.mark.parametrize("name", CHATS)
def test_the_generation_config_names_the_ends(name: str) -> None:
    chat, processor = CHATS[name], reader(CHATS[name].template)
    config = fitting("llava", processor).generation_config
    config.eos_token_id, config.pad_token_id = 5, None
    set_stop_tokens(config, processor)
    ends = {token for token in (chat.end, chat.last, "</s>") if token}
    assert set(processor.tokenizer.convert_ids_to_tokens(list(end_tokens(processor)))) == ends
    assert config.eos_token_id == [5, *end_tokens(processor)]
    assert config.pad_token_id == processor.tokenizer.pad_token_id


def test_unfinished_reasoning_is_not_an_answer() -> None:
    for name in ("qwen3-vl-thinking", "minicpm-v-4.5", "deepseek-r1"):
        vlm, asked = parrot(CHATS[name], "red " * 20)
        assert dict(answer(vlm, [asked], max_new_tokens=8)) == {0: ""}


@pytest.mark.parametrize(("text", "expected"), [
    ("[THINK]I see[/THINK]red", "red"), ("[THINK]I see", ""), ("red", "red"), ("<think>I see</think>red", "red"),
    ("◁think▷I see◁/think▷ red", "red"), ("I see</think>\n\n<answer> red </answer>", "red"), ("<think>I", ""),
])  # fmt: skip
def test_marks_of_reasoning_that_are_special_tokens_or_text(text: str, expected: str) -> None:
    tokens = reader(CHATS["pixtral"].template).tokenizer
    tokens.add_special_tokens(
        {"additional_special_tokens": ["[THINK]", "[/THINK]"]}, replace_extra_special_tokens=False
    )
    assert answers._final(tokens, tokens(text, add_special_tokens=False).input_ids, thinking=False) == expected


def test_a_wrapped_answer_is_the_answer() -> None:
    vlm, asked = parrot(CHATS["glm-4.1v"])
    said = turn("assistant", "<think>a cat?</think><answer>red</answer>")
    example = encode(replace(asked, messages=(ASKED, said)), vlm.processor)
    vlm.model.lm_head.tokens = example.labels[example.labels != IGNORED]
    assert dict(answer(vlm, [asked], max_new_tokens=80)) == {0: "red"}


def test_choices_are_compared_behind_the_end_of_reasoning() -> None:
    processor = reader(CHATS["qwen3-vl-thinking"].template)
    asked = [encode(record(ASKED, turn("assistant", text)), processor) for text in ("red", "two dogs")]
    assert [labeled_texts(one, processor.tokenizer) for one in asked] == [
        ["\n</think>\n\nred<|im_end|>"], ["\n</think>\n\ntwo dogs<|im_end|>"]
    ]  # fmt: skip


def test_an_answer_with_a_leading_line_break_has_the_prompt_it_was_trained_with() -> None:
    processor = reader(CHATS["qwen2.5-vl"].template)
    asked = record(ASKED, turn("assistant", "\nred"))
    example = encode(asked, processor)
    assert labeled_texts(example, processor.tokenizer) == ["\nred<|im_end|>"]
    assert is_prefix(encode(asked, processor, generation=True), example)

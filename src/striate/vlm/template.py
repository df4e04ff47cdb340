"""What a model's chat template writes: turns, end tokens, the generation prompt and reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from striate.errors import UserError

ANSWER_PLACEHOLDER = "\ue000answer\ue001"
REASONING_PLACEHOLDER = "\ue002reasoning\ue003"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of the reasoning in an assistant's message."""

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
)
"""Marks around the reasoning before an answer (Qwen, GLM and DeepSeek; Granite; Mistral; Kimi; Seed)."""

Message = dict[str, Any]


def turn(role: str, text: str) -> Message:
    """A message with one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def image_mark(processor: Any) -> str:
    """What a chat template writes for an image: the token of its features, except in Qianfan-OCR's."""
    return getattr(processor, "image_placeholder_token", processor.image_token)


def template_of(processor: Any) -> str | None:
    """The chat template of a processor or tokenizer: of several, the one named "default"; None without one."""
    found = processor.chat_template
    return found.get("default") if isinstance(found, dict) else found


def apply_template(processor: Any, messages: list[Message], *, prompt: bool = False) -> str:
    """The text of a conversation by the chat template; with `prompt`, the generation prompt is added.

    Raises:
        TemplateError, TypeError: the template does not accept the conversation.
    """

    def write(messages: list[Message]) -> str:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def flat(message: Message) -> Message:
        return message | {"content": "".join(p.get("text", image_mark(processor)) for p in message["content"])}

    # The template of a text-only LLM expects contents as text: it fails on a list, or prints it.
    try:
        text = write(messages)
    except TypeError:
        return write([flat(message) for message in messages])
    printed = [str(message["content"]) in text for message in messages]
    if any(printed):
        text = write([flat(m) if p else m for m, p in zip(messages, printed, strict=True)])
    return text


# End of an answer.


def end_tokens(processor: Any) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: those that the chat template writes right after it, and the tokenizer's."""
    tokenizer = processor.tokenizer
    ends = {tokenizer.eos_token_id}
    for suffix in _answer_suffixes(processor):
        if found := end_token(suffix, processor):
            ends.add(tokenizer.convert_tokens_to_ids(found.strip()))
    return tuple(sorted(ends - {None}))


def end_token(text: str, processor: Any) -> str:
    """The end token at the start of the `text` after an answer, with whitespace before it; "" for none."""
    tokenizer = processor.tokenizer
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    found = _end_pattern(tokenizer, str(tokenizer.bos_token), eos, image_mark(processor)).match(text)
    return found.group() if found else ""


@lru_cache(maxsize=8)
def _end_pattern(tokenizer: Any, bos: str, eos: str | None, mark: str) -> re.Pattern[str]:
    """An added token right after the answer (`<|im_end|>`), or the tokenizer's end token, also after a space."""
    others = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {bos, eos, mark}
    longest_first = sorted((re.escape(token) for token in others if token.strip()), key=len, reverse=True)
    return re.compile("|".join([*([rf"\s*{re.escape(eos)}"] if eos else []), *longest_first]) or r"(?!)")


def _answer_suffixes(processor: Any) -> Iterator[str]:
    """What the template writes after an answer in the middle of a conversation, and after the last."""
    turns = [turn("user", "yes"), turn("assistant", ANSWER_PLACEHOLDER)]
    try:
        yield from apply_template(processor, [*turns, *turns]).split(ANSWER_PLACEHOLDER)[1:]
    except (
        TemplateError,
        TypeError,
        ValueError,
    ):  # no template, or one that does not accept a question without an image
        return


def set_stop_tokens(generation: Any, processor: Any) -> None:
    """Add the end tokens of answers to a generation config, and the padding token; changes `generation`.

    Its own end tokens stay. `generate`, vLLM, SGLang and mlx all read them from generation_config.json.
    """
    listed = generation.eos_token_id
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if new := [token for token in end_tokens(processor) if token not in known]:
        generation.eos_token_id = [*known, *new] if len([*known, *new]) > 1 else new[0]
    if generation.pad_token_id is None:
        tokenizer = processor.tokenizer
        generation.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def write_stop_tokens(folder: Path, generation: Any) -> None:
    """Write the end and padding tokens into the generation_config.json of a checkpoint that is copied, not saved."""
    file = folder / "generation_config.json"
    fields = json.loads(file.read_bytes()) if file.is_file() else {}
    ends = {name: getattr(generation, name) for name in ("eos_token_id", "pad_token_id")}
    if changed := {name: value for name, value in ends.items() if value not in (None, fields.get(name))}:
        file.write_text(json.dumps(fields | changed, indent=2) + "\n", encoding="utf-8")


# The generation prompt.


def check_template(processor: Any) -> None:
    """Check that the generation prompt of a chat template is how its conversations begin an answer.

    Raises:
        UserError: the template writes no generation prompt, one that its conversations do not have, or nothing for an
            image; or it ends answers with text that is not a token.
    """
    if (template := template_of(processor)) is not None:
        _check_template(processor, template)


@lru_cache(maxsize=8)
def _check_template(processor: Any, _: str) -> None:
    question, answer = turn("user", "yes"), turn("assistant", ANSWER_PLACEHOLDER)
    with_image, mark = question | {"content": [{"type": "image"}, *question["content"]]}, image_mark(processor)
    try:
        image_prompt = apply_template(processor, [with_image], prompt=True)
        before, _, suffix = apply_template(processor, [question, answer]).partition(ANSWER_PLACEHOLDER)
        prompt, alone = apply_template(processor, [question], prompt=True), apply_template(processor, [question])
    except (TemplateError, TypeError, ValueError):  # it does not accept a question without an image
        return
    if mark not in image_prompt:
        raise UserError(
            f"the model's chat template writes nothing for an image: it must write {mark} there", see="chat-template"
        )
    lead = lead_of(prompt, before)
    if prompt == alone and lead.strip() and not lead.lstrip().startswith(tuple(mark for mark, _ in THINKING)):
        fix = f"{{% if add_generation_prompt %}}{{{{ {lead!r} }}}}{{% endif %}}"
        raise UserError(
            f"the model's chat template writes no generation prompt: add {fix} to its end", see="chat-template"
        )
    if suffix.strip() and not end_token(suffix, processor):
        end = suffix.strip().split()[0]
        raise UserError(
            f"the model's chat template ends answers with {end!r}, which is not a token of its tokenizer: "
            "add it to the tokenizer and resize the embeddings, or use a template that ends answers with eos_token",
            see="chat-template",
        )


def lead_of(prompt: str, before: str, reasoning: str = "") -> str:
    """The text between the generation prompt and an answer, which the model generates.

    `before` is what the template writes before the answer in a full conversation. If the prompt opens a reasoning
    block that the conversation lacks, the lead is the reasoning and the end of the block.

    Raises:
        UserError: the conversation does not continue the generation prompt.
    """
    marks, rest = open_block(prompt), before[len(prompt) :]
    opening, closing = marks or THINKING[0]
    block = f"{reasoning}\n{closing}\n\n".lstrip("\n")
    if before.startswith(prompt) and reasoning in rest:
        return rest
    if marks and before.startswith(prompt[: prompt.rfind(opening)]):
        return block if prompt.endswith("\n") else f"\n{block}"
    if before.startswith(prompt) or prompt.startswith(before):
        return f"{rest}{opening}\n{block}" if reasoning else rest
    if prompt.split() == before.split() and not reasoning:  # LLaVA-OneVision: "assistant\n", and "assistant \n"
        return ""
    raise UserError(
        f"the generation prompt of the model's chat template ends with {prompt[-40:]!r}, but conversations have "
        f"{before[-40:]!r} before an answer: both must be the same",
        see="chat-template",
    )


# Reasoning.


def open_block(prompt: str) -> tuple[str, str] | None:
    """The marks of the reasoning block that is open at the end of a generation prompt; None for none."""
    return next((marks for marks in THINKING if prompt.rstrip().endswith(marks[0])), None)


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning before an answer, without its marks, and the answer; ("", text) without reasoning."""
    for opening, closing in THINKING:
        before, found, answer = text.rpartition(closing)
        if found:
            return before.strip().removeprefix(opening).strip(), answer.strip()
    return "", text


def final_answer(text: str, *, thinking: bool = False) -> str:
    """The answer after the reasoning, without `<answer>` marks; "" if the reasoning does not end."""
    reasoning, answer = split_reasoning(text)
    if not reasoning and answer == text and (thinking or text.lstrip().startswith(tuple(m for m, _ in THINKING))):
        return ""
    tagged = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", answer, re.DOTALL)
    return (tagged[1] if tagged else answer).strip()


def opens_thinking(processor: Any) -> bool:
    """Whether the generation prompt opens a reasoning block that the model must close."""
    try:
        return open_block(apply_template(processor, [turn("user", "yes")], prompt=True)) is not None
    except (TemplateError, TypeError, ValueError):
        return False


def reads_reasoning(processor: Any) -> bool:
    """Whether the chat template writes the reasoning given under its own key."""
    reasoned = turn("assistant", ANSWER_PLACEHOLDER) | dict.fromkeys(REASONING_KEYS, REASONING_PLACEHOLDER)
    try:
        return REASONING_PLACEHOLDER in apply_template(processor, [turn("user", "yes"), reasoned])
    except (TemplateError, TypeError):
        return False


def drops_reasoning(processor: Any) -> bool:
    """Whether the chat template removes reasoning from an answer, or opens its block in the generation prompt."""
    reasoned = turn("assistant", f"<think>\n{REASONING_PLACEHOLDER}\n</think>\n\n{ANSWER_PLACEHOLDER}")
    try:
        inline = REASONING_PLACEHOLDER in apply_template(processor, [turn("user", "yes"), reasoned])
        return not inline or opens_thinking(processor)
    except (TemplateError, TypeError):
        return False

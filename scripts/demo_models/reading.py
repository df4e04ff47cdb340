"""What the demo's language model reads: its tokenizer, documents of the text world, and the lessons they make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from lessons import belongings, describe, random_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from striate.studies.demo import scene as rendering
from striate.studies.demo.scene import GROUNDS, WORDS
from striate.studies.demo.world import arithmetic, ask, fact, story

LENGTH = 128  # tokens, of a row of text
IGNORED = -100  # label of a token that the loss leaves out
CONTEXT = 0.1  # weight in the loss of text that is not an answer

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKS = ("<user>", "<assistant>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the world; other words, such as a sign's or a number's, are spelled."""
    rng, words = Random("vocabulary"), set()
    for _ in range(20_000):
        words |= {word for text, _ in document(rng, "train", LESSONS[-1], signs=("1",)) for word in text.split()}
    words = sorted(word for word in words if not re.search(r"\d\d|<", word)) + list("0123456789")
    pieces = [
        *SPECIAL.values(),
        *MARKS,
        "\u2581",
        *rendering.CHARACTERS,
        *(f"\u2581{word}" for word in dict.fromkeys(words)),
    ]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
        **SPECIAL,
    )
    fast.add_special_tokens({"additional_special_tokens": list(MARKS[:2])}, replace_extra_special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


Document = list[tuple[str, bool]]  # pieces of text; True where the loss looks


@dataclass(frozen=True)
class Lesson:
    """A part of the language model's schooling: how many steps it lasts and what is read, as weights of chance."""

    steps: int
    belongings: float = 0
    echo: float = 0
    scenes: float = 0
    facts: float = 0
    sums: float = 0
    stories: float = 0


# Looking up comes first: what is not learned on plain lists is not learned on scenes.
LESSONS = (
    Lesson(150, belongings=1),
    Lesson(350, belongings=0.2, echo=0.3, scenes=0.5),
    Lesson(2100, belongings=0.06, echo=0.06, scenes=0.56, facts=0.12, sums=0.13, stories=0.07),
)
# How often each is asked of a scene in words: what there is less to learn from is asked more.
TASKS = {"name": 1, "count": 2, "exists": 2, "colour": 1, "position": 1, "read": 1, "know": 1.5}


def document(rng: Random, split: str, lesson: Lesson, *, signs: tuple[str, ...] = ()) -> Document:
    """One text of the text world; `signs` are what signs may say, by default nothing that means anything."""
    signs = signs or (random_text(rng),)
    sorts = ("belongings", "echo", "scenes", "facts", "sums", "stories")
    sort = rng.choices(sorts, [getattr(lesson, sort) for sort in sorts])[0]
    if sort == "stories":
        return [("<s>", False), (story(rng, split), True), ("</s>", True)]
    if sort == "facts":
        return dialogue([fact(rng) for _ in range(6)])
    if sort == "sums":
        return dialogue([arithmetic(rng, split) for _ in range(5)])
    if sort == "echo":
        words = " ".join(rng.choices((*WORDS, *GROUNDS, *signs), k=rng.randint(4, 16)))
        return dialogue([(f"say {words} .", words)])
    context, turns = belongings(rng, 10) if sort == "belongings" else scene_turns(rng, split, signs)
    (question, answer), *others = turns
    return dialogue([(f"{context} {question}", answer), *others])


def scene_turns(rng: Random, split: str, signs: tuple[str, ...]) -> tuple[str, list[tuple[str, str]]]:
    """A scene in words, with up to nine questions and answers about it."""
    asked = []
    while not asked:
        scene = rendering.sample_scene(rng, split, signs=signs)
        tasks = rng.choices(list(TASKS), list(TASKS.values()), k=9)
        asked = [(question.text, question.answer) for task in tasks if (question := ask(scene, task, rng))]
    return describe(scene, rng), asked


def dialogue(turns: list[tuple[str, str]]) -> Document:
    """What the chat template makes of questions and answers; only the answers and their ends are learned."""
    pieces: Document = [("<s>", False)]
    for question, answer in turns:
        pieces += [
            ("<user>", False),
            (question, False),
            ("<assistant>", False),
            (answer, True),
            ("</s>", True),
        ]
    return pieces


def encode(text: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels of a document."""
    ids, labels = [], []
    for piece, learned in text:
        tokens = [token for word in piece.split() for token in word_ids(word, tokenizer)]
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids, labels


@cache
def word_ids(word: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(word, add_special_tokens=False)["input_ids"]


@dataclass
class TextBatch:
    """Rows of whole documents; no token sees another document, and positions start anew in each."""

    ids: Tensor  # (B, T)
    weights: Tensor  # (B, T), of the loss at each token
    positions: Tensor  # (B, T)
    owner: Tensor  # (B, T), number of the document; 0 where there is none

    @property
    def mask(self) -> Tensor:
        """What is added to the attention logits (B, 1, T, T)."""
        seen = (self.owner[:, None, :, None] == self.owner[:, None, None, :]).tril()
        return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e4)


def text_batch(rng: Random, tokenizer: PreTrainedTokenizerFast, lesson: Lesson, *, rows: int) -> TextBatch:
    """Random training documents of a lesson, one after the other; what no longer fits into a row is cut off."""
    ids = torch.full((rows, LENGTH), tokenizer.pad_token_id)
    batch = TextBatch(ids, torch.zeros(ids.shape), torch.zeros_like(ids), torch.zeros_like(ids))
    for row in range(rows):
        start = number = 0
        while start < LENGTH - 24:  # too short for a document
            number += 1
            tokens, labels = (torch.tensor(some) for some in encode(document(rng, "train", lesson), tokenizer))
            end = min(start + len(tokens), LENGTH)
            span, size = (row, slice(start, end)), end - start
            batch.ids[span], batch.owner[span] = tokens[:size], number
            batch.weights[span] = torch.where(labels[:size] == IGNORED, CONTEXT, 1.0)
            batch.weights[row, start] = 0  # nothing predicts a document's first token
            batch.positions[span] = torch.arange(size)
            start = end
    return batch

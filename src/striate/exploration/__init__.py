"""What a model does with an image, layer by layer, on a few records: attention, logit lens, block influence, lesions.

`explore` measures it; the page is made in `studies/explore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from striate.data import IGNORED, Record, RecordError, Records, Skipped, open_image
from striate.errors import at_least
from striate.exploration.asking import Asked, ask, draw
from striate.exploration.layout import View, layout
from striate.exploration.lesions import Intervention, Lesion, groups, intervene, kinds, lesions
from striate.exploration.observing import MAX_LENS_TOKENS, Attention, Lens, lens, observe
from striate.region import Layers, Region
from striate.routing import read_route
from striate.scores import OnBad
from striate.scores.backbone import Backbone
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

__all__ = [
    "Attention",
    "Exploration",
    "Intervention",
    "Lens",
    "Lesion",
    "Sample",
    "View",
    "explore",
    "explore_answer",
    "explore_questions",
    "intervene",
    "steps",
]


@dataclass(frozen=True)
class Sample:
    """One record, looked at.

    `texts` and `roles` ("prompt", "answer") are those of the Q text tokens; `log_prob` are the log-probabilities of the
    answer's tokens, in nats, its end token included. `influence` [L] of "image" and "text" tokens is in [0, 2].
    """

    id: str
    source: str
    question: str
    truth: tuple[str, ...]
    answer: str
    log_prob: tuple[float, ...]
    images: tuple[Image.Image, ...]
    views: tuple[View, ...]
    texts: tuple[str, ...]
    roles: tuple[str, ...]
    influence: dict[str, Tensor]
    attention: Attention | None
    lens: Lens
    lesions: tuple[Lesion, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Exploration:
    """The samples, what was left out, and the text of every token that the logit lens names.

    `region` is the one that is marked, `route` that of the model, None without.
    """

    model: str
    depth: int
    region: Region | None
    route: Region | None
    samples: tuple[Sample, ...]
    words: dict[int, str]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All numbers but those of single heads: explore.json."""
        return {
            "model": self.model,
            "depth": self.depth,
            "region": None if self.region is None else list(self.region),
            "route": None if self.route is None else list(self.route),
            "samples": [_to_json(sample, self.words) for sample in self.samples],
            "skipped": [vars(one) for one in self.skipped],
            "notes": list(self.notes),
        }


def explore(
    vlm: Vlm,
    records: Iterable[Record],
    *,
    region: Layers | None = None,
    backbone: str | Path | None = None,
    samples: int = 6,
    max_length: int = 2048,
    seed: int = 0,
    on_bad_record: OnBad = "stop",
) -> Exploration:
    """Ask a model the questions of a few records, and look at every layer: attention, logit lens, influence, lesions.

    Args:
        vlm: the model.
        records: records with a question; those with an image come first.
        region: layers to mark, and to bypass together.
        backbone: the language model before visual training, to revert layers to; a folder.
        samples: number of records.
        max_length: maximum number of tokens of a question, image tokens included.
        seed: random seed of the sampling.
        on_bad_record: stop at a record that cannot be used, or skip it.

    Raises:
        UserError: no record has a question, or none can be used; a record is bad; the backbone does not match.
    """
    at_least(1, samples=samples, max_length=max_length)
    records = Records.of(records)
    questions, skipped = draw(records, samples, seed)
    chosen = None if region is None else Region.of(region, vlm.depth)
    return explore_questions(
        vlm, questions, region=chosen, backbone=backbone, max_length=max_length, stop=on_bad_record == "stop",
        skipped=skipped, notes=records.notes,
    )  # fmt: skip


def explore_questions(
    vlm: Vlm,
    questions: Sequence[Record],
    *,
    region: Region | None = None,
    backbone: str | Path | None = None,
    max_length: int = 2048,
    stop: bool = True,
    skipped: Sequence[Skipped] = (),
    notes: Sequence[str] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Exploration:
    """`explore` of the records of `draw`; `on_step` is called `steps` times per question."""
    layers, left_out = groups(vlm.depth, region), list(skipped)
    reverting = None if backbone is None else Backbone(vlm, backbone)
    samples, error = list[Sample](), None
    with eval_mode(vlm.model):
        for question in questions:
            try:
                asked = ask(vlm, question, max_length=max_length)
                samples.append(_look(vlm, question, asked, layers, reverting, on_step))
            except RecordError as bad:
                if stop:
                    raise
                error, left_out = bad, [*left_out, bad.skipped]
    if error and not samples:
        raise error
    return Exploration(
        vlm.source, vlm.depth, region, read_route(vlm.model.config), tuple(samples), _words(vlm, samples),
        tuple(left_out), (*notes, *vlm.notes),
    )  # fmt: skip


def explore_answer(
    vlm: Vlm,
    question: Record,
    tokens: Sequence[int],
    *,
    region: Region | None = None,
    route: Region | None = None,
    max_length: int = 2048,
) -> Exploration:
    """`explore` of one question whose answer is known, by its first tokens; without lesions.

    Args:
        vlm: the model.
        question: a record that ends with a question.
        tokens: the tokens of the answer; the first `asking.MAX_NEW_TOKENS` are looked at.
        region: layers to mark.
        route: the layers that image tokens pass through, to mark; None: all.
        max_length: maximum number of tokens of the question, image tokens included.

    Raises:
        RecordError: the question cannot be used.
    """
    with eval_mode(vlm.model):
        asked = ask(vlm, question, max_length=max_length, tokens=tokens)
        sample = _look(vlm, question, asked, {}, None, lambda: None)
    if len(tokens) > len(asked.tokens):
        sample = replace(
            sample, notes=(*sample.notes, f"the first {len(asked.tokens)} tokens of the answer are looked at")
        )
    return Exploration(vlm.source, vlm.depth, region, route, (sample,), _words(vlm, [sample]))


def steps(depth: int, region: Region | None, *, image: bool, backbone: bool) -> int:
    """Number of steps per question: a layer of the logit lens, or a lesion."""
    return depth + len(groups(depth, region)) * len(kinds(image=image, backbone=backbone))


def _look(
    vlm: Vlm,
    question: Record,
    asked: Asked,
    layers: dict[str, Region],
    backbone: Backbone | None,
    on_step: Callable[[], None],
) -> Sample:
    images = tuple(open_image(image, question.source) for image in question.images)
    views = layout(vlm, question, asked.example)
    observation = observe(vlm, asked, views)
    near = lens(asked, observation, on_layer=on_step)
    found = []
    for one in lesions(vlm, observation.replay, asked, layers, backbone=backbone):
        found.append(one)
        on_step()
    ids, labels = (
        values[0, observation.tokens].tolist() for values in (asked.batch.inputs["input_ids"], asked.batch.labels)
    )
    return Sample(
        id=question.id,
        source=question.source,
        question=_text(question),
        truth=question.answers,
        answer=asked.text,
        log_prob=tuple((-asked.targets.nll(observation.replay.logits)).tolist()),
        images=images,
        views=views,
        texts=tuple(token_text(vlm.tokenizer, token) for token in ids),
        roles=tuple("prompt" if label == IGNORED else "answer" for label in labels),
        influence=observation.influence,
        attention=observation.attention,
        lens=near,
        lesions=tuple(found),
        notes=(*_notes(asked, views), *observation.notes),
    )


def _notes(asked: Asked, views: Sequence[View]) -> list[str]:
    """What cannot be shown of a sample, and why."""
    num_image = int(asked.batch.image_mask.sum())
    if not num_image:
        return ["this record has no image"]
    if "cross_attention_mask" in asked.batch.inputs:
        return ["images are read by cross-attention: they have no tokens whose attention or words could be shown"]
    notes = []
    if any(view.box is None for view in views):
        notes.append("the place of the image tokens in the image is not known: they are shown in their order")
    if num_image > MAX_LENS_TOKENS:
        notes.append(f"nearest words are those of the first {MAX_LENS_TOKENS:,} of {num_image:,} image tokens")
    return notes


def _text(record: Record) -> str:
    """The text of the last question."""
    return " ".join(part["text"].strip() for part in record.messages[-1]["content"] if "text" in part)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, with the space before it."""
    text, raw = tokenizer.decode([token]), str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if raw.startswith(("▁", "Ġ")) and not text.startswith(" ") else text


def _words(vlm: Vlm, samples: Sequence[Sample]) -> dict[int, str]:
    """The text of every token that a logit lens names."""
    named = {token for sample in samples for token in torch.unique(sample.lens.words).tolist()}
    size = len(vlm.tokenizer)  # a vocabulary may be padded
    return {token: token_text(vlm.tokenizer, token) if token < size else "" for token in sorted(named)}


def _to_json(sample: Sample, words: dict[int, str]) -> dict[str, Any]:
    attention, near = sample.attention, sample.lens
    by_token = near.words[:, near.num_image :].tolist()  # L Q 3
    return {
        "id": sample.id,
        "source": sample.source,
        "question": sample.question,
        "truth": list(sample.truth),
        "answer": sample.answer,
        "log_prob": _rounded(sample.log_prob),
        "tokens": [{"text": text, "role": role} for text, role in zip(sample.texts, sample.roles, strict=True)],
        "views": [vars(view) for view in sample.views],
        "block_influence": {kind: _rounded(values) for kind, values in sample.influence.items()},
        "attention": None if attention is None else _rounded(attention.mean),  # layer, text token, image token
        "lens": {
            "image": [[[words[w] for w in three] for three in row] for row in near.words[:, : near.num_image].tolist()],
            "text": [[[words[w] for w in three] for three in row] for row in by_token],
            "text_probabilities": _rounded(near.probabilities[:, near.num_image :]),
        },
        "lesions": [
            {**vars(one), "layers": list(one.layers), "log_prob": _rounded(one.log_prob)} for one in sample.lesions
        ],
        "notes": list(sample.notes),
    }


def _rounded(values: Any) -> Any:
    """Nested lists of a tensor or sequence, to six digits after the point; None where NaN."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list | tuple):
        return [_rounded(value) for value in values]
    return round(values, 6) if values == values else None

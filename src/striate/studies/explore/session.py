"""The models behind `explore --live`: each answers a question, with some of its layers changed, and is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import Queue
from threading import Lock

from striate import routing
from striate.evaluation.answers import ask, question_record
from striate.exploration import Exploration, Intervention, explore_answer, intervene
from striate.region import Region
from striate.runs.asking import summary
from striate.scores.backbone import Backbone
from striate.vlm import Vlm

MAX_NEW_TOKENS = 256
"""Maximum number of tokens of an answer."""


@dataclass(frozen=True)
class Subject:
    """A model that is asked: its name, the region to mark, its route (None: all layers), its backbone."""

    name: str
    vlm: Vlm
    region: Region | None = None
    route: Region | None = None
    backbone: Backbone | None = None

    @property
    def route_form(self) -> str:
        """Its route as a form of region."""
        return str(self.route or "all")

    def intervention(self, bypassed: str, reverted: str, route: str) -> Intervention:
        """Changes of its layers, each by a form of region; `route` may also be "same", the region and layer 0.

        Raises:
            UserError: a form does not fit the model.
        """
        depth = self.vlm.depth
        return Intervention(
            Region.parse(bypassed.strip() or "none", depth),
            Region.parse(reverted.strip() or "none", depth),
            routing.resolve(route.strip() or "all", self.region or Region.parse("all", depth)),
        )


@dataclass(frozen=True)
class Answer:
    """An answer as it grows: what it took and what the layers did come last."""

    model: str
    question: str
    changes: str
    text: str = ""
    took: str = ""
    exploration: Exploration | None = None


class Session:
    """One model, or two to compare, that answer one question at a time. Layers are changed in the first.

    `max_length`: maximum number of tokens of a question, image tokens included.
    """

    def __init__(self, subjects: Sequence[Subject], *, max_length: int) -> None:
        self.subjects, self.max_length, self.turn = tuple(subjects), max_length, Lock()

    def ask(
        self, question: str, images: Sequence[bytes], *, bypassed: str = "none", reverted: str = "none", route: str
    ) -> Iterator[list[Answer]]:
        """Ask every model in turn; yield the answers as they grow.

        Raises:
            UserError: a form of region does not fit the model, an image cannot be read, the question is empty or
                too long.
        """
        first, *others = self.subjects
        changes = [first.intervention(bypassed, reverted, route)]
        changes += [other.intervention("none", "none", other.route_form) for other in others]
        answers: list[Answer] = []
        for subject, intervention in zip(self.subjects, changes, strict=True):
            for answer in follow(partial(self._answer, subject, intervention, question, images)):
                growing = [*answers, answer]
                yield growing
            answers = growing

    def _answer(
        self, subject: Subject, intervention: Intervention, question: str, images: Sequence[bytes],
        show: Callable[[Answer], None],
    ) -> Answer:  # fmt: skip
        """One model's answer; `show` is called with what is there of it."""
        vlm, pieces = subject.vlm, list[str]()
        answer = Answer(subject.name, question, str(intervention))

        def add(piece: str) -> None:
            pieces.append(piece)
            show(replace(answer, text="".join(pieces)))

        with self.turn, intervene(vlm, intervention, subject.backbone):
            reply = ask(
                vlm, question, images=images, max_new_tokens=MAX_NEW_TOKENS, max_length=self.max_length, stream=add
            )
            answer = replace(answer, text=reply.text, took=summary(reply, vlm))
            show(answer)
            exploration = explore_answer(
                vlm, question_record(question, images), reply.tokens, region=subject.region, route=intervention.route,
                max_length=self.max_length,
            )  # fmt: skip
        return replace(answer, exploration=exploration)


def follow(work: Callable[[Callable[[Answer], None]], Answer]) -> Iterator[Answer]:
    """Run `work` in a thread; yield what it shows meanwhile, and at last its result."""
    shown: Queue[Answer | None] = Queue()
    with ThreadPoolExecutor(1) as thread:  # also waits for it where nobody reads on
        result = thread.submit(work, shown.put)
        result.add_done_callback(lambda _: shown.put(None))
        yield from iter(shown.get, None)
        yield result.result()


def merge(answers: Sequence[Answer]) -> Exploration:
    """Answers of one model that have been looked at, as one exploration of several samples."""
    seen = [answer.exploration for answer in answers if answer.exploration]
    return replace(
        seen[0],
        model=answers[0].model,
        route=seen[0].route if len({one.route for one in seen}) == 1 else None,
        samples=tuple(
            replace(one.samples[0], question=f"{answer.changes}: {answer.question}")
            for answer, one in zip(answers, seen, strict=True)
        ),
        words={token: text for one in seen for token, text in one.words.items()},
    )

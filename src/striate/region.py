"""A region: a set of decoder layers of a language model, and its text forms."""

from __future__ import annotations

import json
import math
import operator
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from striate.errors import UserError, nearest

FILE = "region.json"
SCORES = "scores.json"
AUTO = "auto:"
FORMS = (
    "all, none, 0,4,8-11, uniform:8, uniform:25%, uniform:8@2 (offset 2), first:8, middle:8, last:8, "
    "hybrid:8, random:8@7 (seed 7), paper, paper-code, top:8@scores.json:NAME (the most important by a score), "
    "top:8@scores.json:NAME:TASK (over the records of a task; TASK,TASK: the best of each), bottom:8@..., spread:8@... "
    "(the best of each of 8 blocks), known:shortv, known:vica, known:cka-lora (published sets), a saved region.json or "
    "a run folder that holds one"
)
PAPER = {
    "paper": (0, 4, 8, 12, 18, 22, 26, 30),
    "paper-code": (1, 5, 9, 13, 19, 23, 27, 31),  # the default of the script released with the paper
}
PAPER_DEPTH = 32
# Published sets of layers of LLaVA-1.5, by depth (7B: 32, 13B: 40): where image tokens are updated (Yuan et al. 2025,
# ShortV, arXiv 2504.00502), where text reads images (ViCA, arXiv 2602.07574), which LoRA adapts (Ogawa et al. 2026,
# arXiv 2602.05988).
KNOWN: dict[str, dict[int, str]] = {
    "known:shortv": {32: "1,4-11,13-16"},
    "known:vica": {32: "0,1,7-11,14", 40: "0,6,8-10,13,14,16"},
    "known:cka-lora": {32: "1,3,5-16,18,31"},
}


def _random(k: int, depth: int, seed: int) -> Sequence[int]:
    # Python keeps the sequence of `random()` across versions, not that of `sample()`.
    # Ranking all layers by one random number per layer also makes random:4@7 a subset of random:8@7.
    draw = random.Random(seed).random
    return sorted(range(depth), key=lambda _: draw())[:k]


def _spread(k: int, ranked: Sequence[int]) -> Sequence[int]:
    ends = [i * len(ranked) // k for i in range(k + 1)]
    return [next(layer for layer in ranked if start <= layer < end) for start, end in pairwise(ends)]


# How k of depth layers are chosen; the third argument is the number after "@": an offset or a seed.
CHOICES: dict[str, Callable[[int, int, int], Sequence[int]]] = {
    "uniform": lambda k, depth, offset: [i * depth // k + offset for i in range(k)],
    "first": lambda k, depth, _: range(k),
    "middle": lambda k, depth, _: range((depth - k) // 2, (depth - k) // 2 + k),
    "last": lambda k, depth, _: range(depth - k, depth),
    "hybrid": lambda k, depth, _: [*range(k - k // 2), *range(depth - k // 2, depth)],
    "random": _random,
}
SHIFTED = ("uniform", "random")  # the choices that take "@"
# How k layers are chosen from all layers ranked by importance.
SCORED: dict[str, Callable[[int, Sequence[int]], Sequence[int]]] = {
    "top": lambda k, ranked: ranked[:k],
    "bottom": lambda k, ranked: ranked[len(ranked) - k :],
    "spread": _spread,
}

_COUNTED = re.compile(r"([a-z]+):([0-9]{1,9}(?:\.[0-9]{1,9})?)(%?)(?:@([0-9]{1,9}))?")
_SCORED = re.compile(r"(top|bottom|spread):([0-9]{1,9}(?:\.[0-9]{1,9})?)(%?)(?:@(.*))?", re.DOTALL)
_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class Region:
    """A set of decoder layers of a model with `depth` decoder layers.

    `layers` are 0-based indices, stored in ascending order. `origin` says how they were chosen ("uniform:25%"); it is
    ignored in comparisons.

    Raises:
        UserError: an index is out of range or repeated, or the depth is below 1.
    """

    layers: tuple[int, ...]
    depth: int
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        try:
            layers, depth = sorted(map(operator.index, self.layers)), operator.index(self.depth)
        except TypeError:
            raise UserError(f"layers and depth must be integers, not {self.layers!r} of {self.depth!r}") from None
        if depth < 1:
            raise UserError(f"a model has at least one decoder layer; the depth is {depth}")
        for layer, times in Counter(layers).items():
            if not 0 <= layer < depth:
                raise _region_error(f"layer {layer} does not exist", depth)
            if times > 1:
                raise _region_error(f"layer {layer} is listed {times} times", depth)
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "depth", depth)

    @classmethod
    def of(cls, chosen: Layers, depth: int) -> Region:
        """A region of a model of `depth` decoder layers from what names one: a text form, or layer numbers.

        Raises:
            UserError: a layer does not exist, the text is not a region, or the region is for another depth.
        """
        if isinstance(chosen, str | os.PathLike):
            return cls.parse(os.fspath(chosen), depth)
        if not isinstance(chosen, Region):
            return cls(tuple({*chosen}), depth)
        if chosen.depth != depth:
            raise UserError(
                f"region {chosen} is for {chosen.depth} decoder layers, this model has {depth}: choose it again for "
                "this depth",
                see="region",
            )
        return chosen

    @classmethod
    def parse(cls, text: str, depth: int) -> Region:
        """Parse any of the text forms in `FORMS` for a model of `depth` decoder layers.

        A share such as 25% means `max(1, round(depth * share))` layers (halves to even). Uniform layers are
        `i * depth // k + offset`; the middle block starts at `(depth - k) // 2`; an odd hybrid has one layer
        more at the front; random layers are the k layers with the smallest of `depth` values of
        `random.Random(seed).random()`, the same in every Python version. Without "@" the offset or seed is 0.
        `top` and `bottom` are the most and the least important layers (`rank_layers`) by a score of scores.json or
        of a run folder; `spread` takes the most important layer of each block [i * depth // k, (i + 1) * depth // k).
        By a score of several tasks, layers are ranked by their best rank in any of them (`merge_ranks`).

        Raises:
            UserError: the text is not a region of this depth; the message lists the accepted forms.
        """
        text = text.strip()
        if text in ("all", "none"):
            return cls(tuple(range(depth)) if text == "all" else (), depth, text)
        if text in PAPER:
            if depth != PAPER_DEPTH:
                raise _region_error(f"the list {text!r} is for {PAPER_DEPTH} layers", depth)
            return cls(PAPER[text], depth, text)
        if text in KNOWN:
            if depth not in KNOWN[text]:
                depths = " or ".join(map(str, KNOWN[text]))
                raise _region_error(f"{text!r} was published for LLaVA-1.5 of {depths} layers", depth)
            return cls(tuple(_parse_list(KNOWN[text][depth], depth)), depth, text)
        if text.startswith(AUTO):
            raise UserError(f"{text}: tune measures it; here, give a region such as uniform:25%", see="region")
        if match := _SCORED.fullmatch(text):
            return cls(tuple(_choose_by_score(match, depth)), depth, text)
        if match := _COUNTED.fullmatch(text):
            return cls(tuple(_choose(match, depth)), depth, text)
        if text and all(_SPAN.fullmatch(part.strip()) for part in text.split(",")):
            return cls(tuple(_parse_list(text, depth)), depth, text)
        if text.endswith(".json") or os.path.isdir(text):
            return cls.load(Path(text))._check_depth(depth, text)
        raise _region_error(f"unknown region form {text!r}", depth)

    @property
    def fraction(self) -> float:
        """Fraction of the model's layers in the region, in [0, 1]."""
        return len(self.layers) / self.depth

    @property
    def complement(self) -> Region:
        """The layers that are not in the region."""
        return Region(tuple(layer for layer in range(self.depth) if layer not in self.layers), self.depth)

    def __or__(self, other: Region) -> Region:
        return Region(tuple({*self.layers, *self._check_same_depth(other).layers}), self.depth)

    def __and__(self, other: Region) -> Region:
        return self - self._check_same_depth(other).complement

    def __sub__(self, other: Region) -> Region:
        return Region(tuple({*self.layers}.difference(self._check_same_depth(other).layers)), self.depth)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        """The canonical text, "0,4,8-11", "all" or "none"; `Region.parse` reads it back."""
        if len(self) in (0, self.depth):
            return "all" if self.layers else "none"
        # Consecutive layers have the same difference between value and position.
        blocks = [[layer for _, layer in g] for _, g in groupby(enumerate(self.layers), lambda p: p[1] - p[0])]
        return ",".join(f"{b[0]}-{b[-1]}" if len(b) > 2 else ",".join(map(str, b)) for b in blocks)

    def to_json(self, route: Region | None = None, *, modules: str = "all") -> dict[str, Any]:
        """`{"layers": [0, 4, 8], "depth": 12, "origin": "uniform:25%"}`; `"route": [0, 4, 8]` if one is given, and
        `"modules": "gate_up"` if not all matrices of these layers are meant."""
        routed = {} if route is None else {"route": list(route)}
        part = {} if modules == "all" else {"modules": modules}
        return {"layers": list(self.layers), "depth": self.depth, "origin": self.origin, **routed, **part}

    @classmethod
    def from_json(cls, data: Any) -> Region:
        """The inverse of `to_json`.

        Raises:
            UserError: `data` is not a saved region.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or "depth" not in data:
            raise UserError('expected {"layers": [0, 4, 8], "depth": 12, "origin": "uniform:25%"}')
        return cls(tuple(data["layers"]), data["depth"], str(data.get("origin", "")))

    def save(self, path: Path, route: Region | None = None, *, modules: str = "all") -> None:
        """Write the region as a JSON file, with the route of its model and the modules that trained, see `to_json`."""
        Path(path).write_text(json.dumps(self.to_json(route, modules=modules)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Region:
        """Read a saved region from a JSON file, or from a folder that has one.

        Raises:
            UserError: the file cannot be read, or does not hold a region.
        """
        file = Path(path) / FILE if os.path.isdir(path) else Path(path)
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except UserError as error:
            raise UserError(f"{file} is not a saved region: {error}", see="region") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a region ({error}); accepted: {FORMS}", see="region") from None

    def _check_same_depth(self, other: Region) -> Region:
        if other.depth != self.depth:
            raise UserError(f"regions of depth {self.depth} and {other.depth} cannot be combined")
        return other

    def _check_depth(self, depth: int, text: str) -> Region:
        if self.depth != depth:
            raise _region_error(f"{text} holds the region {self} of a model with {self.depth} layers", depth)
        return self


Layers = Region | str | os.PathLike[str] | Iterable[int]
"""What names a region of a model whose depth is known, see `Region.of`."""


def _region_error(what: str, depth: int) -> UserError:
    return UserError(f"{what}; this model's depth is {depth} (layers 0-{depth - 1}); accepted: {FORMS}", see="region")


def _choose(match: re.Match[str], depth: int) -> Sequence[int]:
    """The layers of a form with a count, such as uniform:25%@2."""
    name, number, percent, shift = match.groups()
    if name not in CHOICES:
        raise _region_error(f"unknown region form {match[0]!r}", depth)
    if shift and name not in SHIFTED:
        raise _region_error(f"{match[0]!r} has an '@'; only {' and '.join(SHIFTED)} accept one", depth)
    return CHOICES[name](_count(match[0], number, percent, depth), depth, int(shift or 0))


def _count(text: str, number: str, percent: str, depth: int) -> int:
    """The number of layers in a form."""
    if not percent and "." in number:
        raise _region_error(f"{text!r} asks for {number} layers, not an integer", depth)
    if not 0 < float(number) <= (100 if percent else depth):
        raise _region_error(f"{text!r} asks for {number}{percent or ' layers'}", depth)
    return max(1, round(depth * float(number) / 100)) if percent else int(number)


def _choose_by_score(match: re.Match[str], depth: int) -> Sequence[int]:
    """The layers of a form with a score, such as top:8@scores.json:block_influence."""
    form, number, percent, place = match.groups()
    k = _count(match[0], number, percent, depth)
    path, name, tasks = _find_score(place or "")
    if not (path and name):
        raise _region_error(f"{match[0]!r} names no score; expected {form}:{number}{percent}@scores.json:NAME", depth)
    saved = read_scores(path)
    if saved["depth"] != depth:
        raise _region_error(f"{path} holds the scores of a model with {saved['depth']} layers", depth)
    if name not in saved["scores"]:
        raise UserError(f"{path} has no score {nearest(name, saved['scores'])}", see="scores")
    return SCORED[form](k, _rank_saved(saved["scores"][name], depth, f"{path}: {name}", tasks))


def _find_score(place: str) -> tuple[str, str, str]:
    """Path, name and tasks in PATH:NAME or PATH:NAME:TASKS; a path may have colons, so the one that exists counts."""
    path, _, name = place.rpartition(":")
    shorter, _, middle = path.rpartition(":")
    if shorter and middle and not os.path.exists(path) and os.path.exists(shorter):
        return shorter, middle, name
    return path, name, ""


def _rank_saved(score: Any, depth: int, source: str, tasks: str = "") -> list[int]:
    """The layers by importance by a score of scores.json: over all records, or over those of the `tasks`."""
    if not tasks:
        return _rank_values(score, score, depth, source)
    found = score.get("tasks") if isinstance(score, dict) else None
    if not found:
        raise UserError(f"{source} was not measured by task: `striate score --by task` does", see="scores")
    rankings = []
    for task in tasks.split(","):
        if task not in found:
            raise UserError(f"{source} has no task {nearest(task, found)}", see="scores")
        rankings.append(_rank_values(found[task], score, depth, f"{source}, task {task}"))
    return merge_ranks(rankings)


def _rank_values(measured: Any, score: Any, depth: int, source: str) -> list[int]:
    """The layers by importance; `measured` has the values, `score` the direction."""
    values = measured.get("values") if isinstance(measured, dict) else None
    if not isinstance(values, list) or len(values) != depth:
        raise UserError(f"{source} has no list of {depth} 'values'", see="scores")
    for layer, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{source} has no value for layer {layer}, so its layers cannot be ranked", see="scores")
    return rank_layers(values, score.get("direction", "high"))


def region_by_score(form: str, size: int | str, ranked: Sequence[int], name: str) -> Region:
    """The region of `size` layers (8, 25%) chosen from all layers ranked by a score; `form` is top, bottom or spread.

    Raises:
        UserError: `form` is another one, or `size` not a number of layers of this model.
    """
    if form not in SCORED:
        raise UserError(f"the form of a region by a score is {', '.join(SCORED)}, not {form!r}")
    depth, number = len(ranked), str(size).removesuffix("%")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", number):
        raise _region_error(f"{size!r} is not a number of layers", depth)
    count = _count(str(size), number, "%" if str(size).endswith("%") else "", depth)
    chosen = SCORED[form](count, ranked)
    return Region(tuple(sorted(chosen)), depth, f"{form}:{size}@scores:{name}")


def auto_size(option: str, text: Layers | None, depth: int) -> str | None:
    """The number (8) or share (25%) of layers in `auto:25%`, which are measured before training; None in other forms.

    Raises:
        UserError: it is not a number or share of `depth` layers; names the `option`.
    """
    if not isinstance(text, str) or not text.startswith(AUTO):
        return None
    size = text.removeprefix(AUTO)
    try:
        region_by_score("top", size, range(depth), "")
    except UserError as error:
        raise UserError(f"{option} {text}: {error}", see="region") from None
    return size


def merge_ranks(rankings: Sequence[Sequence[int]]) -> list[int]:
    """All layers by their best rank in any of several rankings; ties go to the better sum of ranks, then the lower
    index. The first k layers hold about the first k / len(rankings) of each."""
    ranks = [{layer: rank for rank, layer in enumerate(ranking)} for ranking in rankings]
    by_layer = {layer: [one[layer] for one in ranks] for layer in rankings[0]}
    return sorted(by_layer, key=lambda layer: (min(by_layer[layer]), sum(by_layer[layer]), layer))


def rank_layers(values: Sequence[float], direction: str) -> list[int]:
    """All layers in order of importance, the most important first; ties go to the lower index, NaN comes last.

    `values` has one value per layer; `direction` says whether "high" or "low" values mean important.
    """
    sign = 1 if direction == "low" else -1
    return sorted(range(len(values)), key=lambda layer: (math.isnan(values[layer]), sign * values[layer]))


def read_scores(path: str | Path) -> dict[str, Any]:
    """The content of scores.json, or of the one in a run folder: "depth", and "scores" by name.

    Raises:
        UserError: the file cannot be read, or does not hold layer scores.
    """
    file = Path(path) / SCORES if os.path.isdir(path) else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as layer scores ({error}); `striate score` writes them", see="scores"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("scores"), dict) or "depth" not in data:
        raise UserError(
            f"{file} does not hold layer scores; `striate score` writes an object with 'depth' and 'scores'",
            see="scores",
        )
    return data


def _parse_list(text: str, depth: int) -> Iterator[int]:
    """The layers of an explicit list such as 0,4,8-11, in its order."""
    for first, last in (part.strip().partition("-")[::2] for part in text.split(",")):
        start, end = int(first), int(last or first)
        if end < start:
            raise _region_error(f"the range {first}-{last} is reversed", depth)
        if end >= depth:  # checked before it is expanded: 0-999999999 would fill the memory
            raise _region_error(f"layer {end} does not exist", depth)
        yield from range(start, end + 1)

"""Layer scores with their standard errors, and the file `scores.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from striate.errors import UserError, nearest
from striate.region import Region, merge_ranks, rank_layers, read_scores, region_by_score
from striate.vlm.modules import MODULES

KINDS = ("image", "text", "prompt", "answer")  # of token; "text" = prompt and answer
PARTS = (*KINDS, *MODULES)
NO_TASK = "no task"
"""The task of records without one, where others have one."""
WIDE = 10.0
"""Values that span more than this factor are shown on a logarithmic scale."""
MOST_SAMPLES = 200
"""Maximum number of single samples per score in the file."""


@dataclass(frozen=True)
class Metric:
    """The description of a score.

    `needs` names its inputs: "records", "images" in some of them, "backbone" (the weights of the language model before
    visual training). `direction` "high": high values mean important. `in_all`: measured with `--metrics all`, too.
    """

    name: str
    needs: tuple[str, ...]
    range: str
    source: str
    direction: str = "high"
    in_all: bool = True


@dataclass(frozen=True)
class Score:
    """One value per decoder layer, with its source.

    `values` and `stderr` have one entry per layer (`stderr` is None for scores of weights, which have no samples).
    `parts` splits the score by kind of token ("image", "prompt", "answer", "text" = prompt and answer) or by module
    ("gate_up", ...), each with one entry per layer, NaN without such tokens. `tasks` are the scores over the samples of
    each task. `table` [start][length - 1] is for scores of blocks of layers.
    `samples` [sample][layer] are the single measurements, with `values` as their mean. `n` is the number of samples.
    """

    name: str
    values: tuple[float, ...]
    stderr: tuple[float, ...] | None = None
    n: int = 0
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    table: tuple[tuple[float, ...], ...] | None = None
    samples: tuple[tuple[float, ...], ...] | None = None
    tasks: Mapping[str, Score] = field(default_factory=dict)
    direction: str = "high"
    range: str = ""
    source: str = ""

    @classmethod
    def of_samples(
        cls, metric: Metric, samples: Tensor, *, parts: Mapping[str, Tensor] | None = None, **about: Any
    ) -> Score:
        """Mean over samples and its standard error.

        `samples` [N, L] holds one value per sample and layer, `parts` the same by kind of token; NaN leaves a sample
        out, as one without such tokens. `about` are the other fields.
        """
        known = samples.double()
        counts = (~known.isnan()).sum(0)
        values = known.nanmean(0)
        squares = (known - values).square().nansum(0) / (counts - 1).clamp(min=1)
        stderr = (squares / counts).sqrt().where(counts > 1, torch.nan)
        split = {kind: _floats(part.double().nanmean(0)) for kind, part in (parts or {}).items()}
        n = int(counts.max()) if len(known) else 0
        rows = tuple(_floats(row) for row in known)
        return cls.of(metric, _floats(values), stderr=_floats(stderr), n=n, parts=split, samples=rows, **about)

    @classmethod
    def of(cls, metric: Metric, values: tuple[float, ...], **about: Any) -> Score:
        """A score with the range, direction and source of its metric."""
        return cls(metric.name, values, range=metric.range, source=metric.source, direction=metric.direction, **about)

    def to_json(self) -> dict[str, Any]:
        """`{"values", "stderr", "image", "text", "direction", "range", "source", "n", ...}`, null where unknown.

        `samples` has the first `MOST_SAMPLES`, rounded to six significant digits.
        """
        data: dict[str, Any] = {"values": self.values, "stderr": self.stderr, **self.parts}
        data |= {"direction": self.direction, "range": self.range, "source": self.source, "n": self.n}
        if self.table is not None:
            data["table"] = self.table
        if self.samples is not None:
            data["samples"] = [[float(f"{value:.6g}") for value in row] for row in self.samples[:MOST_SAMPLES]]
        if self.tasks:
            data["tasks"] = {task: one.brief() for task, one in self.tasks.items()}
        return {key: _without_nan(value) for key, value in data.items()}

    def task(self, name: str) -> Score:
        """The score over the records of one task. Raises `UserError` when there is none."""
        if name not in self.tasks:
            found = nearest(name, self.tasks) if self.tasks else f"{name!r}: it was not measured by task (--by task)"
            raise UserError(f"{self.name} has no task {found}", see="scores")
        return self.tasks[name]

    def brief(self) -> dict[str, Any]:
        """`{"values", "stderr", "n"}`, for the score of a task in the file."""
        return {"values": _without_nan(self.values), "stderr": _without_nan(self.stderr), "n": self.n}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`. Raises `LookupError`, `TypeError` or `ValueError` for data in another format."""
        about: dict[str, Any] = {key: str(data[key]) for key in ("direction", "range", "source") if key in data}
        rows: dict[str, Any] = {
            key: tuple(map(_with_nan, data[key])) for key in ("table", "samples") if data.get(key) is not None
        }
        tasks = {task: cls.from_json(name, {**about, **one}) for task, one in data.get("tasks", {}).items()}
        return cls(
            name,
            _with_nan(data["values"]),
            stderr=None if data.get("stderr") is None else _with_nan(data["stderr"]),
            n=int(data.get("n", 0)),
            parts={kind: _with_nan(data[kind]) for kind in PARTS if kind in data},
            tasks=tasks,
            **about,
            **rows,
        )


@dataclass(frozen=True)
class Scores:
    """The scores of one model of `depth` decoder layers, measured over `samples` records: the file scores.json.

    `scores` has them by name. `partial`: the measurement was interrupted before all samples were measured.
    """

    model: str
    depth: int
    samples: int
    scores: Mapping[str, Score]
    partial: bool = False

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            if len(score.values) != self.depth:
                raise UserError(f"{name} has {len(score.values)} values for {self.depth} decoder layers")

    def __getitem__(self, name: str) -> Score:
        """A score by name. Raises `UserError` with the nearest name when it does not exist."""
        if name not in self.scores:
            raise UserError(f"no score {nearest(name, self.scores)}", see="scores")
        return self.scores[name]

    def top(
        self, name: str, size: int | str, *, form: Literal["top", "bottom", "spread"] = "top", tasks: str = ""
    ) -> Region:
        """The region of the most important layers by a score: 8, or "25%" of all.

        With "bottom" the least important ones, with "spread" the most important of each of as many equal stretches.
        `tasks`, separated by commas: by the score over their records alone; of several, each has its best layers.
        Raises `UserError` when the score or a task does not exist, the model has fewer layers, or a chosen layer has no
        value.
        """
        score = self[name]
        measured = [score.task(task) for task in tasks.split(",")] if tasks else [score]
        ranked = merge_ranks([order(one) for one in measured])
        region = region_by_score(form, size, ranked, f"{name}:{tasks}" if tasks else name)
        if unknown := [layer for layer in region if all(math.isnan(one.values[layer]) for one in measured)]:
            raise UserError(f"{name} has no value for layer {unknown[0]}, so it cannot be chosen by it", see="scores")
        return region

    def to_json(self) -> dict[str, Any]:
        """`{"model", "depth", "samples", "partial", "scores": {name: {"values": [...], ...}}}`."""
        scores = {name: score.to_json() for name, score in self.scores.items()}
        return {"model": self.model, "depth": self.depth, "samples": self.samples, "partial": self.partial} | {
            "scores": scores
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """The inverse of `to_json`; raises `UserError` when `data` has another format."""
        try:
            scores = {name: Score.from_json(name, score) for name, score in data["scores"].items()}
            about = str(data.get("model", "")), int(data["depth"]), int(data.get("samples", 0))
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"not in the format of layer scores: {type(error).__name__}: {error}") from None
        return cls(*about, scores, bool(data.get("partial", False)))

    def save(self, path: str | Path) -> None:
        """Write the scores as a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read saved scores: a JSON file, or a folder that holds one. Raises `UserError` when they cannot be read."""
        try:
            return cls.from_json(read_scores(path))
        except UserError as error:
            raise UserError(f"{path}: {error}", see=error.see) from None


def order(score: Score) -> tuple[int, ...]:
    """All layers, the most important first; layers of equal value from the bottom up, layers without value last."""
    return tuple(rank_layers(score.values, score.direction))


def shades(score: Score) -> tuple[float, ...]:
    """The shade of each layer in a plot, from 0 for the lowest value to 1 for the highest, NaN without a value.

    Shades are linear in the value, or in its logarithm where positive values span more than a factor of ten: otherwise
    one outlier would leave no difference among the others.
    """
    finite = [value for value in score.values if math.isfinite(value)]
    if not finite:
        return score.values
    low, high = min(finite), max(finite)
    scale: Callable[[float], float] = math.log if low > 0 and high > WIDE * low else float
    start, span = scale(low), scale(high) - scale(low) or 1.0
    return tuple((scale(value) - start) / span if math.isfinite(value) else math.nan for value in score.values)


def rank_correlation(one: Score, other: Score) -> float:
    """Spearman's rank correlation of the importance of layers by two scores, in -1..1.

    Equal values share the mean of their ranks (Pearson's correlation of these ranks). Layers that lack either value are
    left out; NaN with fewer than two layers, or when a score is constant.
    """
    signs = [-1 if score.direction == "low" else 1 for score in (one, other)]
    pairs = [
        (signs[0] * a, signs[1] * b)
        for a, b in zip(one.values, other.values, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    ]
    ranks = [_ranks(column) for column in zip(*pairs, strict=True)]
    if len(pairs) < 2 or any(len(set(column)) == 1 for column in ranks):
        return math.nan
    return float(torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _without_nan(value: Any) -> Any:
    """NaN and Inf as null, since JSON has neither."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)

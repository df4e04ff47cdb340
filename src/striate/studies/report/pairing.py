"""A run and its reference, record by record: retention, and whether the difference is within noise."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from striate.plot import Estimate
from striate.runs.run import Run

if TYPE_CHECKING:
    from striate.evaluation.statistics import Interval

PERPLEXITY = "perplexity"
NORMAL = 1.959964  # standard errors each way that hold 95 % of a normal distribution
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja")

# A record is known by its task, its id, and how often that pair was there before.
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Retention:
    """Visual accuracy of a run relative to its reference: means over visual tasks with 95 % intervals.

    `share` is the ratio of the two, `lead` the difference in shares of 1. `paired`: from the same records, one by one;
    else from standard errors that take the two as independent, which makes the intervals too wide. `p` is McNemar's.
    """

    share: Interval
    lead: Interval
    paired: bool
    p: float = math.nan

    @property
    def noise(self) -> bool:
        """Whether the difference may be chance: its interval contains 0."""
        from striate.evaluation.statistics import within_noise  # late: brings in torch

        return within_noise(self.lead)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The lines of predictions.jsonl by record, in their order."""

    lines: Mapping[Key, Mapping[str, Any]]

    @classmethod
    def of(cls, predictions: Sequence[Mapping[str, Any]]) -> Predictions:
        """Predictions by record; those of plain text, which have no answer, are not among them."""
        seen: Counter[tuple[str, str]] = Counter()
        lines: dict[Key, Mapping[str, Any]] = {}
        for line in predictions:
            if line["metric"] != PERPLEXITY:
                name = (str(line["task"]), str(line["id"]))
                lines[(*name, seen[name])] = line
                seen[name] += 1
        return cls(lines)

    def complete(self, tasks: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether there is a line for every record that results.json counts."""
        numbers = Counter(task for task, _, _ in self.lines)
        return numbers == {name: task["n"] for name, task in tasks.items() if task["metric"] != PERPLEXITY}

    def fingerprint(self) -> str:
        """A digest that is equal for two runs if and only if their questions and true answers are equal."""
        questions = [[key, line["question"], list(line["answers"])] for key, line in sorted(self.lines.items())]
        return hashlib.sha256(json.dumps(questions).encode()).hexdigest()

    def scores(self, tasks: Sequence[str]) -> dict[str, list[float]]:
        """The score of every record by task, the records in the order of their keys."""
        found: dict[str, list[float]] = {task: [] for task in tasks}
        for key in sorted(self.lines):
            if key[0] in found:
                found[key[0]].append(float(self.lines[key]["score"]))
        return found


def compare_paired(own: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> Retention | None:
    """From the scores of the same records by task; None where the reference gets nothing right."""
    from striate.evaluation.statistics import difference, mcnemar, retention  # late: brings in torch

    if not any(sum(scores) for scores in others.values()):
        return None
    return Retention(retention(own, others), difference(own, others), True, mcnemar(own, others))


def compare_unpaired(own: Estimate, other: Estimate) -> Retention | None:
    """From two means with standard errors; None where the reference gets nothing right.

    The ratio r = v / v0 has the standard error r * sqrt((s / v)^2 + (s0 / v0)^2).
    """
    from striate.evaluation.statistics import Interval  # late: brings in torch

    if not other.value:
        return None
    ratio = own.value / other.value
    # s / v0 is r * s / v, and holds for a value of zero as well
    spread = NORMAL * math.hypot(own.stderr / other.value, ratio * other.stderr / other.value)
    apart, away = own.value - other.value, NORMAL * math.hypot(own.stderr, other.stderr)
    share, lead = Interval(ratio, ratio - spread, ratio + spread), Interval(apart, apart - away, apart + away)
    return Retention(share, lead, paired=False)


def processor(run: Run) -> str:
    """A digest of the processor files, which say how images and prompts are prepared; empty without a checkpoint."""
    files = [file for name in PROCESSOR if (file := run.checkpoint / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest() if files else ""

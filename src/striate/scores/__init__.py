"""Layer scores of a vision-language model, and its perplexity with groups of layers reverted to the backbone.

`score` measures any of `METRICS` over a sample of records; `revert` is the paper's Figure 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Literal

from striate.data import Record
from striate.distributed import Rank
from striate.errors import UserError, check_choices
from striate.region import Region
from striate.scores import weights
from striate.scores.metrics import METRICS, choose, measure
from striate.scores.revert import Reversion, parse_groups
from striate.scores.revert import revert as revert_batches
from striate.scores.sampling import RecordSample, Sampling
from striate.scores.table import Metric, Score, Scores, order, rank_correlation
from striate.vlm import Vlm

__all__ = [
    "METRICS",
    "Metric",
    "Reversion",
    "Score",
    "Scores",
    "choose",
    "measure",
    "order",
    "parse_groups",
    "rank_correlation",
    "revert",
    "revert_samples",
    "score",
    "scores_in_turn",
]

OnBad = Literal["stop", "skip"]
By = Literal["task"]


def score(
    vlm: Vlm,
    records: Iterable[Record] | None = None,
    *,
    metrics: str | Sequence[str] = "all",
    backbone: str | None = None,
    by: By | None = None,
    samples: int = 64,
    batch: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    on_bad_record: OnBad = "stop",
) -> Scores:
    """Layer scores of a model: attention on the image, change of the hidden states, effect of a layer on the answers.

    Args:
        vlm: the model; scores of weights read its checkpoint on disk, `vlm.source`, which it must equal.
        records: records with answers; scores of weights alone need none.
        metrics: names of scores, separated by commas; default: all scores whose inputs are given.
        backbone: the language model before visual training, for scores that compare with it; a folder.
        by: task: each score also over the records of every task alone (not those of weights).
        samples: number of records to measure, sampled from those with an answer.
        batch: records per forward pass; the scores do not depend on it.
        max_length: maximum number of tokens of a record, image tokens included; longer text is truncated at its end.
        seed: random seed of the sampling.
        on_bad_record: stop at a record that cannot be used, or skip it.

    Raises:
        UserError: a score is unknown or lacks records, images or a backbone, no record has a task, a record cannot be
            used, or the weights give NaN or Inf.
    """
    check_choices({"by": By}, {"by": by} if by else {})
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record)
    sample = RecordSample(()) if records is None else sampling.draw(records)
    names = choose(metrics, backbone=backbone is not None, data=records is not None, images=sample.has_images)
    if not weights.METRICS.keys().isdisjoint(names):
        weights.check_source(vlm)
    *_, scores = scores_in_turn(vlm.source, lambda: vlm, names, sampling, sample, backbone=backbone, by=by)
    return scores


def scores_in_turn(
    model: str | Path,
    open_model: Callable[[], Vlm],
    names: Sequence[str],
    sampling: Sampling,
    sample: RecordSample,
    *,
    backbone: str | None,
    by: By | None = None,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
    progress: bool = False,
) -> Iterator[Scores]:
    """All scores so far, each time that more were measured; those of weights first, which need no open model."""
    if by and not any(record.task for record in sample.records):
        raise UserError('--by task: none of the records has a task; add "task" to each, such as "task": "reading"')
    scores: dict[str, Score] = {}
    weight_names = [name for name in names if name in weights.METRICS]
    if weight_names:
        scores = {score.name: score for score in _measure_weights(model, backbone, weight_names)}
        yield _assemble(scores, model, partial=True)
    if len(weight_names) < len(names):
        vlm = open_model()
        batches = partial(sampling.show_batches, vlm, sample, progress=progress)
        for measured in measure(vlm, names, batches, backbone=backbone, by_task=by == "task", rank=rank):
            scores |= {score.name: score for score in measured}
            if scores:
                yield _assemble(scores, model, partial=True)
    yield _assemble(scores, model)


def _measure_weights(model: str | Path, backbone: str | None, names: Sequence[str]) -> Iterator[Score]:
    compared = [name for name in names if name in weights.FORMULAS]
    if compared and backbone is not None:
        yield from weights.weight_scores(model, backbone, names=compared)
    if "snr" in names:
        yield weights.signal_scores(model)


def revert(
    vlm: Vlm,
    groups: str | Sequence[str],
    *,
    backbone: str | None = None,
    visual: Iterable[Record] | None = None,
    text: Iterable[Record] | None = None,
    samples: int = 64,
    batch: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    on_bad_record: OnBad = "stop",
) -> dict[str, Reversion]:
    """Perplexity with groups of layers reverted to the backbone: what they learned (Wang et al. 2025, Figure 1, left).

    Args:
        vlm: the model.
        groups: layers to revert: 8-15,16-23 (two groups), each (every layer alone), sliding:8.
        backbone: the language model before visual training; a folder; None for a model with unmerged adapters.
        visual: records with images and answers.
        text: records without images, or plain text.
        samples: number of records per set, sampled from those with an answer.
        batch: records per forward pass; the results do not depend on it.
        max_length: maximum number of tokens of a record, image tokens included; longer text is truncated at its end.
        seed: random seed of the sampling.
        on_bad_record: stop at a record that cannot be used, or skip it.

    Raises:
        UserError: no records are given, a group is unknown, the backbone does not match (names the tensor), or a record
            cannot be used.
    """
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record)
    sets = {kind: records for kind, records in (("visual", visual), ("text", text)) if records is not None}
    if not sets:
        raise UserError("revert needs visual records, text records, or both")
    samples_by_kind = {kind: sampling.draw(records) for kind, records in sets.items()}
    return revert_samples(vlm, parse_groups(groups, vlm.depth), sampling, samples_by_kind, backbone=backbone)


def revert_samples(
    vlm: Vlm,
    groups: Mapping[str, Region],
    sampling: Sampling,
    samples: Mapping[str, RecordSample],
    *,
    backbone: str | Path | None,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
    progress: bool = False,
) -> dict[str, Reversion]:
    """Perplexity of each sample of records, by the sample's name, with each group of layers reverted."""
    with ExitStack() as stack:
        streams = (
            (kind, sampling.show_batches(vlm, sample, kind, progress=progress)) for kind, sample in samples.items()
        )
        sets = {kind: stack.enter_context(closing(stream)) for kind, stream in streams}
        return revert_batches(vlm, groups, backbone=backbone, sets=sets, rank=rank)


def _assemble(scores: Mapping[str, Score], model: str | Path, *, partial: bool = False) -> Scores:
    """Scores of one model as a table, in the order of `METRICS`; `partial`: more scores will follow."""
    ordered = {name: scores[name] for name in METRICS if name in scores}
    depth, samples = (max(sizes) for sizes in zip(*((len(s.values), s.n) for s in scores.values()), strict=True))
    return Scores(str(model), depth, samples, ordered, partial)

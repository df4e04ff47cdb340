"""The headline of the page: the finding in a sentence, and the sentences that qualify it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from striate.studies.report.compared import difference, interval, percent
from striate.studies.report.comparison import Arm, Comparison, retention, start
from striate.studies.report.pairing import NORMAL, compare_unpaired

if TYPE_CHECKING:
    from striate.evaluation.statistics import Interval

APART, POWER = 0.01, 0.841621  # a difference of one point; the standard normal quantile of 0.8
NAMED = 3  # tied regions that are named
# Quantiles of Student's t that hold 95 % both ways, by number of seeds; from 10 seeds on that of 10.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def headline(comparison: Comparison) -> tuple[str, list[str]]:
    """What the best smaller region keeps of the reference, with which regions it is tied, and the remarks on that."""
    reference, total = comparison.whole, len(comparison.rows)
    smaller = [arm for arm in comparison.comparable_arms if arm is not reference and _is_smaller(arm)]
    unpruned = [arm for arm in smaller if not arm.first.pruned] or smaller
    alike = [arm for arm in unpruned if _amount(arm) == _amount(reference)] or unpruned
    if not alike:
        done = sum(bool(row.tasks) for row in comparison.rows)
        return f"{total} run{'s' * (total > 1)}, {done} with results", []
    best = max(alike, key=_share)
    region = best.first.region
    assert region is not None
    ties = _name_ties(best, [arm for arm in alike if arm is not best and within_noise(best, arm)])
    whole = f"the reference {reference.name}{' (all layers)' * (str(reference.first.region) == 'all')}"
    whole += ", with which it is tied" * within_noise(best, reference)
    time, whole_time = (arm.training("seconds") for arm in (best, reference))
    ratio = f"{time.value / whole_time.value:.2f}" if time and whole_time and whole_time.value else ""
    spent = ratio and (", in the same time" if ratio == "1.00" else f", in {ratio} of the time")
    trained = f"{_label(best)}, {len(region)} of {region.depth} layers,{ties}"
    sentence = f"{trained} keeps {100 * _share(best):.1f} % of the visual accuracy of {whole}{spent}"
    others = [arm for arm in comparison.comparable_arms if arm is not reference and _trained_all(arm)]
    return sentence, [
        *_certainty(best), *_beside(best, reference, len(alike)), *(_against(best, arm) for arm in others)
    ]  # fmt: skip


def within_noise(arm: Arm, other: Arm) -> bool:
    """Whether the difference between two arms may be chance.

    Runs of the same seed are compared: of one seed by the interval of `Retention`, of several by Student's interval of
    the mean difference, unless each seed by itself says the same: two seeds make that interval very wide. Arms without
    a seed in common are taken as independent.
    """
    pairs = [
        (one, two)
        for one in arm.measured
        for two in other.measured
        if one.info.get("seed") == two.info.get("seed") and not difference(one, two)
    ]
    retentions = [kept for one, two in pairs if (kept := retention(one, two))]
    if not retentions:
        means = arm.visual, other.visual
        apart = compare_unpaired(means[0], means[1]) if means[0] and means[1] else None
        return apart is not None and apart.noise
    if len(retentions) == 1:
        return retentions[0].noise
    leads = [one.lead.value for one in retentions]
    if not any(one.noise for one in retentions) and len({lead > 0 for lead in leads}) == 1:
        return False
    return abs(fmean(leads)) <= STUDENT[min(len(leads), max(STUDENT))] * stdev(leads) / math.sqrt(len(leads))


def _name_ties(best: Arm, ties: Sequence[Arm]) -> str:
    """The arms that are tied with the best one, in words."""
    if not ties:
        return ""
    names = [_label(arm) if _label(arm) != _label(best) else arm.name for arm in ties]
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} others"]
    *first, last = names
    return f" tied with {', '.join(first)}{' and ' * bool(first)}{last},"


def _label(arm: Arm) -> str:
    region, route = arm.first.region, (arm.first.info.get("options") or {}).get("route")
    return ((region.origin if region is not None else "") or arm.name) + " routed" * bool(route)


def _is_smaller(arm: Arm) -> bool:
    region = arm.first.region
    return region is not None and region.fraction < 1 and any(row.kept for row in arm.rows)


def _trained_all(arm: Arm) -> bool:
    """Whether all layers were tuned, as the reference's were, but in another way."""
    return str(arm.first.region) == "all" and not arm.first.pruned and arm.first.training("seconds") is not None


def _compare_kept(title: str, modality: str, best: Arm, reference: Arm) -> Iterator[str]:
    """What the best region keeps of long answers about images, or of text."""
    own, whole = (arm.mean(lambda row: row.mean(modality)) for arm in (best, reference))
    if own is None or whole is None:
        return
    pairs = ((row, next((one for one in reference.rows if one.name == row.reference), None)) for row in best.rows)
    kept = [found for row, one in pairs if one and (found := retention(row, one, modality))]
    sentence = f"{title}: {percent(own)} % against {percent(whole)} %"
    shares = [100 * one.share.value for one in kept]
    if len(kept) > 1:
        sentence += f", {fmean(shares):.1f} % kept ({min(shares):.1f} to {max(shares):.1f} in {len(kept)} seeds)"
    elif kept:
        known = not math.isnan(kept[0].share.low)
        sentence += f", {shares[0]:.1f} % kept" + f" (95 % interval {interval(kept[0].share)})" * known
    yield f"{sentence}."


def _against(best: Arm, other: Arm) -> str:
    """Time and memory of the best region against all layers tuned another way, such as by LoRA in a `Trainer`."""
    ratios = [
        f"{own.value / others.value:.2f} of the {name}"
        for name, key in (("time", "seconds"), ("memory", "peak_memory_gb"))
        if (own := best.training(key)) and (others := other.training(key))
    ]
    method = (other.first.info.get("training") or {}).get("method")
    return f"Against {other.name} (all layers{f', {method}' if method else ''}): {' and '.join(ratios)}."


def _amount(arm: Arm) -> tuple[str, float | None]:
    """The start model of an arm and the number of records seen in training."""
    return start(arm.first), arm.first.training("samples")


def _share(arm: Arm) -> float:
    return fmean(row.kept.share.value for row in arm.rows if row.kept)


def _certainty(best: Arm) -> Iterator[str]:
    """The spread or confidence interval of the retention in the headline."""
    kept = [row.kept for row in best.rows if row.kept]
    if len(kept) > 1:
        shares = [one.share.value for one in kept]
        yield f"Mean of {len(kept)} seeds, which keep {100 * min(shares):.1f} to {100 * max(shares):.1f} %."
        return
    (one,) = kept
    way = "both runs on the same records" if one.paired else "the two runs taken as independent"
    yield f"95 % interval {interval(one.share)} %, {way}."
    if one.noise:
        number = sum(best.first.tasks[name]["n"] for name in best.first.names("visual"))
        yield (
            "The difference from the reference is within noise; one of a point would show with about "
            f"{float(f'{records_needed(one.lead, number):.2g}'):,.0f} records, not {number:,}."
        )


def records_needed(lead: Interval, number: int) -> int:
    """Visual records that would show a difference of one point in 80 % of samples, from the 95 % interval of `number`.

    The standard error s falls with the square root of the number; 1.96 s must be 0.84 s below the difference.
    """
    error = (lead.high - lead.low) / 2 / NORMAL
    return math.ceil(number * ((NORMAL + POWER) * error / APART) ** 2)


def _beside(best: Arm, reference: Arm, number: int) -> Iterator[str]:
    """The number of regions compared, long answers, text and peak memory."""
    if number > 1:
        yield f"The best of {number} regions by visual accuracy."
    if best.first.names("long") != best.first.names("visual"):  # else the sentence itself is about them
        yield from _compare_kept("Long answers", "long", best, reference)
    yield from _compare_kept("Text", "text", best, reference)
    memory, whole_memory = (arm.training("peak_memory_gb") for arm in (best, reference))
    if memory and whole_memory:
        yield f"Peak memory {memory.value:.2f} GB against {whole_memory.value:.2f} GB."

"""Scores as numbers and as a file: means and errors by hand, ranks, round trips, what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from striate.errors import UserError
from striate.region import Region
from striate.runs.run import Run
from striate.scores.table import MOST_SAMPLES, Metric, Score, Scores, order, rank_correlation, shades

METRIC = Metric("focus", needs=("records",), range="0 to 1", source="by hand", direction="low")
NAN = math.nan


def score(*values: float, name: str = "focus", **about: Any) -> Score:
    return Score(name, tuple(float(value) for value in values), **about)


def scores(**about: Any) -> Scores:
    samples = torch.tensor([[1.0, 2.0, NAN], [3.0, 2.0, NAN], [5.0, 5.0, 1 / 3]])
    parts = {"image": samples / 2, "prompt": samples * NAN}
    focus = Score.of_samples(METRIC, samples, parts=parts, table=((1.0, 2.0, NAN), (3.0, NAN, NAN), (4.0, NAN, NAN)))
    return Scores("a/model", 3, 3, {"focus": focus, "change": score(3, 2, 1, name="change")}, **about)


def test_mean_and_standard_error_by_hand() -> None:
    focus = scores()["focus"]
    assert focus.values == pytest.approx((3.0, 3.0, 1 / 3))
    assert focus.stderr is not None
    assert focus.stderr[:2] == pytest.approx((math.sqrt(4 / 3), math.sqrt(3 / 3)))  # variances 4 and 3, n = 3
    assert math.isnan(focus.stderr[2])  # one sample has no spread
    assert focus.parts["image"] == pytest.approx((1.5, 1.5, 1 / 6))
    assert all(math.isnan(value) for value in focus.parts["prompt"])
    assert (focus.n, focus.range, focus.source, focus.direction) == (3, "0 to 1", "by hand", "low")
    assert focus.samples is not None
    assert focus.samples[1][:2] == (3.0, 2.0)


def same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to itself."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@pytest.mark.parametrize("partial", [False, True])
def test_a_file_reads_back(tmp_path: Path, partial: bool) -> None:
    saved = scores(partial=partial)
    saved.save(tmp_path / "scores.json")
    text = (tmp_path / "scores.json").read_text()
    assert "NaN" not in text
    for place in (tmp_path, tmp_path / "scores.json"):
        found = Scores.load(place)
        assert (found.model, found.depth, found.samples, found.partial) == ("a/model", 3, 3, partial)
        for name, one in saved.scores.items():
            ours, theirs = ({**vars(value), "samples": None} for value in (one, found[name]))
            assert same(ours, theirs)
    read, kept = Scores.load(tmp_path)["focus"].samples, saved["focus"].samples
    assert read is not None
    assert kept is not None
    assert read[2] == pytest.approx(kept[2], rel=1e-5)  # six digits
    assert math.isnan(read[0][2])


def test_a_run_holds_scores_and_a_region_can_be_chosen_by_them(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", verb="score", options={})
    assert run.scores is None
    run.write_scores(scores().to_json())
    assert '"values": [3.0, 2.0, 1.0]' in (run.path / "scores.json").read_text()  # to be read with `cat`
    assert run.scores is not None
    assert Scores.from_json(run.scores)["change"].values == (3, 2, 1)
    assert Region.parse(f"top:1@{run.path}:change", 3).layers == (0,)
    assert Region.parse(f"top:1@{run.path}:focus", 3).layers == (2,)  # low means important


def test_a_file_keeps_a_limited_number_of_samples() -> None:
    many = Score.of_samples(METRIC, torch.rand(MOST_SAMPLES + 50, 3))
    assert many.n == MOST_SAMPLES + 50
    assert len(many.to_json()["samples"]) == MOST_SAMPLES


def test_what_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    sound = scores().to_json()
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        Scores.load(file)
    for broken in (
        "{",
        "[]",
        json.dumps(sound | {"depth": 4}),
        json.dumps(sound | {"depth": None}),
        json.dumps(sound | {"scores": {"focus": {}}}),
        json.dumps(sound | {"scores": {"focus": {"values": ["a", "b", "c"]}}}),
        json.dumps(sound | {"scores": {"focus": 3}}),
    ):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"scores\.json") as caught:
            Scores.load(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="focus has 3 values for 4 decoder layers"):
        Scores("m", 4, 1, {"focus": score(1, 2, 3)})
    with pytest.raises(UserError, match="no score 'focsu'; nearest: focus"):
        scores()["focsu"]


def test_order() -> None:
    assert order(score(0.1, 0.4, 0.2, 0.4)) == (1, 3, 2, 0)
    assert order(score(0.1, 0.4, 0.2, 0.4, direction="low")) == (0, 2, 1, 3)
    assert order(score(NAN, 0.4, NAN, 0.5)) == (3, 1, 0, 2)


def test_a_layer_without_a_value_is_never_chosen() -> None:
    scores = Scores("m", 4, 1, {"focus": score(NAN, 3, 1, 2)})
    assert scores.top("focus", 3).layers == (1, 2, 3)
    for size, form in ((1, "bottom"), (4, "top"), (4, "spread")):
        with pytest.raises(UserError, match="focus has no value for layer 0, so it cannot be chosen by it"):
            scores.top("focus", size, form=form)


def test_shades() -> None:
    assert shades(score(1, 3, 2)) == pytest.approx((0, 1, 0.5))
    assert shades(score(1, 100, 10)) == pytest.approx((0, 1, 0.5))  # more than a factor of ten: by the logarithm
    assert shades(score(0, 100, 10)) == pytest.approx((0, 1, 0.1))  # zero has none
    assert shades(score(3, 3)) == (0, 0)
    assert shades(score(1, NAN, 2))[::2] == (0, 1)
    assert all(math.isnan(shade) for shade in shades(score(1, NAN, 2))[1:2] + shades(score(NAN, NAN)))


def test_rank_correlation_by_hand() -> None:
    base = score(1, 2, 3, 4, 5)
    assert rank_correlation(base, score(10, 20, 30, 40, 1000)) == pytest.approx(1)
    assert rank_correlation(base, score(5, 4, 3, 2, 1)) == pytest.approx(-1)
    assert rank_correlation(base, score(5, 4, 3, 2, 1, direction="low")) == pytest.approx(1)
    assert rank_correlation(base, score(2, 1, 4, 3, 5)) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    # Ranks 1.5 1.5 3.5 3.5 5 against 1..5: products sum to 9, squares to 10 and 9.
    assert rank_correlation(base, score(1, 1, 2, 2, 3)) == pytest.approx(9 / math.sqrt(90))
    assert rank_correlation(base, score(1, NAN, 2, 3, 4)) == pytest.approx(1)
    assert math.isnan(rank_correlation(base, score(1, 1, 1, 1, 1)))
    assert math.isnan(rank_correlation(base, score(1, NAN, NAN, NAN, NAN)))
    assert math.isnan(rank_correlation(base, score(*[NAN] * 5)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_rank_correlation_is_symmetric_and_bounded(pairs: list[tuple[int, int]]) -> None:
    one, other = (score(*column) for column in zip(*pairs, strict=True))
    found = rank_correlation(one, other)
    if len(set(one.values)) > 1 and len(set(other.values)) > 1:
        assert -1 - 1e-9 <= found <= 1 + 1e-9
        assert found == pytest.approx(rank_correlation(other, one))
        assert rank_correlation(one, one) == pytest.approx(1)
    else:
        assert math.isnan(found)

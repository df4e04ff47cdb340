from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from striate.errors import UserError
from striate.region import FORMS, PAPER, Region

settings.register_profile("striate", deadline=None)  # a busy machine must not fail the tests
settings.load_profile("striate")

depths = st.integers(1, 80)


@st.composite
def regions(draw: st.DrawFn, depth: int | None = None) -> Region:
    depth = depth or draw(depths)
    return Region(tuple(draw(st.sets(st.integers(0, depth - 1)))), depth)


@st.composite
def families(draw: st.DrawFn, size: int = 3) -> list[Region]:
    depth = draw(depths)
    return [draw(regions(depth)) for _ in range(size)]


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    depth = draw(depths)
    return draw(st.integers(1, depth)), depth


def layers(text: str, depth: int = 12) -> tuple[int, ...]:
    return Region.parse(text, depth).layers


@given(regions())
def test_text_reads_back(region: Region) -> None:
    assert Region.parse(str(region), region.depth) == region


@given(regions(), st.text())
def test_json_reads_back(region: Region, origin: str) -> None:
    region = Region(region.layers, region.depth, origin)
    copy = Region.from_json(json.loads(json.dumps(region.to_json())))
    assert (copy, copy.origin) == (region, origin)


@given(families())
def test_algebra_is_that_of_sets(family: list[Region]) -> None:
    a, b, c = family
    assert a | b == b | a
    assert a & b == b & a
    assert a & (b | c) == (a & b) | (a & c)
    assert (a | b).complement == a.complement & b.complement
    assert a - b == a & b.complement
    assert a.complement.complement == a
    assert (a | a.complement).layers == tuple(range(a.depth))
    assert not len(a & a.complement)
    assert a.fraction + a.complement.fraction == pytest.approx(1)
    assert set((a | b).layers) == set(a) | set(b)


@given(counts())
def test_every_choice_has_as_many_layers_as_asked(count: tuple[int, int]) -> None:
    k, depth = count
    for form in ("uniform", "first", "middle", "last", "hybrid", "random"):
        assert len(Region.parse(f"{form}:{k}", depth)) == k


@given(counts())
def test_uniform_is_evenly_spaced(count: tuple[int, int]) -> None:
    k, depth = count
    chosen = layers(f"uniform:{k}", depth)
    assert chosen == tuple(i * depth // k for i in range(k))
    gaps = {after - before for before, after in zip(chosen, (*chosen[1:], depth), strict=True)}
    assert max(gaps) - min(gaps) <= 1


@given(depths, st.integers(1, 100))
def test_a_share_is_rounded_and_never_empty(depth: int, percent: int) -> None:
    assert len(Region.parse(f"uniform:{percent}%", depth)) == max(1, round(depth * percent / 100))


@given(counts(), st.integers(0, 10**6))
def test_random_draws_of_one_seed_are_nested(count: tuple[int, int], seed: int) -> None:
    k, depth = count
    assert set(layers(f"random:{k}@{seed}", depth)) <= set(layers(f"random:{depth}@{seed}", depth))
    assert layers(f"random:{k}@{seed}", depth) == layers(f"random:{k}@{seed}", depth)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", tuple(range(12))),
        ("none", ()),
        (" 0, 4,8-11 ", (0, 4, 8, 9, 10, 11)),
        ("11,3", (3, 11)),
        ("uniform:25%", (0, 4, 8)),
        ("uniform:3@2", (2, 6, 10)),
        ("uniform:25%@3", (3, 7, 11)),
        ("uniform:1%", (0,)),
        ("first:3", (0, 1, 2)),
        ("middle:3", (4, 5, 6)),
        ("last:25%", (9, 10, 11)),
        ("last:12.5%", (10, 11)),
        ("hybrid:4", (0, 1, 10, 11)),
        ("hybrid:3", (0, 1, 11)),
        ("random:4", (2, 3, 5, 7)),
        ("random:25%@7", (6, 8, 10)),
    ],
)
def test_forms(text: str, expected: tuple[int, ...]) -> None:
    assert layers(text) == expected
    assert Region.parse(text, 12).origin == text.strip()


def test_random_stays_the_same_for_ever() -> None:
    assert layers("random:8@7", 32) == (3, 6, 8, 10, 11, 14, 21, 25)


def test_the_papers_lists_are_for_32_layers_only() -> None:
    assert layers("paper", 32) == (0, 4, 8, 12, 18, 22, 26, 30)
    assert layers("paper-code", 32) == (1, 5, 9, 13, 19, 23, 27, 31)
    for name in PAPER:
        with pytest.raises(UserError, match=r"32 layers.*depth is 12.*accepted"):
            Region.parse(name, 12)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("12", "layer 12"),
        ("0,4-12", "layer 12"),
        ("0-999999999", "layer 999999999"),
        ("4,4", "layer 4 is listed 2 times"),
        ("0-4,2", "layer 2 is listed 2 times"),
        ("8-4", "8-4 is reversed"),
        ("uniform:3@4", "layer 12"),
        ("uniform:13", "13 layers"),
        ("uniform:0", "0 layers"),
        ("uniform:0%", "0%"),
        ("uniform:101%", "101%"),
        ("uniform:2.5", "not an integer"),
        ("first:3@1", "'@'"),
        ("top:3", "top:3@scores.json:NAME"),
        ("spread:3@2", "spread:3@scores.json:NAME"),
        ("bottom:3@scores.json", "bottom:3@scores.json:NAME"),
        ("top:3@:score", "top:3@scores.json:NAME"),
        ("known:vica", "'known:vica' was published for LLaVA-1.5 of 32 or 40 layers; this model's depth is 12"),
        ("known:vicar", "unknown region form"),
        ("best:3@scores.json:block_influence", "unknown region form"),
        ("top:13@scores.json:block_influence", "13 layers"),
        ("spread:0%@scores.json:block_influence", "0%"),
        ("sparse:3", "unknown region form"),
        ("-1", "unknown region form"),
        ("0,,4", "unknown region form"),
        ("٣", "unknown region form"),
        ("9" * 5000, "unknown region form"),
        ("\0", "unknown region form"),
        ("", "unknown region form"),
    ],
)
def test_an_error_names_what_is_wrong_the_depth_and_the_forms(text: str, names: str) -> None:
    with pytest.raises(UserError) as caught:
        Region.parse(text, 12)
    message = str(caught.value)
    assert all(part in message for part in (names, "depth is 12", FORMS))
    assert "\n" not in message


@given(st.text(), depths)
def test_any_text_is_a_region_or_a_user_error(text: str, depth: int) -> None:
    with contextlib.suppress(UserError):
        assert Region.parse(text, depth).depth == depth


@pytest.mark.parametrize(("chosen", "depth"), [((1, 1), 4), ((4,), 4), ((-1,), 4), ((0,), 0), ((0.5,), 4), (("0",), 4)])
def test_a_region_that_cannot_be_is_refused(chosen: tuple, depth: int) -> None:
    with pytest.raises(UserError):
        Region(chosen, depth)


def test_what_names_a_region_in_python(tmp_path: Path) -> None:
    region = Region((0, 2), 4)
    region.save(tmp_path / "region.json")
    forms = (region, "0,2", "uniform:50%", [2, 0], (0, 2, 2), np.array([0, 2]), iter([0, 2]), tmp_path)
    assert all(Region.of(form, 4) == region for form in forms)
    for wrong in (Region((0, 2), 6), [-1], [4], ["0"], tmp_path / "none.json"):
        with pytest.raises(UserError):
            Region.of(wrong, 4)


def test_behaves_as_a_set_of_layers() -> None:
    region = Region((8, 0, 4), 12)
    assert region.layers == tuple(region) == (0, 4, 8)
    assert len(region) == 3
    assert 4 in region
    assert 5 not in region
    assert region.fraction == 0.25
    assert region == Region.parse("uniform:25%", 12)
    assert hash(region) == hash(Region.parse("uniform:25%", 12))
    assert [str(Region.parse(text, 12)) for text in ("0-1,3,5-7", "0-11", "none")] == [
        "0,1,3,5-7",
        "all",
        "none",
    ]


def test_models_of_different_depth_do_not_mix() -> None:
    with pytest.raises(UserError, match="depth 12 and 32"):
        Region((0,), 12) | Region((0,), 32)


def test_files(tmp_path: Path) -> None:
    region = Region.parse("uniform:25%", 12)
    file = tmp_path / "region.json"
    region.save(file)
    for text in (str(file), str(tmp_path)):
        assert (Region.parse(text, 12), Region.parse(text, 12).origin) == (region, "uniform:25%")
    with pytest.raises(UserError, match=r"region 0,4,8 of a model with 12 layers; this model's depth is 32"):
        Region.parse(str(file), 32)


@pytest.mark.parametrize("content", ["", "[]", '{"layers": 3, "depth": 4}', '{"layers": ["a"], "depth": 4}', "\xff"])
def test_a_file_that_is_not_a_region(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.json"):
        Region.parse(str(file), 4)
    with pytest.raises(UserError, match=r"gone\.json"):
        Region.parse(str(tmp_path / "gone.json"), 4)
    with pytest.raises(UserError, match=r"region\.json"):
        Region.parse(str(tmp_path), 4)


def write_scores(path: Path, *, depth: int | None = None, direction: str = "high", **values: list[float | None]) -> str:
    """A file with a score for each list of values."""
    scores = {name: {"values": row, "direction": direction} for name, row in values.items()}
    depth = depth or max(map(len, values.values()), default=1)
    path.write_text(json.dumps({"model": "m", "depth": depth, "samples": 1, "scores": scores}))
    return str(path)


@st.composite
def scored(draw: st.DrawFn) -> tuple[int, list[float | None]]:
    k, depth = draw(counts())
    return k, draw(st.lists(st.integers(0, 9).map(float), min_size=depth, max_size=depth))


@given(scored(), st.sampled_from(["high", "low"]))
def test_chosen_by_a_score(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[int, list[float]], direction: str
) -> None:
    k, values = case
    depth, sign = len(values), -1 if direction == "low" else 1
    file = write_scores(tmp_path_factory.getbasetemp() / "random.json", direction=direction, score=values)
    top, bottom, spread = (Region.parse(f"{form}:{k}@{file}:score", depth) for form in ("top", "bottom", "spread"))
    assert len(top) == len(bottom) == len(spread) == k
    assert 2 * k > depth or not len(top & bottom)
    worth = [sign * value for value in values]
    assert min(worth[layer] for layer in top) >= max((worth[layer] for layer in top.complement), default=-10)
    assert max(worth[layer] for layer in bottom) <= min((worth[layer] for layer in bottom.complement), default=10)
    for i, layer in enumerate(spread):
        stretch = range(i * depth // k, (i + 1) * depth // k)
        assert layer in stretch
        assert worth[layer] == max(worth[other] for other in stretch)
    assert Region.from_json(json.loads(json.dumps(spread.to_json()))) == spread


def test_a_score_may_lie_in_a_run_folder_and_count_in_percent(tmp_path: Path) -> None:
    run = tmp_path / "a run:2"
    run.mkdir()
    file = write_scores(run / "scores.json", score=[0.0, 3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.5])
    for place in (run, file):
        assert layers(f"top:25%@{place}:score", 8) == (1, 3)
        assert layers(f"top:1@{place}:score", 8) == (1,)  # of equal ones the lower
        assert layers(f"bottom:25%@{place}:score", 8) == (5, 6)
        assert layers(f"spread:4@{place}:score", 8) == (1, 3, 4, 7)
    assert Region.parse(f"top:1@{run}:score", 8).origin == f"top:1@{run}:score"


def test_a_score_that_cannot_choose(tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.json", block_influence=[0.1, 0.2, None, 0.4], short=[1.0])
    for form, words in [
        (f"top:2@{file}:blok_influence", "has no score 'blok_influence'; nearest: block_influence"),
        (f"top:2@{file}:block_influence", "block_influence has no value for layer 2"),
        (f"top:2@{file}:short", "short has no list of 4 'values'"),
        (f"top:2@{tmp_path / 'gone.json'}:x", "gone.json cannot be read as layer scores"),
        (f"top:2@{tmp_path / 'gone'}:x", "striate score"),
    ]:
        with pytest.raises(UserError) as caught:
            Region.parse(form, 4)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="scores of a model with 4 layers; this model's depth is 12"):
        Region.parse(f"top:2@{file}:block_influence", 12)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"depth": 4, "scores": []}', '{"scores": {}}', "\xff"])
def test_a_file_that_is_not_scores(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.json"):
        Region.parse(f"top:2@{file}:score", 4)


@pytest.mark.parametrize("score", [3, [], {"values": 3}, {"values": ["a"] * 4}, {"values": {}}])
def test_a_score_that_is_none(tmp_path: Path, score: object) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"depth": 4, "scores": {"odd": score}}))
    with pytest.raises(UserError, match="odd has no"):
        Region.parse(f"top:2@{file}:odd", 4)


def test_published_sets_are_those_of_their_papers() -> None:
    sets = [set(layers(f"known:{name}", 32)) for name in ("shortv", "vica", "cka-lora")]
    assert list(map(len, sets)) == [13, 8, 16]
    assert set.intersection(*sets) == {1, 7, 8, 9, 10, 11, 14}
    assert layers("known:vica", 40) == (0, 6, 8, 9, 10, 13, 14, 16)


def test_regions_by_the_score_of_a_task(tmp_path: Path) -> None:
    run = tmp_path / "a:run"  # a path with a colon
    run.mkdir()
    tasks = {"read": {"values": [5.0, 4.0, 0.0, 0.0, 0.0, 0.0]}, "count": {"values": [0.0, 0.0, 0.0, 0.0, 3.0, 9.0]}}
    scores = {"gradient": {"values": [0.0, 0.0, 9.0, 8.0, 0.0, 0.0], "tasks": tasks}, "plain": {"values": [0.0] * 6}}
    (run / "scores.json").write_text(json.dumps({"depth": 6, "scores": scores}))
    for place in (run, run / "scores.json"):
        assert layers(f"top:2@{place}:gradient", 6) == (2, 3)
        assert layers(f"top:2@{place}:gradient:read", 6) == (0, 1)
        assert layers(f"top:2@{place}:gradient:read,count", 6) == (0, 5)  # the best of each
        assert layers(f"top:4@{place}:gradient:read,count", 6) == (0, 1, 4, 5)
        assert layers(f"spread:2@{place}:gradient:read,count", 6) == (0, 5)
    for text, message in (
        ("gradient:reed", "has no task 'reed'; nearest: read"),
        ("gradient:read,", "has no task ''"),
        ("plain:read", "plain was not measured by task: `striate score --by task` does"),
        ("gradiant:read", "has no score 'gradiant'; nearest: gradient"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            layers(f"top:2@{run}:{text}", 6)
        assert "\n" not in str(caught.value)

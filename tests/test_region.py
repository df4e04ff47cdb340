from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from striate.errors import UserError
from striate.region import FORMS, PAPER, Region

settings.register_profile("striate", deadline=None)  # a busy machine is no failure
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
        ("4,4", "layer 4 is given 2 times"),
        ("0-4,2", "layer 2 is given 2 times"),
        ("8-4", "8-4 runs backwards"),
        ("uniform:3@4", "layer 12"),
        ("uniform:13", "13 layers"),
        ("uniform:0", "0 layers"),
        ("uniform:0%", "0%"),
        ("uniform:101%", "101%"),
        ("uniform:2.5", "no whole number"),
        ("first:3@1", "'@'"),
        ("top:3@scores.json:block_influence", "unknown region form"),
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
def test_a_file_that_holds_no_region(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.json"):
        Region.parse(str(file), 4)
    with pytest.raises(UserError, match=r"gone\.json"):
        Region.parse(str(tmp_path / "gone.json"), 4)
    with pytest.raises(UserError, match=r"region\.json"):
        Region.parse(str(tmp_path), 4)

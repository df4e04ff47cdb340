from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from reporting import DEPTH, QUIET, answer, make_run, make_scores
from rich.console import Console

from striate.errors import UserError
from striate.evaluation.statistics import Interval, difference, mcnemar, retention
from striate.region import Region
from striate.runs.run import Run
from striate.studies.report import ComparedRun, compare, table
from striate.studies.report import report as report_with_figures
from striate.studies.report.comparison import removed_lines, trained_lines
from striate.studies.report.figures import KINDS, figures
from striate.studies.report.headline import headline, records_needed
from striate.studies.report.treatment import kind, treatment

report = partial(report_with_figures, page_only=True)
HOSTILE = (
    "<script>top.document.title='owned'</script>",
    '"><img src=x onerror="top.document.title=\'owned\'">',
    "</style></title></textarea><svg onload=\"top.document.title='owned'\">",
    "' onmouseover='top.document.title=1' x='{{ 7 * 7 }}{% raw %}",
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A backbone, all layers, and two regions that keep 90 % in 0.7 of the time and 50 % in 0.25."""
    return [
        make_run(tmp_path / "backbone", region=None, visual=(0.1, 0.1), seconds=None),
        make_run(tmp_path / "all"),
        make_run(tmp_path / "uniform", region="uniform:25%", visual=(0.72, 0.54), seconds=70.0),
        make_run(tmp_path / "last", region="last:25%", visual=(0.4, 0.3), seconds=25.0),
    ]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "cup.png"
    Image.new("RGB", (640, 480), "red").save(path)
    return path


class Tags(HTMLParser):
    """What is in a page: elements with their attributes, and text outside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.words += "" if self.inside == "script" else data


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", Tags(page.read_text("utf-8")).words)


def ends(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def test_the_headline_has_the_retention_of_the_best_region(runs: list[Path], tmp_path: Path) -> None:
    words = text_of(report(runs, out=tmp_path / "report.html"))
    finding = (
        "uniform:25%, 3 of 12 layers, keeps 90.0 % of the visual accuracy of the reference all (all layers), in 0.70 of"
    )
    assert finding in words
    assert "The best of 2 regions by visual accuracy." in words


def test_retention_and_its_error_by_hand(runs: list[Path]) -> None:
    _, whole, uniform, _ = compare(runs).rows
    assert whole.visual == pytest.approx((0.7, 0.025))  # (0.8 + 0.6) / 2, sqrt(0.03^2 + 0.04^2) / 2
    assert uniform.visual == pytest.approx((0.63, 0.025))
    error = 1.959964 * 0.9 * math.sqrt((0.025 / 0.63) ** 2 + (0.025 / 0.7) ** 2)
    assert uniform.kept is not None
    assert not uniform.kept.paired  # the runs have two predictions and count a hundred
    assert ends(uniform.kept.share) == pytest.approx((0.9, 0.9 - error, 0.9 + error))
    away = 1.959964 * math.hypot(0.025, 0.025)
    assert ends(uniform.kept.lead) == pytest.approx((-0.07, -0.07 - away, -0.07 + away))
    assert uniform.kept.noise == (away > 0.07)
    assert (whole.kept, whole.reference, uniform.reference) == (None, "all", "all")
    assert uniform.text is not None
    assert uniform.text.value == 0.7
    assert math.isnan(uniform.text.stderr)


def test_the_reference_is_all_layers_or_the_first_or_the_one_asked_for(runs: list[Path], tmp_path: Path) -> None:
    assert compare(runs).reference.name == "all"
    assert compare(runs[2:]).reference.name == "uniform"
    assert compare(runs, runs[3]).reference.name == "last"
    absent = compare(runs[2:], runs[1])
    assert ([row.name for row in absent.rows], absent.reference.name) == (["uniform", "last", "all"], "all")
    words = text_of(report(runs, out=tmp_path / "report.html", reference=runs[3]))
    assert "3 of 12 layers, keeps 180.0 % of the visual accuracy of the reference last, in 2.80 of" in words


def test_an_accuracy_of_nothing(tmp_path: Path) -> None:
    blind = [make_run(tmp_path / name, region=name, visual=(0.0, 0.0)) for name in ("all", "last:2")]
    assert [row.kept for row in compare(blind).rows] == [None, None]
    seeing = make_run(tmp_path / "seeing")
    kept = compare([*blind, seeing], seeing).rows[1].kept
    assert kept is not None
    assert ends(kept.share) == pytest.approx((0, -1.959964 * 0.025 / 0.7, 1.959964 * 0.025 / 0.7))
    report([*blind, seeing], out=tmp_path / "report.html")


def test_runs_without_results_appear_with_their_status(runs: list[Path], tmp_path: Path) -> None:
    Run.create(tmp_path / "going", verb="tune", options={}).log({"step": 1, "loss": 2.0})
    Run.create(tmp_path / "crashed", verb="tune", options={}).update(status="failed")
    broken = Run.create(tmp_path / "broken", verb="tune", options={})
    (broken.path / "results.json").write_text("{")
    strange = Run.create(tmp_path / "strange", verb="tune", options={})
    strange.write_results({"tasks": {"read": 3}})
    strange.skip({"source": "train.json:1", "reason": "no image"})
    paths = [*runs, *(tmp_path / name for name in ("going", "crashed", "broken", "strange"))]
    notes = {row.name: row.notes for row in compare(paths).rows}
    assert notes["going"] == ("running", "not evaluated")
    assert notes["crashed"] == ("failed", "not evaluated")
    assert notes["broken"][0] == notes["strange"][0] == "broken"
    assert "results.json cannot be read" in notes["broken"][1]
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert all(note in words for lines in notes.values() for note in lines)
    assert "keeps 90.0 %" in words


def test_only_runs_without_results(tmp_path: Path) -> None:
    Run.create(tmp_path / "going", verb="tune", options={})
    page = report([tmp_path / "going"], out=tmp_path / "report.html")
    assert "1 run, 0 with results" in text_of(page)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"data": "val.json"}, "evaluated on val.json, all on test.json: not compared"),
        ({"n": 50}, "evaluated on other tasks or another number of records than all: not compared"),
        ({"text": None}, "evaluated on other tasks or another number of records than all: not compared"),
    ],
)
def test_runs_evaluated_on_other_records_are_not_compared(
    runs: list[Path], tmp_path: Path, change: dict[str, Any], note: str
) -> None:
    other = make_run(tmp_path / "other", region="first:3", visual=(0.9, 0.9), **change)
    comparison = compare([*runs, other])
    assert comparison.rows[-1].notes == (note,)
    assert comparison.rows[-1].kept is None
    assert comparison.rows[-1] not in comparison.comparable
    page = report([*runs, other], out=tmp_path / "report.html")
    assert "keeps 90.0 %" in text_of(page)
    assert "other records" in text_of(page)


def test_skipped_records_are_counted(runs: list[Path]) -> None:
    Run.open(runs[1]).skip({"source": "train.json:1", "reason": "no image"})
    assert compare(runs).rows[1].notes == ("1 record left out, listed in skipped.jsonl",)


def test_runs_of_the_same_name_get_different_names(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "uniform", region="uniform:3") for folder in ("a", "b")]
    assert [row.name for row in compare([*paths, paths[0]]).rows] == ["a/uniform", "b/uniform"]
    Run.open(paths[1]).update(name="a/uniform")
    Run.open(paths[0]).update(name="a/uniform")
    assert len({row.name for row in compare(paths).rows}) == 2


def test_what_ran_is_split_into_shared_and_different(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / str(rate), learning_rate=rate, batch=16) for rate in (0.5, 0.25)]
    page = report(paths, out=tmp_path / "report.html").read_text("utf-8")
    assert "<dt>options.batch</dt><dd><bdi>16</bdi></dd>" in page
    assert re.search(r"options.learning_rate</th><td><bdi>0.5</bdi></td><td><bdi>0.25</bdi></td>", page)


def test_credits_are_shown_once(runs: list[Path], tmp_path: Path) -> None:
    for path in runs:
        Run.open(path).update(credits=["OpenMoji, CC BY-SA 4.0"])
    assert text_of(report(runs, out=tmp_path / "report.html")).count("OpenMoji, CC BY-SA 4.0") == 1


def test_scores_stand_under_the_regions(runs: list[Path], tmp_path: Path) -> None:
    other = make_scores(tmp_path / "deeper", depth=20, partial=True)
    page = report([*runs, make_scores(tmp_path / "scores"), other], out=tmp_path / "report.html")
    words = text_of(page)
    assert "scores layer scores only" in words
    assert "some/model, 9 records, stopped before the last one" in words
    section = words[words.index("One cell per layer") :]
    # Regions of the same depth first, then range and top quarter of each score.
    assert "● all ◆ uniform ▲ last image attention0 to 0.9179-11 angular distance0 to 0.9170-2" in section
    assert "weight angle0.0833 to 0.9179-11" in section  # low is important
    deeper = section[section.index("deeper") :]
    assert deeper.startswith("deeper some/model")
    assert "uniform" not in deeper[: deeper.index("image attention")]
    shades = re.findall(r'title="layer (\d+): ([^"]*)" style="--shade: ([0-9.]+)"', page.read_text("utf-8"))
    assert [float(shade) for _, _, shade in shades[:DEPTH]] == sorted(float(shade) for _, _, shade in shades[:DEPTH])
    assert (shades[0], shades[DEPTH - 1]) == (("0", "0", "0.060"), ("11", "0.9167", "1.000"))
    assert ("0", "not measured", "0.000") in shades


def test_rank_correlations_between_scores(tmp_path: Path) -> None:
    words = text_of(report([make_scores(tmp_path / "scores")], out=tmp_path / "report.html"))
    assert "123 1 image attention 2 angular distance−1.00 3 weight angle1.00−1.00" in words


def test_figures_of_scores_and_of_reverted_layers(tmp_path: Path) -> None:
    back = Run.create(tmp_path / "back", verb="revert", options={})
    cell = {"value": 4.0, "stderr": None, "n": 1}
    back.write_results({"reverted": {"visual": {"tuned": cell, "backbone": cell, "groups": {"8-15": cell}}}})
    page = report([make_scores(tmp_path / "scores"), back.path], out=tmp_path / "report.html")
    words = text_of(page)
    for title in (
        "Layer scores: scores",
        "Image attention: scores",
        "Blocks of layers: scores",
        "Layers reverted: back",
    ):
        assert title in words
    assert "layers reverted only" in words
    assert report([tmp_path / "scores", back.path], out=tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_broken_scores_leave_the_rest_of_the_report(runs: list[Path], tmp_path: Path) -> None:
    for content in ("{", "[]", '{"scores": {"a": {}}, "depth": 3}', '{"scores": {"a": {"values": [1]}}, "depth": 3}'):
        (make_scores(tmp_path / str(len(content))) / "scores.json").write_text(content)
        row = compare([*runs, tmp_path / str(len(content))]).rows[-1]
        assert row.notes[0] == "broken"
        assert "keeps 90.0 %" in text_of(report([*runs, row.run.path], out=tmp_path / "report.html"))


def test_a_report_is_one_file_without_network_and_runs_its_own_script_alone(runs: list[Path], tmp_path: Path) -> None:
    page = report(runs, out=tmp_path / "report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "embed")]
    assert not {value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")}
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert json.loads(data)["sets"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("meta", policy) in [(tag, attributes.get("content")) for tag, attributes in tags]
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]


def test_the_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    pages = [report(runs, out=tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def hostile_report(tmp_path: Path) -> Path:
    """A report on runs in which every text that people can choose tries to run a script."""
    paths = []
    for i, bad in enumerate(HOSTILE):
        path = make_run(
            tmp_path / f"{i}",
            region="all" if i else "last:3",
            data=HOSTILE[0],
            answers=(bad, "cup"),
            images=(Path(bad),),
        )
        run = Run.open(path)
        run.update(name=bad, verb=bad, parent=bad, seed=bad, command=bad, credits=[bad], options={bad: bad})
        run.write_results({**(run.results or {}), "tasks": {bad: (run.results or {})["tasks"]["read"]}})
        run.write_predictions(p | {"question": bad, "answers": [bad], "task": bad} for p in run.predictions())
        run.write_region(Region((i,), DEPTH, origin=bad))
        paths.append(path)
        paths.append(make_scores(tmp_path / f"scores {i}", suffix=bad))
        cell = {"value": 4.0, "stderr": None, "n": 1}
        back = {"visual": {"tuned": cell, "backbone": cell, "groups": {bad: cell}}}
        Run.create(tmp_path / f"back {i}", verb="revert", options={}).write_results({"reverted": back})
        paths.append(tmp_path / f"back {i}")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "run.json").write_text(HOSTILE[0])
    return report([*paths, tmp_path / "strange"], out=tmp_path / "hostile.html", title=HOSTILE[0])


def test_text_from_data_stays_text(tmp_path: Path) -> None:
    page = hostile_report(tmp_path).read_text("utf-8")
    tags = Tags(page).tags
    assert {tag for tag, _ in tags}.isdisjoint({"img", "iframe"})
    assert [attributes.get("id") for tag, attributes in tags if tag == "script"] == ["records", None]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page


def test_a_file_that_is_no_report_is_not_overwritten(runs: list[Path], tmp_path: Path) -> None:
    precious = tmp_path / "train.json"
    precious.write_text("[]")
    with pytest.raises(UserError, match=r"train\.json exists and is not a page of striate"):
        report(runs, out=precious)
    assert precious.read_text() == "[]"
    with pytest.raises(UserError, match="cannot be written"):
        report(runs, out=tmp_path)
    page = tmp_path / "new" / "report.html"
    assert report(runs, out=page) == report(runs, out=page) == page


def test_no_runs_and_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        report([], out=tmp_path / "report.html")
    with pytest.raises(UserError, match=r"not a run folder.*run\.json"):
        report([tmp_path], out=tmp_path / "report.html")


def test_table_for_the_terminal(runs: list[Path], tmp_path: Path) -> None:
    Run.create(tmp_path / "[red]going", verb="tune", options={})
    shown = io.StringIO()
    Console(width=160, file=shown).print(table([*runs, tmp_path / "[red]going"]))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert lines[3] == ["uniform", "■···■···■···", "63.0±2.5", "90.0", "81-99", "70.0", "1.48", "M", "70", "1.50"]
    assert (lines[5][0], lines[5][-3:]) == ("[red]going", ["running;", "not", "evaluated"])


def test_runs_on_the_same_records_are_compared_record_by_record(tmp_path: Path) -> None:
    whole = {"read": [1.0] * 90 + [0.0] * 10, "count": [1.0, 0.0] * 20}
    part = {"read": [1.0] * 85 + [0.0] * 15, "count": [0.0, 1.0] + [1.0, 0.0] * 19}
    paths = [
        answer(make_run(tmp_path / "all"), whole),
        answer(make_run(tmp_path / "first", region="first:3", data="moved/test.json"), part),
    ]
    row = compare(paths).rows[1]
    assert row.kept is not None
    assert row.kept.paired
    assert row.kept.share == retention(part, whole)
    assert row.kept.lead == difference(part, whole)
    assert row.kept.p == mcnemar(part, whole)
    words = text_of(report(paths, out=tmp_path / "report.html"))
    low, high = (f"{100 * end:.1f}" for end in (row.kept.share.low, row.kept.share.high))
    assert f"95 % interval {low} to {high} %, both runs on the same records." in words
    assert row.kept.noise == ("The difference from the reference is within noise;" in words)


def test_a_difference_within_noise_is_called_so(tmp_path: Path) -> None:
    paths = [
        answer(make_run(tmp_path / "all"), {"read": [1.0, 0.0, 1.0, 0.0] * 10}),
        answer(make_run(tmp_path / "same", region="first:3"), {"read": [0.0, 1.0, 1.0, 0.0] * 10}),
        answer(make_run(tmp_path / "worse", region="last:3"), {"read": [0.0] * 39 + [1.0]}),
    ]
    same, worse = (row.kept for row in compare(paths).rows[1:])
    assert same is not None
    assert worse is not None
    assert (same.noise, worse.noise) == (True, False)
    page = report(paths, out=tmp_path / "report.html").read_text("utf-8")
    # Once in words, once in the notes to the table and once as a mark in the results by task.
    assert page.count('<span class="noise">within noise</span>') == 2
    assert page.count('<span class="hidden">within noise</span>') == 1


def test_other_records_are_recognized_by_the_records_and_not_by_the_name_of_the_file(tmp_path: Path) -> None:
    scores = {"read": [1.0, 0.0, 1.0]}
    paths = [
        answer(make_run(tmp_path / "all"), scores),
        answer(make_run(tmp_path / "other", region="first:3"), scores, words="unlike"),
    ]
    assert compare(paths).rows[1].notes == ("evaluated on other records than all: not compared",)
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert words.index("Not compared") < words.index("evaluated on other records than all")


def test_another_processor_is_not_compared(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "all"), make_run(tmp_path / "first", region="first:3")]
    for path, size in zip(paths, (224, 336), strict=True):
        answer(path, {"read": [1.0, 0.0]})
        (path / "checkpoint").mkdir()
        (path / "checkpoint" / "processor_config.json").write_text(json.dumps({"size": size}))
    note = "its processor prepares images or prompts differently from that of all: not compared"
    assert compare(paths).rows[1].notes == (note,)


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Three seeds of all layers and of a quarter, each on records of its own, where the quarter keeps 50, 75, 100 %."""
    for seed, right in enumerate((2, 3, 4)):
        start = tmp_path / "start" / str(seed)
        Run.create(start, verb="assemble", options={"llm": "some/model"}, seed=seed)
        world = {"data": f"runs/world-{seed}/test.json", "model": str(start), "seed": seed}
        for name, region, number in (("all", "all", 4), ("part", "uniform:25%", right)):
            scores = {"read": [1.0] * number + [0.0] * (4 - number), "count": [1.0] * number + [0.0] * (4 - number)}
            run = make_run(tmp_path / "runs" / f"seed-{seed}" / name, region=region, **world)
            answer(run, scores, words=f"seed {seed}")
            Run.open(run).update(generated="a world of 4 questions")
    return tmp_path / "runs"


def test_runs_that_differ_only_in_the_seed_are_one_line(seeds: Path, tmp_path: Path) -> None:
    comparison = compare([seeds])
    assert [row.name for row in comparison.rows] == [f"seed-{i}/{name}" for i in range(3) for name in ("all", "part")]
    assert [(arm.name, len(arm.rows)) for arm in comparison.arms] == [("all", 3), ("part", 3)]
    assert [row.reference for row in comparison.rows] == [f"seed-{i}/all" for i in range(3) for _ in range(2)]
    part = comparison.arms[1]
    assert part.mean(lambda row: row.visual) == pytest.approx((0.75, 0.25))  # mean and deviation of 0.5, 0.75, 1
    words = text_of(report([seeds], out=tmp_path / "report.html"))
    assert "keeps 75.0 % of the visual accuracy of the reference all (all layers)" in words
    assert "Mean of 3 seeds, which keep 50.0 to 100.0 %." in words
    assert "75.0 ±25.0" in words


def test_the_reference_of_other_seeds_is_the_twin_of_the_one_asked_for(seeds: Path) -> None:
    rows = compare([seeds], seeds / "seed-1" / "part").rows
    assert [row.reference for row in rows] == [f"seed-{i}/part" for i in range(3) for _ in range(2)]
    kept = rows[0].kept
    assert kept is not None
    assert kept.share.value == 2
    with pytest.raises(UserError, match="name one run as the reference"):
        compare([seeds], seeds)


def test_the_same_seed_twice_is_not_two_seeds(seeds: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(seeds / "seed-0", copy)
    assert sorted(len(arm.rows) for arm in compare([seeds, copy]).arms) == [1, 1, 3, 3]


SAME = {"model config.json": "sha256 a", "model model.safetensors": "sha256 b", "data": "sha256 c", "code": "sha256 d"}
OTHER_MODEL, OTHER_DATA = SAME | {"model model.safetensors": "sha256 z"}, SAME | {"data": "sha256 z"}


def made(seed: int = 0, content: Any = SAME, generated: str = "", verb: str = "tune", **options: Any) -> dict[str, Any]:
    """As run.json tells of a training."""
    about = {"verb": verb, "seed": seed, "content": content, "parent": options.get("model"), "options": options}
    return about | ({"generated": generated} if generated else {})


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (made(0, model="a", data="b"), made(1, model="c", data="d"), True),
        (made(3, model="phi-3"), made(4, OTHER_MODEL, model="phi-4"), False),
        (made(3, {}, model="phi-3"), made(4, {}, model="phi-4"), False),
        (made(3, {}, model="phi"), made(4, {}, model="phi"), True),
        (made(0, model="seed-0/m"), made(1, OTHER_MODEL, model="seed-1/m"), False),
        (made(0, data="seed0.json"), made(1, OTHER_DATA, data="seed1.json"), False),
        (made(0, data="a.json", generated="a"), made(1, OTHER_DATA, data="b.json", generated="a"), True),
        (made(0, data="a.json", generated="a"), made(1, data="a.json", generated="b"), False),
        (made(0, learning_rate=0.1), made(1, learning_rate=0.2), False),
        (made(0, remove="0"), made(1, remove="1"), False),
        (made(0, projector="train"), made(1, projector="freeze"), False),
        (made(0, model="m"), made(1, model="m", verb="align"), False),
        (made(0, out="a", device="cpu", rank=1), made(1, out="b", device="cuda", rank=1), True),
    ],
)
def test_what_counts_as_another_seed(one: Any, other: Any, alike: bool) -> None:
    first, second = (treatment("run", info, None) for info in (one, other))
    assert (first == second) == alike


@pytest.mark.parametrize(
    ("seeds", "rates", "alike"), [((0, 1), (1, 1), True), ((5, 5), (1, 1), True), ((0, 1), (1, 2), False),
                                  ((0, 7), (1, 1), False)],
)  # fmt: skip
def test_a_parent_is_known_by_its_making(tmp_path: Path, seeds: Any, rates: Any, alike: bool) -> None:
    found = []
    for own, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        grandparent = Run.create(tmp_path / f"g{own}", verb="assemble", options={"llm": "some/model"}, seed=seed)
        parent = tmp_path / f"any name {own}"
        Run.create(parent, verb="align", options={"model": str(grandparent.path), "learning_rate": rate}, seed=seed)
        content = {"model model.safetensors": f"sha256 {own}"}  # trained from another seed, it is another
        info = {"verb": "tune", "options": {"model": str(parent)}, "seed": own, "content": content}
        found.append(treatment("run", info, None))
    assert (found[0] == found[1]) == alike


def test_a_run_that_names_itself_as_its_model_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create("a", verb="tune", options={"model": "a"}, seed=0)
    assert treatment("a", run.info, None)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("uniform:25%", "uniform"), ("0,4,8", "uniform"), ("1,5,9", "uniform@1"), ("uniform:3@2", "uniform@2"),
        ("0-2", "first"), ("9-11", "last"), ("0,10,11", "listed"), ("random:3@5", "random"), ("all", "all"),
    ],
)  # fmt: skip
def test_how_layers_were_chosen(form: str, name: str) -> None:
    assert kind(Region.parse(form, DEPTH)) == name


def test_folders_and_sweeps_stand_for_their_runs(runs: list[Path], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep / "a", region="first:3")
    make_run(sweep / "unlisted", region="last:3")
    make_run(sweep / ".old" / "hidden", region="last:3")
    cells = [
        {"name": "a", "values": {"region": "first:3"}, "runs": ["a"], "status": "finished"},
        {"name": "b", "values": {"region": "last:3"}, "runs": ["b"], "status": "pending"},
        {"name": "c", "values": {"region": "last:3"}, "status": "failed"},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"cells": cells}))
    rows = compare([runs[1], sweep]).rows
    assert [row.name for row in rows] == ["all", "a", "b", "c", "unlisted"]
    assert [row.notes for row in rows[2:4]] == [("pending",), ("failed",)]
    words = text_of(report([runs[1], sweep], out=tmp_path / "report.html"))
    assert words.index("Without results") < words.index("pending")
    for content in ("{", "[]", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [3]}'):
        (sweep / "sweep.json").write_text(content)
        assert [row.name for row in compare([sweep]).rows] == ["a", "unlisted"]


def training(samples: int, layers: int) -> dict[str, Any]:
    return {
        "seconds": 10.0 * layers, "peak_memory_gb": 1.0 + layers, "samples": samples, "samples_per_second": 1.0,
        "trainable_parameters": layers, "total_parameters": 99,
    }  # fmt: skip


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """Two seeds of 2, 4 and all layers, with 100 and 200 records: accuracy layers / 12, or half of that."""
    for seed in (0, 1):
        for samples in (100, 200):
            for layers in (2, 4, 12):
                name = f"{layers}-{samples}"
                region = "all" if layers == 12 else f"uniform:{layers}"
                path = make_run(tmp_path / "sizes" / f"seed-{seed}" / name, region=region, seed=seed, steps=samples)
                right = layers * samples // 200
                answer(path, {"read": [1.0] * right + [0.0] * (12 - right), "count": [1.0] * 6 + [0.0] * 6})
                Run.open(path).update(training=training(samples, layers))
    return tmp_path / "sizes"


def test_lines_over_the_number_of_trained_layers(sizes: Path) -> None:
    small, large = trained_lines(compare([sizes]))
    assert (small.name, large.name) == ("uniform, 100 records", "uniform, 200 records")
    curve = large.curve(lambda row: row.tasks["read"]["value"], 0.98)
    assert curve.points() == {2: [2 / 12] * 2, 4: [4 / 12] * 2, 12: [1.0, 1.0]}
    assert len(curve.seeds) == 2
    assert curve.floor == 0.98


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_figures_and_numbers_lie_beside_the_page(sizes: Path, tmp_path: Path) -> None:
    page = report_with_figures([sizes], out=tmp_path / "my report.html")
    folder = tmp_path / "my report-figures"
    names = {"accuracy", "accuracy-by-task", "layers", "cost-by-layers", "cost", "loss"}
    found = {file.stem for file in folder.iterdir() if not file.stem.startswith("table-")}
    assert found == names
    assert {file.name for file in folder.iterdir()} >= {f"{name}.{kind}" for name in names for kind in KINDS}
    tags = Tags(page.read_text("utf-8")).tags
    linked = {unquote(attributes["href"] or "") for tag, attributes in tags if tag == "a"}
    assert linked == {f"{folder.name}/{file.name}" for file in folder.iterdir()}
    points = [line for line in read_csv(folder / "layers.csv") if line["line"] == "uniform, 200 records"]
    assert [(line["trained layers"], float(line["mean"]), line["n"]) for line in points] == [
        ("2", pytest.approx(100 * (2 / 12 + 0.5) / 2), "2"),
        ("4", pytest.approx(100 * (4 / 12 + 0.5) / 2), "2"),
        ("12", pytest.approx(75.0), "2"),
    ]
    titles = re.findall(r"<title>(uniform, 200 records, [^<]*)</title>", page.read_text("utf-8"))
    assert "uniform, 200 records, 2 layers: 33.3 ± 0.0 % (n = 2)" in titles


def test_numbers_of_a_table_are_those_shown(runs: list[Path], tmp_path: Path) -> None:
    page = report_with_figures(runs, out=tmp_path / "report.html")
    lines = read_csv(tmp_path / "report-figures" / "table-strategies.csv")
    assert [line["run"] for line in lines] == ["backbone", "all", "uniform", "last"]
    assert (lines[2]["chosen"], lines[2]["mean"], lines[2]["kept"]) == ("uniform", "63.0", "90.0")
    shown = text_of(page)
    for line in lines[1:]:
        for column in ("read", "count", "mean"):
            assert f"{float(line[column]):.1f} ±{float(line[f'{column} ±']):.1f}" in shown


def test_pruned_runs_become_curves_before_and_after_healing(tmp_path: Path) -> None:
    whole = answer(make_run(tmp_path / "all"), {"read": [1.0] * 4, "count": [1.0] * 4})
    paths = [whole]
    for healed in (False, True):
        for number in (1, 2):
            path = tmp_path / f"cut-{number}{'-healed' * healed}"
            make_run(path, remove=str(number), by="angular_distance", heal="train.json" if healed else None)
            right = 4 - number * (1 if healed else 2)
            answer(path, {"read": [1.0] * right + [0.0] * (4 - right), "count": [1.0] * 4})
            done = {"parent": str(whole), "by": "angular_distance", "removed": list(range(number))}
            Run.open(path).update(verb="prune", parent=str(whole), prune=done, **({"healed": {}} if healed else {}))
            paths.append(path)
    comparison = compare(paths)
    before, after = removed_lines(comparison)
    assert (before.name, before.dashed, after.name, after.dashed) == ("all", True, "all, healed", False)

    def read(row: ComparedRun) -> float:
        return row.tasks["read"]["value"]

    assert before.curve(read).points() == {0: [1.0], 1: [0.5], 2: [0.0]}
    assert after.curve(read).points() == {0: [1.0], 1: [0.75], 2: [0.5]}
    titles = {one.title for one in figures(comparison)}
    assert {"Pruning", "Pruning by task"} <= titles
    assert "Number of trained layers" not in titles
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert "Pruned models" in words
    assert re.search(r"all, healed ?2 ?0, 1 ?75\.0", words)


def test_models_with_their_own_whole_stand_side_by_side(tmp_path: Path) -> None:
    paths = []
    for model in ("small", "large"):
        for name, region in (("all", "all"), ("part", "uniform:25%")):
            path = make_run(tmp_path / model / name, region=region, model=model)
            Run.open(path).update(parent=model)
            paths.append(path)
    words = text_of(report(paths, out=tmp_path / "report.html"))
    section = words[words.index("Other models") :]
    assert section.index("small/part") < section.index("large/all") < section.index("large/part")


def test_records_in_the_page_are_those_of_the_runs(tmp_path: Path) -> None:
    paths = [
        answer(make_run(tmp_path / "all"), {"read": [1.0, 0.0], "count": [0.5]}),
        answer(make_run(tmp_path / "first", region="first:3"), {"read": [0.0, 1.0], "count": [0.999]}),
    ]
    page = report(paths, out=tmp_path / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    (one,) = data["sets"]
    assert one["runs"] == [["all", "all"], ["first", "first"]]
    assert one["score"] == [[1, 0, 0.5], [0, 1, 0.99]]  # only what is right is 1
    assert [data["pool"][i] for i in one["question"]] == [" read 0?", " read 1?", " count 0?"]
    assert [data["pool"][i] for i in one["answer"][1]] == ["no", "yes", "yes"]
    assert one["task"] == [0, 0, 1]


def test_records_have_small_images_where_they_can_be_read(tmp_path: Path, image: Path) -> None:
    missing, text_file = tmp_path / "gone.png", tmp_path / "text.png"
    text_file.write_text("no image")
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8), "blue").save(other)
    path = answer(make_run(tmp_path / "all"), {"read": [1.0] * 3})
    lines = [
        line | {"images": [str(file), str(missing), str(other)]}
        for line, file in zip(Run(path).predictions(), (image, missing, text_file), strict=True)
    ]
    Run(path).write_predictions(lines)
    page = report([path], out=tmp_path / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert data["sets"][0]["images"] == [[0, 1], [1], [1]]
    assert len(data["images"]) == 2
    assert all(address.startswith("data:image/") and len(address) < 2000 for address in data["images"])


def browse(page: Path, script: str = "", width: int = 1200) -> str:
    """The title after Chromium has shown a page in a frame `width` pixels wide and run `script` beside it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium to look at the report")
    # Its policy forbids scripts: without it, only the escaping stands between data and script.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    frame = page.with_suffix(".frame.html")
    frame.write_text(
        f'<title>untouched</title><iframe width="{width}" height="800" srcdoc="{html.escape(text)}"></iframe>'
        f"<script>onload = () => {{ const page = frames[0].document; {script} }}</script>",
        encoding="utf-8",
    )
    shown = subprocess.run(
        [chromium, *QUIET, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return re.search(r"<title>(.*?)</title>", shown.stdout, re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.browser
def test_no_script_from_data_runs_in_a_browser(tmp_path: Path) -> None:
    assert browse(hostile_report(tmp_path)) == "untouched"
    naive = tmp_path / "naive.html"
    naive.write_text(HOSTILE[1], encoding="utf-8")
    assert browse(naive) == "owned"  # so the test would have seen it


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_sticks_out_sideways(runs: list[Path], tmp_path: Path, image: Path, width: int) -> None:
    long = make_run(tmp_path / ("long" * 20), region="0,2,4,6,8,10", images=(image,), answers=("wide " * 99, "w" * 300))
    scores = [make_scores(tmp_path / f"scores of {depth}", depth=depth) for depth in (DEPTH, 80)]
    page = report([long, *runs, *scores, hostile_report(tmp_path / "h").parent / "0"], out=tmp_path / "report.html")
    script = "document.title = page.documentElement.scrollWidth + ' ' + page.body.innerText.length"
    wide, letters = map(int, browse(page, script, width).split())
    assert wide == width
    assert letters > 1000


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (["all_seed-0", "all_seed-1"], "all"),
        (["last_seed-0+cut", "last_seed-1+cut"], "last+cut"),
        (["a-0", "a-1"], "a"),
        (["first", "second"], "first / second"),
        (["0", "1"], "0 / 1"),
    ],
)
def test_runs_over_seeds_are_called_by_what_their_names_share(folders: list[str], name: str, tmp_path: Path) -> None:
    for seed, folder in enumerate(folders):
        make_run(tmp_path / folder, seed=seed)
    (arm,) = compare([tmp_path / folder for folder in folders]).arms
    assert arm.name == name


def test_a_run_is_set_against_the_reference_of_its_own_seed(tmp_path: Path) -> None:
    for seed, visual in enumerate([(0.8, 0.6), (0.6, 0.4)]):
        make_run(tmp_path / f"all-{seed}", seed=seed, visual=visual)
        make_run(tmp_path / f"last-{seed}", region="last:25%", seed=seed, visual=tuple(value / 2 for value in visual))
    make_run(tmp_path / "alone", region="first:25%", seed=7, visual=(0.4, 0.3))
    rows = {row.name: row for row in compare([tmp_path]).rows}
    assert {name: row.reference for name, row in rows.items()} == {
        "all-0": "all-0", "all-1": "all-1", "last-0": "all-0", "last-1": "all-1", "alone": "all-0",
    }  # fmt: skip
    assert [rows[name].kept.share.value for name in ("last-0", "last-1", "alone")] == pytest.approx([0.5, 0.5, 0.5])


def test_what_should_be_equal_and_is_not_is_noted(runs: list[Path]) -> None:
    content = {"code": "sha256 a", "data": "sha256 b", "model config.json": "sha256 c"}
    others = {"code": "sha256 z", "data": "sha256 y", "model config.json": "sha256 c"}
    versions = {"torch": "2.13.0", "striate": "1"}
    Run.open(runs[0]).update(content=content, versions=versions)
    Run.open(runs[1]).update(content=others, versions=versions | {"torch": "2.12.0", "striate": "2"}, warnings=["odd"])
    Run.open(runs[1]).log({"step": 900, "loss": 9.5, "lr": 0.0, "spike": ["17"]})
    first, second, *_ = compare([*runs[:2]], reference=runs[0]).rows
    assert first.notes == ()
    assert second.notes == (
        "odd", "1 loss spike", f"trained on different records from {first.name}",
        f"by different code than {first.name}",
        f"torch 2.12.0, {first.name} with 2.13.0",
    )  # fmt: skip
    assert second.spikes == ((900, 9.5),)


def test_the_headline_names_the_reference_and_the_ties(tmp_path: Path) -> None:
    paths = [
        answer(make_run(tmp_path / "all"), {"read": [1.0] * 80 + [0.0] * 20}),
        answer(make_run(tmp_path / "uniform", region="uniform:25%"), {"read": [1.0, 0.0, 1.0, 1.0] * 15 + [0.0] * 40}),
        answer(make_run(tmp_path / "first", region="first:25%"), {"read": [1.0, 1.0, 0.0, 1.0] * 15 + [0.0] * 40}),
        answer(make_run(tmp_path / "last", region="last:25%"), {"read": [1.0] * 10 + [0.0] * 90}),
    ]
    finding = "keeps 56.2 % of the visual accuracy of the reference all (all layers), in the same time"
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert f"uniform:25%, 3 of 12 layers, tied with first:25%, {finding}" in words
    words = text_of(report([paths[0], *paths[:0:-1]], out=tmp_path / "report.html"))
    assert f"first:25%, 3 of 12 layers, tied with uniform:25%, {finding}" in words


def test_a_headline_names_a_routed_region(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "all"), make_run(tmp_path / "quarter", region="uniform:25%", route="same")]
    assert headline(compare(runs))[0].startswith("uniform:25% routed, 3 of 12 layers, keeps 100.0 %")


def test_a_headline_has_long_answers_and_text_beside_the_visual_mean(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "all"),
        make_run(tmp_path / "uniform", region="uniform:25%", visual=(0.8, 0.54), text=0.63),
    ]
    assert "Text: 63.0 % against 70.0 %, 90.0 % kept." in headline(compare(runs))[1]
    for run in map(Run, runs):
        results = run.results or {}
        results["tasks"]["count"]["metric"] = "share_named"
        run.write_results(results)
    error = 1.959964 * 0.9 * math.hypot(0.04 / 0.54, 0.04 / 0.6)
    _, remarks = headline(compare(runs))
    sentence = "Long answers: 54.0 ± 4.0 % against 60.0 ± 4.0 %, 90.0 % kept"
    assert f"{sentence} (95 % interval {90 - 100 * error:.1f} to {90 + 100 * error:.1f})." in remarks


def test_records_needed_by_hand() -> None:
    # s = 0.02 / 1.96; of 100 records (2.80 s / 0.01)^2 = 8.17 times as many
    assert records_needed(Interval(0.005, -0.015, 0.025), 100) == 818
    # twice the records, half the variance: the same number
    half = 0.02 / math.sqrt(2)
    assert abs(records_needed(Interval(0, -half, half), 200) - 818) <= 1


def test_a_headline_of_several_seeds_has_the_range_of_what_text_is_kept(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{region[:3]}-{seed}", region=region, seed=seed, text=text)
        for region, texts in (("all", (0.5, 0.8)), ("uniform:25%", (0.45, 0.8)))
        for seed, text in enumerate(texts)
    ]
    assert (
        "Text: 62.5 ± 24.7 % against 65.0 ± 21.2 %, 95.0 % kept (90.0 to 100.0 in 2 seeds)."
        in (headline(compare(runs))[1])
    )


def test_a_headline_against_all_layers_tuned_another_way(tmp_path: Path) -> None:
    usual = make_run(tmp_path / "usual", seconds=400.0)
    Run(usual).update(training=Run(usual).info["training"] | {"method": "lora", "peak_memory_gb": 6.0})
    runs = [usual, make_run(tmp_path / "all"), make_run(tmp_path / "quarter", region="uniform:25%", seconds=80.0)]
    _, remarks = headline(compare(runs, runs[1]))
    assert remarks[-1] == "Against usual (all layers, lora): 0.20 of the time and 0.25 of the memory."
    assert not any("Against" in remark for remark in headline(compare(runs[1:]))[1])


def test_a_headline_of_a_region_that_is_tied_with_the_reference(tmp_path: Path) -> None:
    paths = [
        answer(make_run(tmp_path / "all"), {"read": [1.0, 0.0, 1.0, 0.0] * 10}),
        answer(make_run(tmp_path / "same", region="first:3"), {"read": [0.0, 1.0, 1.0, 0.0] * 10}),
    ]
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert "keeps 100.0 % of the visual accuracy of the reference all (all layers), with which it is tied, in" in words


@pytest.mark.parametrize(
    ("gaps", "tied"), [((4, 5, 6), False), ((1, 5, 9), True), ((0, 0, 0), True), ((20, 40), False)]
)
def test_arms_of_several_seeds_are_tied_by_the_spread_of_their_differences(
    tmp_path: Path, gaps: tuple[int, ...], tied: bool
) -> None:
    # Student's interval of three differences d: mean(d) +- 4.303 sd(d) / sqrt(3), by hand 5 +- 2.5 and 5 +- 9.9 points;
    # of two 30 +- 127, but neither of them can be chance.
    paths = []
    for seed, gap in enumerate(gaps):
        for region, right in (("all", 90), ("first:3", 60), ("last:3", 60 - gap)):
            path = make_run(tmp_path / f"{region.partition(':')[0]}-{seed}", region=region, seed=seed)
            paths.append(answer(path, {"read": [1.0] * right + [0.0] * (100 - right)}))
    words = text_of(report(paths, out=tmp_path / "report.html"))
    assert ("first:3, 3 of 12 layers, tied with last:3, keeps 66.7 %" in words) == tied

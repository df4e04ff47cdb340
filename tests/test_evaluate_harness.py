"""lm-eval and lmms-eval on local tasks: their numbers are those of striate's own evaluation of the same records."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import together
from pico import pico_llava
from PIL import Image

from striate.data import read
from striate.errors import UserError
from striate.evaluation import answer, harness, lmms
from striate.runs.evaluating import EVAL, evaluate, evaluate_tasks
from striate.runs.run import Run
from striate.vlm import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the harnesses' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
needs_lm = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
needs_lmms = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

QUESTIONS = [f"is this {word} ?" for word in "a red blue green cat dog car one two three picture".split()]  # noqa: SIM905
CHOICES = ["yes", "no it", "a red dog"]

# The harness's text is the one that the pico chat template writes, so that both ask the same.
CHOOSE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "<s><user> {{{{question}}}} <assistant>"
doc_to_choice: '{{{{["yes</s>", "no it</s>", "a red dog</s>"]}}}}'
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SAY = """
task: pico_say
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "<s><user> {{{{question}}}} <assistant>"
doc_to_target: said
generation_kwargs: {{max_gen_toks: 3, until: ["|"], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: pico_both
task: [pico_choose, pico_again]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""
SEE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_visual: !function see.images
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
generation_kwargs: {{max_new_tokens: 3, until: ["{until}"]}}
metric_list:
  - {{metric: exact_match, aggregation: {aggregation}, higher_is_better: true}}
"""
IMAGES = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"])]

def percent(items):
    return 100 * sum(items) / len(items)
"""

CPU = replace(EVAL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_llava(tmp_path_factory.mktemp("llava"))
    vlm = load(folder, dtype="float32", device="cpu")
    with torch.no_grad():  # fresh weights are so small that every answer would be the same
        for parameter in vlm.model.parameters():
            parameter.mul_(4)
    vlm.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions of which the model answers some, not all, as the data say; in the harness's form and in striate's."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = [{"question": question, "right": n % 3} for n, question in enumerate(QUESTIONS)]
    for n, row in enumerate(rows):
        Image.new("RGB", (32, 32), (20 * n, 90, 255 - 20 * n)).save(folder / f"{n}.png")
        row["image"] = str(folder / f"{n}.png")
    vlm = load(model, dtype="float32", device="cpu")
    for column, marks in (("said", ""), ("seen", "<image>\n")):
        asked = [{"messages": [{"role": "user", "content": marks + row["question"]}]} for row in rows]
        for one, row in zip(asked, rows, strict=True):
            one |= {"images": [row["image"]]} if marks else {}
        (folder / "asked.json").write_text(json.dumps(asked))
        for n, text in answer(vlm, read(folder / "asked.json").records, max_new_tokens=3):
            first = text.partition("e")[0].strip()
            rows[n] |= {column: text if n % 4 else "something else", "whole": text, "first": first}
        for one, row in zip(asked, rows, strict=True):
            one |= {"answers": [row[column]], "task": f"pico_{column}"}
        (folder / f"{column}.json").write_text(json.dumps(asked))
        choose = [one | {"answers": [CHOICES[row["right"]]], "choices": CHOICES, "task": "pico_choose"}
                  for one, row in zip(asked, rows, strict=True)]  # fmt: skip
        if not marks:
            (folder / "choose.json").write_text(json.dumps(choose))
    (folder / "rows.json").write_text(json.dumps(rows))
    return {file.stem: file for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def task_path(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = data["rows"]
    (folder / "see.py").write_text(IMAGES)
    for name, text in {
        "choose": CHOOSE.format(task="pico_choose", data=rows),
        "again": CHOOSE.format(task="pico_again", data=rows),
        "say": SAY.format(data=rows),
        "both": GROUP,
        "see": SEE.format(task="pico_see", target="seen", data=rows, until="|", aggregation="mean"),
        "cut": SEE.format(task="pico_cut", target="first", data=rows, until="e", aggregation="mean"),
        "percent": SEE.format(
            task="pico_percent", target="seen", data=rows, until="|", aggregation="!function see.percent"
        ),
        "sample": SEE.format(
            task="pico_sample", target="seen", data=rows, until='|"], do_sample: true, stop: ["', aggregation="mean"
        ),
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def asked(model: Path, task_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    @cache
    def ask(names: str, **options: Any) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("runs") / "run"
        found = evaluate_tasks(model, names, out=place, task_path=task_path, options=replace(CPU, **options))
        assert Run.open(place).results == json.loads(json.dumps(found))
        return found

    return ask


def own(model: Path, data: Path, out: Path) -> dict[str, Any]:
    return evaluate(model, data, out=out, max_new_tokens=3, options=CPU)["tasks"]


@needs_lm
def test_lm_eval_finds_what_striate_finds(
    asked: Callable[..., dict[str, Any]], model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    found = asked("lm:pico_choose,pico_say", batch=4)
    choose = own(model, data["choose"], tmp_path / "choose")["pico_choose"]
    say = own(model, data["said"], tmp_path / "say")["pico_said"]
    assert 0 < choose["value"] < 1
    assert found["tasks"]["pico_choose"] == pytest.approx(choose | {"metric": "acc"})
    assert 0 < say["value"] < 1
    assert found["tasks"]["pico_say"] == pytest.approx(say)
    assert found["text"] == pytest.approx((choose["value"] + say["value"]) / 2)
    assert found["visual"] is None


@needs_lmms
@pytest.mark.parametrize("batch", [1, 4])
def test_lmms_eval_finds_what_striate_finds(
    asked: Callable[..., dict[str, Any]], model: Path, data: dict[str, Path], tmp_path: Path, batch: int
) -> None:
    see = own(model, data["seen"], tmp_path / "seen")["pico_seen"]
    found = asked("lmms:pico_see", batch=batch)
    assert 0 < see["value"] < 1
    assert found["tasks"]["pico_see"] == pytest.approx(see)
    assert (found["visual"], found["text"]) == (pytest.approx(see["value"]), None)


def harnessed(model: Path, out: Path, task_path: Path, prefixes: Sequence[str]) -> None:
    """One process of an evaluation."""
    names = [f"{prefix}:{NAMES[prefix]}" for prefix in prefixes]
    evaluate_tasks(model, names, out=out, task_path=task_path, options=replace(CPU, batch=4))


NAMES = {"lm": "pico_choose,pico_say", "lmms": "pico_see"}


def test_two_processes_share_the_questions(
    asked: Callable[..., dict[str, Any]], model: Path, task_path: Path, tmp_path: Path
) -> None:
    prefixes = [prefix for prefix, package in harness.PACKAGES.items() if find_spec(package)]
    if not prefixes:
        pytest.skip("neither harness is installed")
    assert together(2, harnessed, model, tmp_path / "two", task_path, prefixes) == [0, 0]
    found = Run.open(tmp_path / "two")
    assert found.info["status"] == "finished"
    for prefix in prefixes:
        for name, task in asked(f"{prefix}:{NAMES[prefix]}", batch=4)["tasks"].items():
            assert (found.results or {})["tasks"][name] == pytest.approx(task)


@needs_lm
def test_a_group_counts_as_one_task(asked: Callable[..., dict[str, Any]]) -> None:
    alone = asked("lm:pico_choose")["tasks"]["pico_choose"]
    found = asked("lm:pico_both")
    assert list(found["tasks"]) == ["pico_both"]
    assert found["tasks"]["pico_both"] == pytest.approx(
        alone | {"n": 22, "stderr": found["tasks"]["pico_both"]["stderr"]}
    )
    assert {*found["harness"]["lm-eval"]["tasks"]} == {"pico_both", "pico_choose", "pico_again"}


@needs_lm
@needs_lmms
def test_both_harnesses_on_the_first_questions(asked: Callable[..., dict[str, Any]]) -> None:
    found = asked("lm:pico_choose lmms:pico_see", samples=5)
    assert [task["n"] for task in found["tasks"].values()] == [5, 5]
    assert [task["modality"] for task in found["tasks"].values()] == ["text", "visual"]
    assert found["data"].endswith("(the first 5 of each)")


@needs_lmms
def test_an_answer_stops_before_a_stop_string(asked: Callable[..., dict[str, Any]], data: dict[str, Path]) -> None:
    rows = json.loads(data["rows"].read_text())
    assert any(row["first"] != row["whole"] for row in rows)
    assert asked("lmms:pico_cut,pico_percent")["tasks"]["pico_cut"]["value"] == 1
    assert lmms._before("a red dog", ["d", "", "re"]) == "a "


@needs_lmms
def test_metrics_outside_0_to_1_are_not_a_task(asked: Callable[..., dict[str, Any]]) -> None:
    share = asked("lmms:pico_see")["tasks"]["pico_see"]
    found = asked("lmms:pico_cut,pico_percent")
    assert list(found["tasks"]) == ["pico_cut"]
    metrics = found["harness"]["lmms-eval"]["tasks"]["pico_percent"]["metrics"]
    assert metrics["exact_match,none"] == pytest.approx(100 * share["value"])


def test_results_by_hand() -> None:
    """The first share that a task lists counts; a percentage is known by name; what is inside a group is not alone."""
    found = {
        "results": {
            "mmbench_en_dev_static": {"alias": "x", "submission,none": None, "gpt_eval_score,none": 62.5},
            "words": {"word_perplexity,none": 0.5, "acc_norm,none": 0.25, "acc,none": 0.75, "acc_stderr,none": "N/A"},
            "loss": {"wer,none": 0.5},
            "all": {"exact_match,get-answer": 0.5, "exact_match_stderr,get-answer": 0.25},
            "one": {"exact_match,get-answer": 0.25}, "two": {"exact_match,get-answer": 0.75},
        },
        "configs": {
            "mmbench_en_dev_static": {"metric_list": [{"metric": "gpt_eval_score", "aggregation": len}]},
            "words": {"metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity"},
                                      {"metric": "acc"}, {"metric": "acc_norm"}]},
            "loss": {"metric_list": [{"metric": "wer", "aggregation": "mean", "higher_is_better": False}]},
            "one": {}, "two": {},
        },
        "group_subtasks": {"all": ["half"], "half": ["one", "two"]},
        "samples": {
            "mmbench_en_dev_static": [{"doc_id": 0, "gpt_eval_score": {}}, {"doc_id": 1, "gpt_eval_score": {}}],
            "words": [{"doc_id": 0, "acc": 1}, {"doc_id": 0, "acc": 1}, {"doc_id": 1}],
            "one": [{"doc_id": 0, "exact_match": 1}], "two": [{"doc_id": 0, "exact_match": 1}],
        },
    }  # fmt: skip
    results = harness._results(found, {"mmbench_en_dev_static"})
    assert {name: tuple(result.values()) for name, result in results.items()} == {
        "mmbench_en_dev_static": ("gpt_eval_score", "visual", 0.625, None, 2),
        "words": ("acc", "text", 0.75, None, 1),
        "all": ("exact_match:get-answer", "text", 0.5, 0.25, 2),
    }


@needs_lmms
def test_sampling_is_refused(asked: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"task pico_sample needs sampled answers or beams; striate supports one"):
        asked("lmms:pico_sample")


@pytest.mark.parametrize("prefix", [pytest.param("lm", marks=needs_lm), pytest.param("lmms", marks=needs_lmms)])
def test_an_unknown_task_and_the_nearest(prefix: str, task_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip(f"{harness.PACKAGES[prefix]}.tasks")
    # The thousands of tasks that the harness brings take half a minute to read, and are not what this is about.
    own = package.TaskManager(include_path=str(task_path), include_defaults=False)
    monkeypatch.setattr(package, "TaskManager", lambda **_: own)
    title = harness.PACKAGES[prefix].replace("_", "-")
    with pytest.raises(UserError, match=rf"^{title} has no task 'pico_sea'; nearest: pico_see"):
        harness.open_tasks(harness.tasks(f"{prefix}:pico_sea"))
    with pytest.raises(UserError, match=rf"^{title} has no task 'wxyz'; "):
        harness.open_tasks(harness.tasks(f"{prefix}:wxyz"))


@pytest.mark.parametrize("prefix", harness.PACKAGES)
def test_a_harness_that_is_not_installed(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, harness.PACKAGES[prefix], None)
    message = r"^--tasks lmm?s?:any needs lmm?s?-eval, .*: pip install 'striate\[eval\]'\n"  # then its section
    with pytest.raises(UserError, match=message):
        evaluate_tasks("nowhere", f"{prefix}:any", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_of_tasks() -> None:
    assert harness.tasks("lm:mmlu,bbh") == harness.Tasks(lm=("mmlu", "bbh"))
    assert harness.tasks(["lmms:gqa", "lm:mmlu lmms:gqa,pope"]) == harness.Tasks(lm=("mmlu",), lmms=("gqa", "pope"))
    both = harness.tasks("paper-text paper-visual lm:mmlu")
    assert both.lm == ("mmlu", "bbh", "ceval-valid", "cmmlu")
    assert "docvqa_val" in both.lmms
    assert both.missing == ("OCR-VQA", "TDIUC")
    for wrong in ("mmlu", "lm:", "lmm:gqa", "", []):
        with pytest.raises(UserError, match="expected lm:NAME,NAME, lmms:NAME,NAME, or paper-visual, paper-text"):
            harness.tasks(wrong)


@pytest.mark.parametrize("prefix", [pytest.param("lm", marks=needs_lm), pytest.param("lmms", marks=needs_lmms)])
def test_the_harnesses_have_the_suites(prefix: str) -> None:
    """Looked for as text: to have the harness read its thousands of files takes half a minute."""
    spec = find_spec(harness.PACKAGES[prefix])
    assert spec is not None
    assert spec.origin is not None
    files = (Path(spec.origin).parent / "tasks").rglob("*.yaml")
    named = {
        name for file in files for name in re.findall(r"^(?:task|group|tag): *[\"']?([\w-]+)", file.read_text(), re.M)
    }
    assert {name for suite in harness.SUITES.values() for name in getattr(suite, prefix)} <= named

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from striate.errors import UserError
from striate.region import Region
from striate.runs import provenance
from striate.runs.environment import machine, versions
from striate.runs.run import Run
from striate.vlm.reading import model_folder

plain = st.dictionaries(
    st.text(),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs" / "tune", verb="tune", options={"epochs": 1}, seed=3, parent="org/model")


def test_what_a_new_run_says(run: Run) -> None:
    info = run.info
    assert {key: info[key] for key in ("verb", "status", "name", "options", "seed", "parent")} == {
        "verb": "tune",
        "status": "running",
        "name": "tune",
        "options": {"epochs": 1},
        "seed": 3,
        "parent": "org/model",
    }
    assert info["started"].endswith("+00:00")
    assert info["versions"] == versions()
    assert "python" in info["versions"]
    assert info["machine"] == machine()
    assert info["machine"]["cores"] >= 1
    assert info["machine"]["cpu"]
    assert (run.region, run.results, run.history(), run.predictions(), run.skipped()) == (
        None,
        None,
        [],
        [],
        [],
    )
    assert [file.name for file in run.path.iterdir()] == ["run.json"]


def test_update_keeps_the_rest(run: Run) -> None:
    run.update(status="finished", seconds=1.5)
    assert Run.open(run.path) == run
    assert (run.info["status"], run.info["seconds"], run.info["verb"]) == ("finished", 1.5, "tune")


def test_what_is_written_is_read_back(run: Run) -> None:
    region = Region.parse("uniform:25%", 12)
    run.write_region(region)
    run.write_results({"visual": 0.81})
    run.write_predictions({"id": str(i), "score": i / 2} for i in range(2))
    run.skip({"source": "train.json:3", "reason": "no image"})
    assert (run.region, run.region and run.region.origin) == (region, "uniform:25%")
    assert Region.parse(str(run.path), 12) == region
    assert run.results == {"visual": 0.81}
    assert run.predictions() == [{"id": "0", "score": 0.0}, {"id": "1", "score": 0.5}]
    assert run.skipped() == [{"source": "train.json:3", "reason": "no image"}]


def test_skipping_takes_time_by_the_record_and_lists_each_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    lines = Run.skipped
    monkeypatch.setattr(Run, "skipped", lambda self: read.append(1) or lines(self))
    entries = [{"source": f"train.json:{number}", "reason": "no image"} for number in range(50)]
    for entry in [*entries, *entries]:
        run.skip(entry)
    assert len(read) == 1  # the list on disk; 100 times would make 2,000 records take seconds
    Run(run.path).skip({"source": "another", "reason": "no image"})
    run.skip({"source": "another", "reason": "no image"}, *entries)
    assert run.skipped() == [*entries, {"source": "another", "reason": "no image"}]


def test_predictions_of_an_unfinished_evaluation(run: Run) -> None:
    assert run.unfinished is None
    assert run.begin_predictions({"model": "a"}) == []
    run.append_predictions({"batch": 1})
    run.append_predictions({"batch": 2})
    with open(run.path / "predictions.part.jsonl", "ab") as file:
        file.write(b'{"batch": 3')
    assert run.begin_predictions({"model": "a"}) == [{"batch": 1}, {"batch": 2}]
    run.append_predictions({"batch": 4})
    assert run.begin_predictions({"model": "a"})[2:] == [{"batch": 4}]
    assert run.unfinished == {"model": "a"}
    assert run.begin_predictions({"model": "b"}) == []
    run.write_predictions([{"id": "0"}])
    assert (run.unfinished, run.predictions()) == (None, [{"id": "0"}])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(plain, max_size=3))
def test_any_text_survives(run: Run, entries: list[dict]) -> None:
    run.write_predictions(entries)
    assert run.predictions() == entries


def test_half_a_surrogate_pair_survives(run: Run) -> None:
    run.update(parent="caf\udce9")
    run.skip({"source": "\ud800\u2028"})
    assert run.info["parent"] == "caf\udce9"
    assert run.skipped() == [{"source": "\ud800\u2028"}]


def test_options_and_numbers_of_other_types(run: Run) -> None:
    @dataclass(frozen=True)
    class Options:
        data: Path
        rank: int = 128

    run.update(options=Options(Path("train.json")), loss=np.float32(0.5), steps=np.int64(7))
    assert (run.info["options"], run.info["loss"]) == ({"data": "train.json", "rank": 128}, 0.5)
    assert json.loads((run.path / "run.json").read_text())["steps"] == 7


def test_a_torn_last_line_is_dropped_and_does_not_corrupt_the_next(run: Run) -> None:
    run.log({"step": 1, "loss": 2.0})
    with open(run.path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert run.history() == [{"step": 1, "loss": 2.0}]
    run.log({"step": 2, "loss": 1.0})
    assert run.history() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_broken_line_elsewhere_is_an_error(run: Run) -> None:
    (run.path / "log.jsonl").write_bytes(b'{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2"):
        run.history()


def test_steps_that_a_resumed_run_repeats_count_once(run: Run) -> None:
    for step, loss in [(1, 4.0), (2, 3.0), (3, 2.5), (2, 3.1), (3, 2.7), (3, 2.6), (4, 2.0)]:
        run.log({"step": step, "loss": loss})
    assert [(entry["step"], entry["loss"]) for entry in run.history()] == [
        (1, 4.0),
        (2, 3.1),
        (3, 2.6),
        (4, 2.0),
    ]


def test_a_folder_with_another_run_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"holds another run: tune, running, started 20"):
        Run.create(run.path, verb="align", options={})
    assert run.info["verb"] == "tune"


def test_a_run_that_failed_before_it_made_anything_is_replaced(run: Run) -> None:
    run.skip({"source": "train.json", "reason": "bad"})
    with pytest.raises(ZeroDivisionError), run.recording():
        raise ZeroDivisionError
    Run.create(run.path, verb="align", options={})
    assert (run.info["verb"], run.info["status"], run.skipped()) == ("align", "running", [])
    run.log({"step": 1, "loss": 4.0})
    with pytest.raises(ZeroDivisionError), run.recording():
        raise ZeroDivisionError
    with pytest.raises(UserError, match="holds another run: align, failed"):
        Run.create(run.path, verb="align", options={})


def test_a_folder_with_anything_is_refused(tmp_path: Path) -> None:
    for name in "dcba":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"is not empty: it holds a, b, c \.\.\."):
        Run.create(tmp_path, verb="align", options={})
    with pytest.raises(UserError, match="File exists"):
        Run.create(tmp_path / "a", verb="align", options={})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*run\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "[1]", '{"verb": "tune"}'])
def test_a_run_json_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json is not that of a run: it has no verb and status"):
        Run.open(tmp_path)


def test_no_space_left_keeps_what_was_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.write_results({"visual": 0.81})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left to write .*results\.json"):
        run.write_results({"visual": 0.9})
    assert run.results == {"visual": 0.81}
    assert sorted(file.name for file in run.path.iterdir()) == ["results.json", "run.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk(run: Run) -> None:
    (run.path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left to write .*log\.jsonl"):
        run.log({"step": 1})


def test_a_broken_file_is_named(run: Run) -> None:
    (run.path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        assert run.results


def test_model_folder(run: Run, tmp_path: Path) -> None:
    assert model_folder("org/model") == "org/model"
    assert model_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"no checkpoint/ \(tune, running\)"):
        model_folder(run.path)
    run.checkpoint.mkdir()
    assert model_folder(str(run.path)) == run.checkpoint


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")],
)
def test_recording_writes_the_final_status(
    run: Run, error: type[BaseException] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 107.5])
    monkeypatch.setattr("striate.runs.run.time.monotonic", lambda: next(clock))
    with contextlib.suppress(error or ZeroDivisionError), run.recording():
        if error:
            raise error
    assert (run.info["status"], run.info["seconds"]) == (status, 7.5)


def test_recording_keeps_a_status_set_inside_and_adds_up_the_time(run: Run) -> None:
    run.update(seconds=100.0)
    with run.recording():
        run.update(status="interrupted")
    assert run.info["status"] == "interrupted"
    assert run.info["seconds"] >= 100


@pytest.mark.parametrize(
    ("launch", "writes"),
    [
        ({"RANK": "3"}, True),  # a scheduler's name for a task that works alone
        ({"RANK": "3", "WORLD_SIZE": "1"}, True),
        ({"RANK": "", "WORLD_SIZE": ""}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_the_first_process_of_a_launch_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, str], writes: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    Run.create(tmp_path / "run", verb="tune", options={})
    assert (tmp_path / "run" / "run.json").is_file() is writes


def test_resume_compares_the_code_that_trains_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Path(provenance.__file__).parents[1]
    shutil.copytree(sources, tmp_path / "striate", ignore=shutil.ignore_patterns("__pycache__", "models"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "striate" / "runs" / "provenance.py"))
    before = provenance.code()
    for name, same in (("studies/report/page.py", True), ("runs/cli.py", True), ("train/loss.py", False)):
        file = tmp_path / "striate" / name
        file.write_text(file.read_text() + "# another line\n")
        assert (provenance.code() == before) is same, name


def test_all_code_that_decides_the_weights_is_looked_at() -> None:
    harmless = {"distributed", "errors", "roundtrip", "scores"}  # of `scores`, see TRAINING
    sources = Path(provenance.__file__).parents[1]
    counted = [file for pattern in provenance.TRAINING for file in sources.glob(pattern)]
    imported = {
        line.split()[1].split(".")[1]
        for file in counted
        for line in file.read_text().splitlines()
        if line.startswith("from striate.") and not file.match("scores/*")
    }
    known = {file.relative_to(sources).parts[0].removesuffix(".py") for file in counted}
    assert imported - harmless == known - {"scores"}

"""Sweeps: the file is checked first, finished cells stay, and whatever interrupts, the end is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from pico import DEPTH, pico_llava
from rich.console import Console
from training import changed, weights, write_data

import striate
from striate.runs.cli import main
from striate.runs.provenance import BLOCK, BLOCKS, content_of, difference, digest
from striate.runs.run import Run
from striate.studies.sweep import cells, sweep
from striate.studies.sweep.cell import last_step
from striate.studies.sweep.executor import PROGRAM, visible_gpus
from striate.studies.sweep.plan import num_records, num_steps, predict, read_plan

CPU = {"device": "cpu"}
SHEET: dict[str, Any] = {
    "model": "../llava",
    "data": "../train.json",
    "eval": {"data": "../train.json", "max_new_tokens": 2, "batch": 8, **CPU},
    "out": "out",
    "tune": {
        "steps": 3, "batch": 4, "micro_batch": 4, "learning_rate": 0.01, "dtype": "float32", "method": "full", **CPU,
    },
    "grid": {"region": ["uniform:25%", "last:25%"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pico_llava(folder / "llava")
    write_data(folder)
    return folder


@pytest.fixture
def here(world: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder beside the model and the data, entered."""
    folder = world / re.sub(r"\W+", "-", request.node.name)
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def sheet(**changes: Any) -> Path:
    """Write a sweep file into the current folder; a key set to None is left out."""
    found = {key: value for key, value in {**SHEET, **changes}.items() if value is not None}
    Path("sweep.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    return Path("sweep.yaml")


def tune(**options: Any) -> dict[str, Any]:
    return {**SHEET["tune"], **options}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modle": "m"}, "sweep.yaml: unknown key 'modle'; nearest: model"),
    ({"data": None}, "sweep.yaml: data is missing"),
    ({"data": "."}, "sweep.yaml: .: no .json, .jsonl, .parquet file in this folder"),
    ({"data": "none.json"}, "sweep.yaml: data: none.json: no such file"),
    ({"model": 3}, "sweep.yaml: model: text was expected, found 3"),
    ({"model": "../none"}, "sweep.yaml: model: no model at '../none'"),
    ({"images": "none"}, "sweep.yaml: images: no such folder: none"),
    ({"tune": ["a"]}, "sweep.yaml: tune: expected options and values"),
    ({"tune": {"epoch": 1}}, "sweep.yaml: tune has no option 'epoch'; nearest: epochs"),
    ({"tune": {"epochs": "many"}}, "sweep.yaml: tune.epochs: 'many' is not a number"),
    ({"tune": {"method": "ful"}}, "sweep.yaml: tune.method: 'ful' is not one of auto, full, lora"),
    ({"tune": {"truncate_text": "on it"}}, "sweep.yaml: tune.truncate_text: 'on it' is not true or false"),
    ({"tune": {"seed": [0, 1]}}, "sweep.yaml: tune.seed: one value was expected, found a list; what varies goes into"),
    ({"tune": {"out": "x"}}, "sweep.yaml: tune.out is not for a section or the grid"),
    ({"tune": {"region": "last:9"}}, "sweep.yaml: tune.region is set under tune as well|grid.region is set under tune"),
    ({"tune": {"samples": "9"}}, "sweep.yaml: data: samples 9: there are only 8 records"),
    ({"eval": {"max_length": 9}}, "sweep.yaml: eval.data is missing: records"),
    ({"eval": {"tasks": "color"}}, "sweep.yaml: eval.tasks: no tasks 'color': expected lm:NAME"),
    ({"eval": {**SHEET["eval"], "tasks": "trian"}}, "sweep.yaml: eval.tasks: no task 'trian'; nearest: train"),
    ({"eval": {"data": "none.json"}}, "sweep.yaml: eval.data: no such file or folder: none.json"),
    ({"eval": {"data": "../train.json", "samples": 2.5}}, "sweep.yaml: eval.samples: 2.5 is not a whole number"),
    ({"prune": {"remove": 9}}, r"sweep.yaml: prune of uniform-25%: --remove 9: only 3 layers can be cut"),
    ({"prune": {}}, "sweep.yaml: prune of uniform-25%: give either --remove"),
    ({"prune": {"remove": 1, "by": "magic"}}, "sweep.yaml: prune of uniform-25%: --by: no score 'magic'"),
    ({"prune": {"remove": 1, "scores": "none.json"}}, "sweep.yaml: prune.scores: no such file or folder: none.json"),
    ({"grid": {}}, "sweep.yaml: grid: expected options that vary"),
    ({"grid": {"region": []}}, r"sweep.yaml: grid.region: expected a list of values, found \[\]"),
    ({"grid": {"region": "all"}}, "sweep.yaml: grid.region: expected a list of values, found 'all'"),
    ({"grid": {"regoin": ["all"]}}, "sweep.yaml: tune has no option 'regoin'; nearest: region"),
    ({"grid": {"region": ["all", "last:9"]}}, "sweep.yaml: grid.region: 'last:9' asks for 9 layers"),
    ({"grid": {"seed": [0, 0]}}, "sweep.yaml: grid.seed: 0 is given twice"),
    ({"grid": {"steps": [1, 2]}}, "sweep.yaml: grid.steps is set under tune as well"),
    ({"grid": {"modules": ["all", "attn"]}}, "sweep.yaml: tune of modules-attn: --modules 'attn'; nearest: attention"),
    ({"tune": {"steps": 0}}, "sweep.yaml: tune of uniform-25%: --steps 0: more than 0 was expected"),
    ({"grid": {"warmup": [0, 2]}}, "sweep.yaml: tune of warmup-2.0: --warmup 2.0: at least 0 and less than 1"),
    ({"grid": {"rank": [0]}}, "sweep.yaml: tune of rank-0: --rank 0: at least 1 was expected"),
    ({"eval": {**SHEET["eval"], "batch": 0}}, "sweep.yaml: eval of .*: --batch 0: at least 1 was expected"),
    ({"prune": {"remove": 1, "seed": -1}}, "sweep.yaml: prune of .*: --seed -1: 0 to 4294967295 was expected"),
    ({"grid": {"eval.batch": [1]}}, "sweep.yaml: grid.eval.batch: only options of tune"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[12:52] for _, message in WRONG])
def test_what_is_wrong_in_the_file_is_reported_before_anything_runs(
    change: dict[str, Any], message: str, here: Path
) -> None:
    with pytest.raises(striate.UserError, match=message) as refused:
        sweep(sheet(**change))
    assert "\n" not in str(refused.value)
    assert not (here / "out").exists()


def test_numbers_in_the_file_are_what_they_would_be_on_the_command_line(here: Path) -> None:
    file = sheet(
        tune=tune(warmup="1e-1"), prune={"by": "random"}, grid={"region": [0, "1,3"], "prune.remove": [1, "50%"]}
    )
    plan = read_plan(file)
    assert [recipe.region.layers for recipe in plan.recipes] == [(0,), (1, 3)]
    assert plan.recipes[0].tune["warmup"] == 0.1
    assert [values["remove"] for values in plan.recipes[0].prunings] == ["1", "50%"]
    assert [folder.name for folder in plan.cells[1].runs] == ["1,3", "1,3+remove-1", "1,3+remove-50%"]
    assert plan.recipes[0].prunings[0]["data"] == "../train.json"


def test_names_of_cells_are_safe_and_differ(here: Path) -> None:
    for name in ("a-b", "A-b"):
        (here / f"{name}.json").write_text(json.dumps({"layers": [1], "depth": DEPTH}))
        (here / name.replace("-", "_")).mkdir()
    (here / "a").mkdir()
    (here / "a" / "b.json").write_text((here / "a-b.json").read_text())
    regions = ["a-b.json", "A-b.json", "a/b.json", "uniform:25%", "0", "./" * 60 + "a-b.json"]
    found = read_plan(sheet(grid={"region": regions, "seed": [0, 1]})).cells
    names = [cell.name for cell in found]
    assert len({name.casefold() for name in names}) == 12
    assert all(re.fullmatch(r"[\w.,%@=~-]{1,100}", name) for name in names), names
    assert "uniform-25%_seed-1" in names
    assert read_plan(sheet(grid={"region": regions[::-1], "seed": [1, 0]})).cells[::-1] == found


def test_content_is_bytes_not_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text("[]")
    second.write_text("[]")
    assert content_of(first) == content_of(second)
    second.write_text("[ ]")
    assert "content of data has changed" in difference({"data": digest(first)}, {"data": digest(second)})
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b was 2, now it is 3"
    assert difference({"a": 1}, {"a": 1}) == ""
    monkeypatch.setattr("striate.runs.provenance.WHOLE", BLOCKS * BLOCK)
    weights_file = tmp_path / "model.safetensors"
    data = bytearray(3 * BLOCKS * BLOCK)
    weights_file.write_bytes(data)
    before = digest(weights_file)
    for start in (0, len(data) // 2 + 1234, len(data) - len(data) // BLOCKS - 1):  # any thousandth is seen
        changed_data = data.copy()
        changed_data[start : start + len(data) // BLOCKS + 1] = b"\1" * (len(data) // BLOCKS + 1)
        weights_file.write_bytes(changed_data)
        assert digest(weights_file) != before


@pytest.mark.parametrize("projector", ["train", "freeze"])
def test_adapters_are_counted_as_they_will_be(here: Path, projector: str) -> None:
    file = sheet(tune=tune(method="lora", rank=2, projector=projector, steps=1), grid={"region": ["0,2"]})
    run = Run.open(sweep(file, only="0,2").cells[0].runs[0])  # type: ignore[union-attr]
    assert run.info["training"]["method"] == "lora"
    assert run.info["training"]["trainable_parameters"] == read_plan(file).recipes[0].trainable


def test_a_cell_and_what_becomes_of_it(here: Path) -> None:
    prune = {"by": "random", **CPU}
    grid = {"region": ["last:25%"], "seed": [3], "samples": ["50%"]}
    file = sheet(tune=tune(steps=None), prune=prune, grid={**grid, "prune.remove": [1]})
    plan = read_plan(file)
    assert num_steps(plan.recipes[0], num_records(plan)) == 1
    assert num_steps(replace(plan.recipes[0], tune=plan.recipes[0].tune | {"steps": 0}), 8) == 0
    outcome = sweep(file, only="last-25%_seed-3_samples-50%")
    cell = outcome.cells[0]
    assert cell.status == "finished"
    tuned, pruned = (Run.open(folder) for folder in cell.runs)
    assert tuned.info["training"]["samples"] == 4
    assert tuned.info["training"]["trainable_parameters"] == plan.recipes[0].trainable
    assert tuned.results is not None
    assert pruned.results is not None
    assert striate.load(pruned.path).depth == DEPTH - 1
    assert pruned.info["options"]["seed"] == 3
    assert cells("out") == outcome.cells
    # Another pruning is made from the tuned model that is there; other options of tuning are refused.
    made = [run.checkpoint.stat().st_mtime_ns for run in (tuned, pruned)]
    more = sheet(tune=tune(steps=None), prune=prune, grid={**grid, "prune.remove": [1, 2]})
    assert cells("out")[0].status == "finished"
    assert len(sweep(more, executor="print").commands or ()) == 1
    assert cells("out")[0].status == "not started"
    sweep(more, only=cell.name)
    assert [run.checkpoint.stat().st_mtime_ns for run in (tuned, pruned)] == made
    assert striate.load(here / "out" / f"{cell.name}+remove-2").depth == DEPTH - 2
    other = sheet(tune=tune(steps=None, warmup=0.5), grid=grid)
    for only in (None, cell.name):
        with pytest.raises(striate.UserError, match=r"tune.warmup was 0.03, now it is 0.5.*--redo replaces it"):
            sweep(other, only=only)
    sweep(other, only=cell.name, redo=True)
    assert tuned.info["options"]["warmup"] == 0.5


def test_files_can_vary(here: Path) -> None:
    prune = {"by": "random", "remove": 1, "steps": 1, "batch": 4, "micro_batch": 4, **CPU}
    file = sheet(prune=prune, grid={"region": ["last:25%"], "prune.heal": ["../train.json"]})
    assert len(sweep(file, executor="print").commands or ()) == 1
    assert [one.prunings for one in cells("out")] == [({"prune.heal": "../train.json"},)]


def test_data_in_subfolders_is_part_of_a_cell(here: Path) -> None:
    for split in ("train", "test"):
        (here / "data" / split).mkdir(parents=True)
        shutil.copy("../train.json", f"data/{split}/rows.json")
    file = sheet(data="data", eval={**SHEET["eval"], "data": "data", "split": "test"})
    found = read_plan(file)
    made = found.made_from(found.recipes[0])["uniform-25%"]
    assert {"tune.data/train/rows.json", "eval.data 1/test/rows.json"} <= made.keys()
    assert not {"tune.data/test/rows.json", "eval.data 1/train/rows.json"} & made.keys()


def test_what_a_sweep_did_not_make_is_not_touched(here: Path) -> None:
    (here / "out" / "last-25%").mkdir(parents=True)
    (here / "out" / "last-25%" / "mine.txt").write_text("mine")
    with pytest.raises(striate.UserError, match="last-25% was not made by this sweep: choose another"):
        sweep(sheet(), redo=True)
    assert [file.name for file in (here / "out").rglob("*")] == ["last-25%", "mine.txt"]


def test_the_plan_before_and_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sheet(out="my out", grid={"region": ["uniform:25%"], "seed": [0, 1]})
    assert main(["sweep", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in shown[1:3]] == [
        [f"uniform-25%_seed-{seed}", "not", "started", "0", f"{read_plan(file).recipes[0].trainable:,}"]
        for seed in (0, 1)
    ]  # fmt: skip
    assert not (here / "my out").exists()
    assert main(["sweep", str(file), "--executor", "print"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"striate sweep sweep.yaml --only uniform-25%_seed-{seed}" for seed in (0, 1)
    ]  # fmt: skip
    with pytest.raises(striate.UserError, match="no cell 'uniform-25%_seed-2'; nearest: uniform-25%_seed-"):
        sweep(file, only="uniform-25%_seed-2")
    assert main(["sweep", str(file), "--only", "uniform-25%_seed-1"]) == 0
    assert "finished" in capsys.readouterr().out
    assert sweep(file, executor="print").commands == ("striate sweep sweep.yaml --only uniform-25%_seed-0",)
    planned = sweep(file, dry_run=True).forecast
    assert planned is not None
    assert [row[1] for row in planned.rows] == ["not started", "finished"]
    seconds = Run.open(here / "my out" / "uniform-25%_seed-1").info["training"]["seconds"]
    assert planned.rows[0][4] > seconds  # three steps of four, as there, and the evaluation


def test_time_is_predicted_from_cells_of_the_same_region(here: Path) -> None:
    plan = read_plan(sheet(grid={"region": ["all", "last:25%"], "seed": [0, 1], "samples": ["50%", "100%"]},
                           tune=tune(steps=None, epochs=3)))  # fmt: skip
    recipes = {recipe.cell.name: recipe for recipe in plan.recipes}
    done = [recipes["all_seed-0_samples-50%"], recipes["last-25%_seed-0_samples-50%"]]
    for recipe, seconds in zip(done, (24.0, 12.0), strict=True):
        run = Run.create(recipe.cell.runs[0], verb="tune", options={})
        run.update(training={"seconds": seconds, "samples": 12})
        run.write_results({"seconds": 5.0})
    # 8 records, in 2 steps of 4, 3 times: 24 of 2 s or of 1 s each; and 5 s to evaluate.
    assert predict(recipes["all_seed-1_samples-100%"], done, 8) == 24 * 2 + 5
    assert predict(recipes["last-25%_seed-1_samples-100%"], done, 8) == 24 * 1 + 5
    assert predict(recipes["last-25%_seed-1_samples-100%"], done[:1], 8) == 24 * 2 + 5
    assert predict(recipes["all_seed-1_samples-50%"], [], 8) is None


def test_one_method_for_all_cells(here: Path) -> None:
    file = sheet(tune=tune(method="auto"), grid={"region": ["all", "none"]})
    plan = read_plan(file)
    assert [recipe.tune["method"] for recipe in plan.recipes] == ["full", "full"]
    # As chosen when the sweep was planned, whatever memory is free now.
    sweep(file, executor="print")
    noted = json.loads((here / "out" / "sweep.json").read_text())
    (here / "out" / "sweep.json").write_text(json.dumps(noted | {"method": "lora"}))
    assert [recipe.tune["method"] for recipe in read_plan(file).recipes] == ["lora", "lora"]


def test_a_failed_cell_does_not_stop_the_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"max_length": [2, 512]}
    assert main(["sweep", str(sheet(grid=grid)), "--workers", "2"]) == 1
    shown = capsys.readouterr()
    assert "max_length-512: finished" in shown.err
    assert re.search(r"max_length-2 failed: .* \(see out/cells/max_length-2.log\)", shown.err)
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["max_length-2", "failed"], ["max_length-512", "finished"],
    ]  # fmt: skip
    assert [cell.status for cell in cells("out")] == ["failed", "finished"]
    run = Run.open(here / "out" / "max_length-512")
    assert run.info["command"] == "striate sweep sweep.yaml --only max_length-512"
    code = "import sys; from striate.studies.sweep import cells; cells('out'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def started(*words: str) -> subprocess.Popen[str]:
    line = [*PROGRAM, "sweep", "sweep.yaml", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(sign: Callable[[], bool]) -> None:
    for _ in range(6000):
        if sign():
            return
        time.sleep(0.02)
    raise AssertionError("nothing happened for two minutes")


def held(folder: Path) -> dict[str, Any]:
    """All that is left by a sweep, but for times."""
    found: dict[str, Any] = {"plan": (folder / "sweep.json").read_text()}
    for cell in cells(folder):
        for path in cell.runs:
            run = Run.open(path)
            results = {key: value for key, value in (run.results or {}).items() if key != "seconds"}
            steps = [(entry["step"], entry["loss"]) for entry in run.history()]
            found[path.name] = (run.info["status"], results, run.predictions(), steps)
    return found


def rows_of(outcome: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(outcome)
    return capture.get()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process and in those of cells: on some CPUs the number of threads shows in the last bit of a sum."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_and_resumed_sweep_equals_an_uninterrupted_one(here: Path, world: Path) -> None:
    grid = {"region": ["uniform:25%", "last:25%"]}
    settings = {"tune": tune(steps=40, save_steps=5), "prune": {"remove": 1, "by": "random", **CPU}, "grid": grid}
    whole = world / "whole"
    whole.mkdir()
    os.chdir(whole)
    file = sheet(**settings)
    for name in ("uniform-25%", "last-25%"):
        sweep(file, only=name)
    expected = sweep(file)
    os.chdir(here)
    sheet(**settings)

    killed = started()
    wait_for((here / "out" / "uniform-25%" / "log.jsonl").exists)
    for process in [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]:
        process.kill()
    killed.communicate()
    assert cells("out")[0].status == "running"
    stopped = started("--workers", "2")
    wait_for((here / "out" / "last-25%" / "log.jsonl").exists)
    stopped.send_signal(signal.SIGINT)
    _, output = stopped.communicate()
    assert stopped.returncode == 130
    assert output.splitlines()[-1].endswith("cells finished; go on with: striate sweep sweep.yaml")
    assert cells("out")[1].status == "interrupted"
    for name in ("uniform-25%", "last-25%"):
        sweep(file, only=name)
    found = sweep(file)
    assert rows_of(found) == rows_of(expected)
    mine, theirs = held(here / "out"), held(whole / "out")
    assert mine == theirs
    for run in ("uniform-25%", "last-25%+pruned"):
        assert changed(weights(here / "out" / run), weights(whole / "out" / run)) == set()


@pytest.mark.parametrize("length", [1, 4090, 5000, 70_000])
def test_the_last_step_of_a_log_whose_lines_are_long(tmp_path: Path, length: int) -> None:
    run = Run.create(tmp_path / "run", verb="tune", options={})
    assert last_step(run.path) == {}
    for step in range(1, 4):  # a loss spike names every record of its batch
        run.log({"step": step, "loss": 9.0, "spike": ["x" * length]})
        assert last_step(run.path)["step"] == step
    with (run.path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "spike": ["' + "x" * length)  # torn by a crash
    assert last_step(run.path)["step"] == 3


@pytest.mark.parametrize(
    ("named", "names"), [("0,1", ["0", "1"]), ("1,-1,0", ["1"]), ("", []), ("-1", []), ("GPU-7,", ["GPU-7"])]
)
def test_gpus_of_cells_are_those_that_cuda_sees(named: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert visible_gpus() == names


def test_no_workers_are_refused(here: Path) -> None:
    with pytest.raises(striate.UserError, match="--workers 0: at least 1"):
        sweep(sheet(), workers=0)


def test_without_ray_one_line_says_what_to_install(here: Path) -> None:
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    with pytest.raises(striate.UserError, match=r"needs ray, .*: pip install 'striate\[ray\]'"):
        sweep(sheet(), executor="ray")
    assert not (here / "out").exists()


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
def test_two_cells_on_ray(here: Path) -> None:
    file = sheet(grid={"schedule": ["nonsense", "linear", "cosine"]})
    ended = subprocess.run(
        [*PROGRAM, "sweep", str(file), "--executor", "ray", "--workers", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert [cell.status for cell in cells("out")] == ["failed", "finished", "finished"]
    assert "schedule-nonsense failed" in ended.stderr


@pytest.mark.parametrize("method", ["full", "lora"])
def test_modules_vary_like_regions(here: Path, method: str) -> None:
    plan = read_plan(sheet(tune=tune(method=method, projector="freeze"), grid={"modules": ["all", "mlp", "gate_up"]}))
    whole, mlp, gate_up = (recipe.trainable for recipe in plan.recipes)
    assert whole > mlp > gate_up > 0
    assert [cell.name for cell in plan.cells] == ["modules-all", "modules-mlp", "modules-gate-up"]


def test_a_region_that_tune_measures(here: Path) -> None:
    file = sheet(grid={"region": ["auto:2", "uniform:2"]}, tune=tune(route="same", steps=1))
    planned = sweep(file, dry_run=True).forecast
    assert planned is not None
    assert [row.layers for row in planned.rows] == ["auto:2", "0,2"]
    assert planned.rows[0].trainable == planned.rows[1].trainable
    (cell,) = sweep(file, only="auto-2").cells[:1]
    run = Run.open(cell.runs[0])
    assert run.region is not None
    assert len(run.region) == 2
    assert run.info["training"]["trainable_parameters"] == planned.rows[0].trainable
    assert len(sweep(file, executor="print").commands or ()) == 1  # the measured one is finished
    # Layers to cut cannot be compared with those that will be measured; 2 is in uniform:2.
    cut = {"prune": {"layers": "2"}, "grid": {"region": ["auto:2"]}}
    assert read_plan(sheet(**cut)).recipes[0].prunings[0]["layers"] == "2"
    with pytest.raises(striate.UserError, match=r"--layers 2: 2 in the region 0,2"):
        read_plan(sheet(**cut | {"grid": {"region": ["uniform:2"]}}))
    with pytest.raises(striate.UserError, match=r"grid.region: --region auto:9: .*asks for 9 layers"):
        sweep(sheet(grid={"region": ["auto:9"]}))

"""A real Ray cluster, of a head and a worker, on this machine: `make cluster`. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from launch import together
from pico import pico_llava
from test_processes import losses
from training import changed, weights, write_data

from striate.runs.run import Run
from striate.runs.training import tune
from striate.studies.sweep import cells, sweep
from striate.studies.sweep.executor import PROGRAM
from striate.train import TrainOptions

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SETTINGS = {
    "steps": 30, "save_steps": 5, "batch": 4, "micro_batch": 2, "learning_rate": 0.01, "dtype": "float32",
    "method": "full", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes of one CPU each, started as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = f"127.0.0.1:{port}"
    quiet = ["--num-cpus", "1", "--num-gpus", "0", "--disable-usage-stats", "--block"]
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *quiet]
    nodes = []
    try:
        for line in (head, [f"--address={found}"]):
            nodes.append(subprocess.Popen([*ray, *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for_cpus(found, len(nodes))
        yield found
    finally:
        started = [child for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for process in [*nodes, *started]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        for node in nodes:
            node.wait()


def wait_for_cpus(address: str, number: int) -> None:
    """Until the cluster has so many CPUs."""
    ask = f"import ray; ray.init('{address}', log_to_driver=False); print(ray.cluster_resources().get('CPU', 0))"
    for _ in range(60):
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
        if done.stdout.strip() == f"{number}.0":
            return
        time.sleep(0.5)
    raise AssertionError(f"no cluster of {number} CPUs: {done.stderr[-2000:]}")


@pytest.fixture
def here(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, entered; the cluster is the one that Ray connects to."""
    pico_llava(tmp_path / "llava")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def write_sheet(name: str) -> Path:
    grid = {"region": ["uniform:25%", "last:25%"]}
    about = {"model": "llava", "data": "train.json", "out": name, "tune": SETTINGS, "grid": grid}
    about["eval"] = {"data": "train.json", "max_new_tokens": 2, "batch": 8, "device": "cpu"}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    return Path(f"{name}.yaml")


def process_of(cell: str) -> psutil.Process | None:
    """The process of a cell, wherever Ray started it."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if process.info["cwd"] == os.getcwd() and "--only" in line and line[-1] == cell:
            return process
    return None


@pytest.mark.parametrize("lost", ["cell", "worker"])
def test_what_is_killed_in_a_cell_is_done_again_from_where_it_was(here: Path, lost: str) -> None:
    whole = write_sheet("whole")
    for name in ("uniform-25%", "last-25%"):
        sweep(whole, only=name)
    file, out = write_sheet("out"), Path("out")
    running = subprocess.Popen([*PROGRAM, "sweep", str(file), "--executor", "ray"], stderr=subprocess.PIPE, text=True)
    log = out / "last-25%" / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) > 6):  # a state was saved
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.01)
    process = process_of("last-25%")
    assert process is not None
    (process if lost == "cell" else process.parent()).send_signal(signal.SIGKILL)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert [cell.status for cell in cells(out)] == ["finished", "finished"]
    for name in ("uniform-25%", "last-25%"):
        one, other = Run.open(out / name), Run.open(Path("whole") / name)
        assert changed(weights(one.path), weights(other.path)) == set()
        assert losses(one.path) == losses(other.path)
        assert one.predictions() == other.predictions()


def train(model: Path, data: Path, out: Path) -> None:
    """One process of the training that the recipe describes."""
    options = TrainOptions(**{key: value for key, value in SETTINGS.items() if key != "method"})
    tune(model, data=data, out=out, region="1,3", method="full", options=options)


def test_two_workers_of_ray_train_are_two_processes(here: Path) -> None:
    recipe = {**SETTINGS, "model": "llava", "data": "train.json", "out": str(here / "ray"), "region": "1,3"}
    recipe |= {"model": str(here / "llava"), "data": str(here / "train.json")}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = [sys.executable, str(ROOT / "recipes" / "launch" / "ray_train.py"), "recipe.yaml", "2"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert together(2, train, here / "llava", here / "train.json", here / "two") == [0, 0]
    assert changed(weights(here / "ray"), weights(here / "two")) == set()
    train(here / "llava", here / "train.json", here / "one")
    assert losses(here / "ray") == pytest.approx(losses(here / "one"), rel=1e-3)
    one, two = weights(here / "one"), weights(here / "ray")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3, msg=name)

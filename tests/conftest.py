"""How tests are spread over processes (`make test`: pytest -n 2 --dist loadgroup).

A file stays together, and with it what its fixtures have made. What must not run twice at once stays together, too:
processes that wait for one another, browsers, a Ray cluster.

Every test begins with the same random numbers and the same number of threads, whatever ran before it.
"""

from __future__ import annotations

import gc
import random
import signal
import sys
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_llava
from training import write_data

THREADS = torch.get_num_threads()
APART = {"test_processes", "test_kills", "test_gpu"}  # start several processes, which have to keep up with one another
SPREAD = {
    "test_train_fast_paths",
    "test_families",
    "test_prune_families",
    "test_data_encode",
}  # no shared fixtures


def group(item: pytest.Item) -> str:
    """Tests of one group run one after the other, in one process."""
    name = Path(item.fspath).stem
    if name in APART:
        return "processes"
    return "browser" if item.get_closest_marker("browser") else name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its group."""
    for item in items:
        if (name := group(item)) not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish() -> None:
    """Modules stay anyway: without them each `gc.collect`, of which a training makes two, takes 10 ms, not 300."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """What a test starts can be stopped by Ctrl-C, though the shell starts work in the background without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of the test."""
    if "launch" in sys.modules:
        ensure_running()  # a process has one server that forks: before the demo, in the same worker, starts its own
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico LLaVA, for tests that do not care which model it is."""
    return pico_llava(tmp_path_factory.mktemp("pico") / "llava")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with images to train it on."""
    return write_data(tmp_path_factory.mktemp("data"))

"""Several processes that work together, started as torchrun starts them, but forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports it from its environment's path, and would leave it out without a word.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
CONTEXT.set_forkserver_preload(["preloaded"])
PATIENCE = 120  # seconds; a process that waits for another for ever is the fault to look for


def start(number: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """So many processes, each calling `work`, which has to be found by its name in a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [CONTEXT.Process(target=_work, args=(rank, number, port, work, arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> list[int | None]:
    """How they ended: 0 for well, None for one that had to be killed."""
    try:
        for process in processes:
            process.join(PATIENCE)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(file: Path, process: Any) -> None:
    """Until the process has written it."""
    while not file.is_file():
        assert process.is_alive(), f"it ended ({process.exitcode}) without {file.name}"
        time.sleep(0.01)


def together(number: int, work: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Start them and wait for their end."""
    return finish(start(number, work, *arguments))


def _work(rank: int, number: int, port: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    assert "preloaded" in sys.modules, "the server could not import preloaded.py: each process would import for seconds"
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""The process group that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, zip_longest
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process in its group: its `rank`, from 0, and the group's `world_size`."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes files."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """The values of all processes, by rank, on every process. All processes must call this equally often."""
        if self.world_size == 1:
            return [mine]
        from accelerate.utils import gather_object  # slow to import, not needed by a single process

        return gather_object([mine])

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This process's share of the items: every `world_size`-th one, starting at `rank`."""
        return islice(items, self.rank, None, self.world_size)

    def interleave(self, mine: list[T]) -> list[T]:
        """The lists of all processes merged into one, on every process, in the order before `share` split them."""
        turns: Any = zip_longest(*self.gather(mine), fillvalue=self)
        return [one for turn in turns for one in turn if one is not self]

    def wait(self) -> None:
        """Block until all processes have reached this point."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def environment_rank() -> Rank:
    """This process's rank by its environment variables; does not initialize the process group.

    RANK without WORLD_SIZE was set by something else, such as a scheduler, and is ignored.
    """
    rank, size = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return Rank(rank, size) if size > 1 else Rank()


def init_distributed(device: str | None) -> Rank:
    """Initialize the process group and select this process's GPU."""
    if environment_rank().world_size == 1:  # a single process: nothing to initialize
        return Rank()
    from accelerate import PartialState

    # NCCL's ten minutes are too few to wait for the first process, which hashes the data and writes the states.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=2))
    return Rank(state.process_index, state.num_processes)

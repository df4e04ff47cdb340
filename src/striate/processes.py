"""The processes that `accelerate launch` or torchrun started to do one piece of work together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among those that work together: its number, from 0, and how many there are."""

    number: int = 0
    of: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def gathered(self, mine: T) -> list[T]:
        """What each process has, in their order, in each of them; every process has to call this equally often."""
        return [mine] if self.of == 1 else gather_object([mine])

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """What falls to this process when items are dealt out in turn."""
        return islice(items, self.number, None, self.of)

    def in_turn(self, mine: list[T]) -> list[T]:
        """The lists of all processes as one, in each of them, in the order in which `share` dealt them out."""
        turns: Any = zip_longest(*self.gathered(mine), fillvalue=self)
        return [one for turn in turns for one in turn if one is not self]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.of > 1:
            PartialState().wait_for_everyone()


def launched(device: str | None) -> Rank:
    """This process among those that were started together; from here on it has its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # alone: nothing of the process is to be settled here
        return Rank()
    state = PartialState(cpu=device == "cpu")
    return Rank(state.process_index, state.num_processes)

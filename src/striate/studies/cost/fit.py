"""The largest region that can be trained within a given memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from striate.errors import UserError
from striate.region import Region
from striate.studies.cost.fake_model import FakeModel
from striate.studies.cost.machine import Machine
from striate.studies.cost.step import Counts, Setup, Step

ROOM = 0.9
"""Share of a memory that a run may fill; the rest is for libraries, and gaps that an allocator leaves."""
_UNITS = {"": 1e9, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
KINDS = ("uniform", "first", "middle", "last", "hybrid")


def size(text: str) -> float:
    """The bytes of "24GB", "24" (also GB), "512 MB" or "80GiB".

    Raises:
        UserError: it is not a size, or it is zero.
    """
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match or not float(match[1]):
        raise UserError(f"--fit {text!r}: a size of memory was expected, such as 24GB or 80GiB")
    return float(match[1]) * _UNITS[match[2] or ""]


def fit(fake_model: FakeModel, setup: Setup, region: str, memory: float, machine: Machine) -> Step:
    """The step with the largest region that fits, and of those the fastest.

    Regions are of the kind of `region` ("uniform" where it has no number to change). Micro-batches are powers of two up
    to the batch, with and without activation checkpointing.

    Raises:
        UserError: not even one layer fits; names the memory that one takes.
    """
    room = ROOM * memory
    depth = fake_model.vlm.depth
    least = {check: Counts(fake_model, replace(setup, micro_batch=1, checkpointing=check)) for check in (True, False)}
    for count in range(depth, 0, -1):
        chosen = _region(region, count, depth)
        if min(counts.step(chosen).memory.peak for counts in least.values()) <= room:
            step = fastest(fake_model, setup, chosen, memory, machine)
            assert step is not None
            return step
    smallest = min(counts.step(chosen).memory.peak for counts in least.values())
    other = "; --method lora takes less" if setup.method == "full" else ""
    raise UserError(
        f"--fit {memory / 1e9:g} GB is too small: one layer of {depth}, with a micro-batch of 1, takes "
        f"{smallest / ROOM / 1e9:.3g} GB{other}"
    )


def fastest(
    fake_model: FakeModel, setup: Setup, region: Region, memory: float, machine: Machine,
    micro_batches: Sequence[int] = (),
) -> Step | None:  # fmt: skip
    """The fastest step of a region that fits, with and without activation checkpointing; None if none fits.

    `micro_batches` to try, in ascending order; default: powers of two up to the batch.
    """
    tried = micro_batches or [2**power for power in range(setup.batch.bit_length())]
    steps = _fitting_steps(fake_model, setup, region, ROOM * memory, tried)
    return min(steps, key=lambda step: step.seconds(*machine.reached), default=None)


def _fitting_steps(
    fake_model: FakeModel, setup: Setup, region: Region, room: float, micro_batches: Sequence[int]
) -> Iterator[Step]:
    for checkpointing in (False, True):
        for micro_batch in micro_batches:
            tried = replace(setup, micro_batch=micro_batch, checkpointing=checkpointing)
            step = Counts(fake_model, tried).step(region)
            if step.memory.peak > room:
                break
            yield step


def _region(form: str, count: int, depth: int) -> Region:
    kind = form.partition(":")[0]
    return Region.parse(f"{kind if kind in KINDS else KINDS[0]}:{count}", depth)

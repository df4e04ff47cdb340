"""What watches a training run: the step-1 audit, non-finite losses and spikes, the log, stop signals, waiting times."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from striate.data import Batch, Skipped
from striate.distributed import Rank
from striate.errors import UserError
from striate.train.optimizer import Group
from striate.train.sharding import own

WINDOW, MIN_HISTORY = 50, 20  # steps that a loss is compared with, and the fewest needed for a comparison
DEVIATIONS = 6.0  # a spike exceeds the median by this many standard deviations (estimated from the median deviation)
MIN_RISE = 0.5  # and by this share of the median


class Audit:
    """Fails the run after its first step if a trainable parameter got no gradient, or a frozen parameter changed.

    Those of projector and tower get a gradient from images only. After a step without images the audit waits for a step
    with one, if the data has any (`images`): the longest records, which come first, are often text alone.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, Group], *, images: bool) -> None:
        self.trained = {name: p for group in groups.values() for name, p in group.parameters.items()}
        self.visual = {name for part, group in groups.items() if part != "layers" for name in group.parameters}
        self.images = images
        chosen = {id(parameter) for parameter in self.trained.values()}
        self.frozen = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
        self.before: dict[str, int] | None = None
        self.complete = False  # whether the step had a gradient for every parameter

    def remember(self) -> None:
        """Take the checksums of the frozen weights."""
        self.before = self._checksums()

    def check_gradients(self, *, has_image: bool) -> None:
        """Check once, before a step, that no gradient is missing; a step whose records were all skipped has none."""
        idle = [name for name, parameter in self.trained.items() if parameter.grad is None]
        self.complete = len(idle) < len(self.trained)
        if self.before is None or not idle or not self.complete:
            return
        if self.images and not has_image and all(name in self.visual for name in idle):
            self.complete = False
            return
        raise UserError(
            f"{len(idle)} trainable parameters got no gradient, {idle[0]} among them", see="parameters-without-gradient"
        )

    def check_frozen(self) -> None:
        """Check once, after a step, that no frozen weight changed."""
        if self.before is None or not self.complete:
            return
        now = self._checksums()
        changed = [name for name, before in self.before.items() if now[name] != before]
        self.before = None
        if changed:
            raise UserError(
                f"{len(changed)} frozen parameters changed in the first step, {changed[0]} among them",
                see="frozen-parameters-changed",
            )

    def _checksums(self) -> dict[str, int]:
        sums = [checksum(p) for p in self.frozen.values()]
        return dict(zip(self.frozen, torch.stack(sums).tolist() if sums else (), strict=True))  # a single wait


def checksum(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bit patterns as integers: any single changed value changes it.

    Of a sharded tensor: that of this process's shard.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    flat = own(parameter.detach()).contiguous().view(bits).flatten()
    # In pieces: the sum makes an int64 copy of its input.
    return torch.stack([piece.sum(dtype=torch.int64) for piece in flat.split(2**24)]).sum()


class Log:
    """The log of a training run, kept in memory."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []  # one entry per step
        self.skipped: dict[str, Skipped] = {}  # by source: a bad record comes up again in every epoch
        self.warnings: list[str] = []

    def begin(self, done: int, total: int, notes: Sequence[str]) -> None:
        """The training starts: `done` of `total` steps are done already; `notes` describe how it runs."""

    def step(self, entry: dict[str, Any]) -> None:
        """Log a step: {"step", "loss", "lr", "grad_norm", "seconds", ...}."""
        self.history.append(entry)

    def skip(self, record: Skipped) -> None:
        """Log a skipped record."""
        self.skipped[record.source] = record

    def warn(self, text: str) -> None:
        """Log a warning for the user."""
        self.warnings.append(text)

    def end(self) -> None:
        """The training has ended, finished or failed."""


class Stop:
    """On Ctrl-C, or SIGTERM from a scheduler: finish the step, save the state, stop. Another signal, a second later or
    more, stops at once; sooner, it is the launcher's copy of the first."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SOON = 1.0  # seconds

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.requested: float | None = None  # when, by this process' monotonic clock
        self.previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> None:
        """Install the signal handlers; outside of the main thread Python does not allow it."""
        with suppress(ValueError):
            self.previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Restore the previous handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def requested_anywhere(self) -> bool:
        """Whether any process received a stop signal; not all receive it in the same step."""
        requested = any(self.rank.gather(self.requested is not None))
        if requested and self.requested is None:
            self.requested = time.monotonic()
        return requested

    def _handle(self, *_: Any) -> None:
        now = time.monotonic()
        if self.requested is not None and now - self.requested > self.SOON:
            self.__exit__(None, None, None)
            raise KeyboardInterrupt
        self.requested = self.requested or now


@dataclass
class Wait:
    """How long training waits for data, from the second step on: the first one starts the workers."""

    began: float = 0.0
    ended: float = 0.0
    waited: float = 0.0

    def note(self, since: float) -> None:
        """Add the wait for a step's batches, from `since` until now."""
        self.ended = time.monotonic()
        if self.began:
            self.waited += self.ended - since
        else:
            self.began = self.ended

    @property
    def share(self) -> float:
        """Time waited over all time, in [0, 1]."""
        return self.waited / (self.ended - self.began) if self.ended > self.began else 0.0


def nonfinite_records(losses: Iterable[tuple[Batch, Tensor]]) -> list[str]:
    """Ids of the records with a non-finite loss; of all records, when only their gradients are non-finite.

    `losses` [N] are the losses of a batch's labeled tokens, row after row.
    """
    named: list[str] = []
    all_ids: list[str] = []
    for batch, values in losses:
        counts = batch.num_answer_tokens()
        bad = [not bool(own.isfinite().all()) for own in values.split(counts)]
        named += [name for name, is_bad in zip(batch.ids, bad, strict=True) if is_bad]
        all_ids += [name for name, count in zip(batch.ids, counts, strict=True) if count]
    return named or all_ids


class SpikeDetector:
    """Compares each loss with the last ones, to detect spikes."""

    def __init__(self, before: Sequence[float] = ()) -> None:
        self.last: deque[float] = deque(before, maxlen=WINDOW)

    def spike(self, loss: float) -> bool:
        """Whether a loss, in nats, is far above the ones before it; it is added to them."""
        usual = median(self.last) if self.last else math.inf
        spread = 1.4826 * median(abs(one - usual) for one in self.last) if self.last else math.inf
        enough = len(self.last) >= MIN_HISTORY
        self.last.append(loss)
        return enough and loss > usual + max(DEVIATIONS * spread, MIN_RISE * abs(usual))

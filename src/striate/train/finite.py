"""What a training says of numbers that are none, and of a loss that leaps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

from torch import Tensor

from striate.data import IGNORED, Batch

WINDOW, SETTLED = 50, 20  # steps that a loss is compared with, and how many have to be there before
LEAP = 6.0  # standard deviations, estimated from the median deviation, that make a spike of a loss
SMALLEST = 0.5  # share of the median: below it no rise is a spike, however even the losses were


def not_finite(losses: Iterable[tuple[Batch, Tensor]]) -> list[str]:
    """Ids of the records that have a loss which is not finite; of all records, where none has (their gradients do).

    `losses` [N] are those of a batch's labelled tokens, row after row.
    """
    named: list[str] = []
    everyone: list[str] = []
    for batch, values in losses:
        counts = (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist()
        bad = [not bool(own.isfinite().all()) for own in values.split(counts)]
        named += [name for name, is_bad in zip(batch.ids, bad, strict=True) if is_bad]
        everyone += [name for name, count in zip(batch.ids, counts, strict=True) if count]
    return named or everyone


class Losses:
    """The last losses, to tell whether the next one is a spike."""

    def __init__(self, before: Sequence[float] = ()) -> None:
        self.last: deque[float] = deque(before, maxlen=WINDOW)

    def spike(self, loss: float) -> bool:
        """Whether a loss, in nats, is far above those before it; it counts among those for the next one."""
        usual = median(self.last) if self.last else math.inf
        spread = 1.4826 * median(abs(one - usual) for one in self.last) if self.last else math.inf
        settled = len(self.last) >= SETTLED
        self.last.append(loss)
        return settled and loss > usual + max(LEAP * spread, SMALLEST * abs(usual))

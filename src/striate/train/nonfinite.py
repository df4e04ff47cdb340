"""Non-finite losses, and loss spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

from torch import Tensor

from striate.data import IGNORED, Batch

WINDOW, MIN_HISTORY = 50, 20  # steps that a loss is compared with, and the fewest needed for a comparison
DEVIATIONS = 6.0  # a spike exceeds the median by this many standard deviations (estimated from the median deviation)
MIN_RISE = 0.5  # and by this share of the median


def nonfinite_records(losses: Iterable[tuple[Batch, Tensor]]) -> list[str]:
    """Ids of the records with a non-finite loss; of all records, when only their gradients are non-finite.

    `losses` [N] are the losses of a batch's labeled tokens, row after row.
    """
    named: list[str] = []
    all_ids: list[str] = []
    for batch, values in losses:
        counts = (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist()
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

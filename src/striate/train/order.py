"""The order of the records: a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Indices grouped so that the records of one optimiser step are about equally long, the groups in random order.

    The order is a function of seed and epoch alone. The longest group comes first: too little memory shows at once.
    Up to `total` the indices go on, behind those of the records.
    """

    def __init__(self, lengths: list[int], *, batch: int, seed: int, total: int | None = None) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0
        self.total = total or len(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # `transformers` leaves the groups sorted by length, fifty at a time: training would see long records, then
        # short ones, over and over.
        indices = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        groups = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        full, rest = (groups[:-1], groups[-1:]) if len(groups[-1]) < self.batch else (groups, [])
        shuffled = torch.randperm(max(len(full) - 1, 0), generator=generator).tolist()
        order = [*full[:1], *(full[1 + place] for place in shuffled), *rest]
        return chain.from_iterable([*order, range(len(self.lengths), self.total)])

"""The order of the records: a function of seed and epoch alone."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


def length_grouped(lengths: list[int], batch: int, seed: int) -> list[int]:
    """Record indices in groups of `batch` of similar length, the groups in random order.

    The longest group comes first, so that a lack of memory shows at once.
    """
    generator = torch.Generator().manual_seed(seed)
    # `transformers` leaves the groups sorted by length within every fifty: training would see long records, then short
    # ones, again and again.
    indices = get_length_grouped_indices(lengths, batch, generator=generator)
    groups = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    full, rest = (groups[:-1], groups[-1:]) if len(groups[-1]) < batch else (groups, [])
    shuffled = torch.randperm(max(len(full) - 1, 0), generator=generator).tolist()
    order = [*full[:1], *(full[1 + place] for place in shuffled), *rest]
    return [index for group in order for index in group]

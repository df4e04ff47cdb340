"""Arrays for the page: quantized to 8 bits, deflated, in base64, and as fine as the size of the page allows."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from striate.exploration.layout import View, num_cells, pool

FINE, COARSE = 255, 15
"""Steps from 0 to the peak: of 255, and few enough for each head to keep more of its cells."""


@dataclass(frozen=True)
class Maps:
    """Maps over cells of `factor` x `factor` image tokens, for the page's script.

    `data` holds codes of one byte: the value is `peak * (code / 255)**2`, so that small values keep their digits.
    """

    data: str
    peak: float
    factor: int


def pack_maps(values: Tensor, views: Sequence[View], *, factor: int = 1, steps: int = FINE, size: int) -> Maps:
    """Maps [..., P] of image tokens as maps [..., C], averaged until they take at most `size` characters.

    `factor`: that of the values, which then are of cells already. `steps`, a divisor of 255. NaN becomes 0.
    """
    views = coarse(views, factor)
    finest = 1
    while values[..., 0].numel() * num_cells(views, finest) > 4 * size:  # deflating would not be enough
        finest += 1
    for times in range(finest, 1 << 16):
        cells = pool(values.float(), views, times).nan_to_num()
        peak = float(cells.max()) if cells.numel() else 0.0
        codes = ((cells / peak).sqrt() * steps).round() * (255 // steps) if peak else torch.zeros_like(cells)
        data = deflate(codes.byte().numpy())
        if len(data) <= size or num_cells(views, times) <= len(views):
            return Maps(data, peak, factor * times)
    raise AssertionError


def coarse(views: Sequence[View], factor: int) -> list[View]:
    """The views that cells of `factor` x `factor` tokens form, in the order of `pool`."""
    if factor == 1:
        return list(views)
    found, first = list[View](), 0
    for view in views:
        rows, columns = -(-view.rows // factor), -(-view.columns // factor)
        found.append(View(view.image, first, rows, columns, columns, view.box, view.is_tile))
        first += rows * columns
    return found


def deflate(values: np.ndarray[Any, Any]) -> str:
    """The bytes of an array, deflated, in base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()

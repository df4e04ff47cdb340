"""The page: an exploration as compact JSON, which the page's script shows."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from striate.exploration import Exploration, Lens, Sample
from striate.exploration.layout import View, num_cells, pool
from striate.runs.environment import versions
from striate.studies.html import data_address, render, script_safe

REPORT = "striate.studies.report"
"""Where the style is that all pages share."""
SIZE = 5_500_000
"""Characters of a page, beyond which attention maps are averaged over neighboring patches."""
SIDE = 560
"""Pixels of an image in the page, on the longer side."""
SMALLEST = 20_000
"""Characters for the maps of a sample, however little room is left."""


FINE, COARSE = 255, 15
"""Steps from 0 to the peak: of 255, and few enough for each head to keep more of its cells."""


def page(exploration: Exploration, *, numbers: str = "", size: int = SIZE) -> str:
    """The page of an exploration; `numbers` is the address of its JSON file, empty without one."""
    here, base = resources.files(__package__), resources.files(REPORT)
    template, css, script = (here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html.jinja", "css", "js"))
    room = size // max(1, len(exploration.samples))
    pool = {token: number for number, token in enumerate(exploration.words)}
    content = {
        "depth": exploration.depth,
        "region": None if exploration.region is None else list(exploration.region),
        "route": None if exploration.route is None else list(exploration.route),
        "words": list(exploration.words.values()),
        "samples": [_sample(sample, pool, room) for sample in exploration.samples],
    }
    notes = [*exploration.notes, *(f"{one.source}: {one.reason}" for one in exploration.skipped[:20])]
    return render(template, base.joinpath("page.css").read_text("utf-8") + css, script, {
        "exploration": exploration,
        "data": script_safe(content),
        "numbers": numbers,
        "notes": notes,
        "version": versions().get("striate", ""),
    })  # fmt: skip


def _sample(sample: Sample, pool: dict[int, int], room: int) -> dict[str, Any]:
    """A sample in at most about `room` characters."""
    fixed = {
        "id": sample.id,
        "source": sample.source,
        "question": sample.question,
        "truth": list(dict.fromkeys(sample.truth)),
        "answer": sample.answer,
        "likelihood": _mean(sample.log_prob),
        "images": [data_address(image, SIDE) for image in sample.images],
        "views": [{**vars(view), "box": view.box and [round(side, 4) for side in view.box]} for view in sample.views],
        "tokens": [[text, role] for text, role in zip(sample.texts, sample.roles, strict=True)],
        "influence": {kind: _short(values.tolist()) for kind, values in sample.influence.items()},
        "lens": _lens(sample.lens, pool),
        "lesions": [
            [one.name, one.kind, _mean(one.log_prob), one.answer if one.changed else None] for one in sample.lesions
        ],
        "notes": list(sample.notes),
    }
    attention = sample.attention
    if attention is None:
        return {**fixed, "attention": None}
    fixed["shares"] = [_short(row) for row in attention.mean.sum(dim=-1).tolist()]  # L Q
    left = room - len(script_safe(fixed))
    mean = pack_maps(attention.mean, sample.views, size=max(SMALLEST, left * 2 // 3))
    heads = pack_maps(
        attention.heads, sample.views, factor=attention.factor, steps=COARSE, size=max(SMALLEST, left - len(mean.data))
    )
    return {**fixed, "attention": vars(mean), "heads": {**vars(heads), "count": attention.heads.shape[1]}}


def _lens(lens: Lens, pool: dict[int, int]) -> dict[str, Any]:
    """Words by number, four bytes each, and their probabilities in 255ths."""
    words = np.vectorize(pool.__getitem__, otypes=[np.uint32])(lens.words.numpy())
    shares = (lens.probabilities * 255).round().byte().numpy()
    return {"words": deflate(words.astype("<u4")), "shares": deflate(shares), "image": lens.num_image}


def _mean(log_prob: tuple[float, ...]) -> float:
    """The likelihood of an answer: the geometric mean of its tokens' probabilities."""
    return round(float(np.exp(np.mean(log_prob))), 4)


def _short(values: list[float]) -> list[float | None]:
    return [round(value, 4) if value == value else None for value in values]


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

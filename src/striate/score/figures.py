"""Which figures a set of scores gives, and where every layer looks in one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from striate import plot
from striate.data import Batch, Example, Examples, Record, collate, open_image
from striate.region import Region
from striate.score.replay import at_rest
from striate.score.states import token_kinds
from striate.score.table import Scores
from striate.trace import Attention, forward, watch_attention
from striate.vlm import Vlm

PICTURE = 160  # pixels on the longer side


class Drawn(NamedTuple):
    """A figure with the name of its files, and the words for a page."""

    name: str
    title: str
    figure: plot.Figure
    caption: str


def figures(scores: Scores, region: Region | None = None) -> Iterator[Drawn]:
    """All that there are numbers for; the layers of `region` are marked where it is of the same depth."""
    marked = region if region is not None and region.depth == scores.depth else None
    profiles = {name: plot.Profile(one.values, one.stderr, one.parts) for name, one in scores.scores.items()}
    caption = "Each score by layer, with a band of one standard error over samples."
    yield Drawn("scores", "Layer scores", plot.profiles(profiles, marked), caption)
    attention, distance = scores.scores.get("image_attention"), scores.scores.get("angular_distance")
    if attention and attention.samples:
        caption = "Attention of text tokens on image tokens, a thin line each sample."
        yield Drawn("image_attention", "Image attention", plot.instances(attention.samples), caption)
    if distance and distance.table:
        caption = "A dot marks the block of each length that turns the hidden state least."
        yield Drawn("angular_distance", "Blocks of layers", plot.blocks(distance.table), caption)


def looks(vlm: Vlm, records: Sequence[Record], *, max_length: int = 2048) -> plot.Figure | None:
    """Where each layer looks in the picture of the first record that has exactly one.

    None when there is no such record, or the model does not cover the picture with one plain grid of image tokens
    (models that cut it into tiles).
    """
    examples = Examples(records, vlm.processor, max_length=max_length, truncate_text=True)
    for index, record in enumerate(records):
        if len(record.images) == 1 and isinstance(example := examples[index], Example):
            maps = attention_maps(vlm, collate([example], pad_id=vlm.pad_token_id).to(vlm.device, vlm.model.dtype))
            picture = open_image(record.images[0])
            picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            return None if maps is None else plot.overlay(np.asarray(picture.convert("RGB")), maps.numpy())
    return None


def attention_maps(vlm: Vlm, batch: Batch) -> Tensor | None:
    """Attention that each patch of one picture gets from the text tokens: [L, h, w], 0 in layers that show none.

    `batch` has one sample with one picture. None when its image tokens are no plain grid.
    """
    num_tokens = int(batch.image_mask.sum())
    grid = _grid(batch, num_tokens)
    if grid is None:
        return None
    maps = torch.zeros(vlm.depth, num_tokens)

    def see(layer: int, attention: Attention) -> None:
        maps[layer] = attention.received[batch.image_mask].cpu()

    with at_rest(vlm.model), watch_attention(vlm, see, queries=token_kinds(batch)["text"], keys=batch.image_mask):
        forward(vlm, batch)
    return maps.unflatten(1, grid)


def _grid(batch: Batch, num_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of image tokens: what the processor says (Qwen), else a square of one view of the picture."""
    if "image_grid_thw" in batch.inputs:
        _, rows, columns = batch.inputs["image_grid_thw"][0].tolist()
        merged = math.isqrt(rows * columns // num_tokens)
        return (rows // merged, columns // merged) if rows * columns == num_tokens * merged**2 else None
    side, pixels = math.isqrt(num_tokens), batch.inputs.get("pixel_values")
    one_view = pixels is not None and pixels.shape[:-3].numel() == 1  # all axes but channel, height and width
    return (side, side) if side**2 == num_tokens and one_view else None

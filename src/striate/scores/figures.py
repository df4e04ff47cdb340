"""Figures of a set of layer scores, and the attention map of every layer over one image."""

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
from striate.scores.states import token_kinds
from striate.scores.table import Scores
from striate.trace import Attention, forward, watch_attention
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

IMAGE_SIDE = 160  # pixels on the longer side


class NamedFigure(NamedTuple):
    """A figure with the name of its files, and title and caption for a page."""

    name: str
    title: str
    figure: plot.Figure
    caption: str


def figures(scores: Scores, region: Region | None = None) -> Iterator[NamedFigure]:
    """All figures that the scores have data for; the layers of `region` are marked if its depth is the scores'."""
    marked = region if region is not None and region.depth == scores.depth else None
    profiles = {name: plot.Profile(one.values, one.stderr, one.parts) for name, one in scores.scores.items()}
    caption = "Each score by layer, with a band of one standard error over samples."
    yield NamedFigure("scores", "Layer scores", plot.profiles(profiles, marked), caption)
    if by_task := {name: one.tasks for name, one in scores.scores.items() if one.tasks}:
        rows = {name: {task: part.values for task, part in tasks.items()} for name, tasks in by_task.items()}
        caption = "Each row is a score over the records of one task, from its lowest value (dark) to its highest (dot)."
        yield NamedFigure("tasks", "Layer scores by task", plot.task_heatmaps(rows), caption)
    attention, distance = scores.scores.get("image_attention"), scores.scores.get("angular_distance")
    if attention and attention.samples:
        caption = "Attention of text tokens on image tokens, one thin line per sample."
        yield NamedFigure("image_attention", "Image attention", plot.instances(attention.samples), caption)
    if distance and distance.table:
        caption = "A dot marks the block of each length whose input and output have the smallest angular distance."
        yield NamedFigure("angular_distance", "Blocks of layers", plot.blocks(distance.table), caption)


def attention_overlay(vlm: Vlm, records: Sequence[Record], *, max_length: int = 2048) -> plot.Figure | None:
    """Each layer's attention map over the image of the first record that has exactly one image.

    None when no record has, or the model does not cover the image with one grid of image tokens (models that tile it).
    """
    examples = Examples(records, vlm.processor, max_length=max_length, truncate_text=True)
    for index, record in enumerate(records):
        if len(record.images) == 1 and isinstance(example := examples[index], Example):
            maps = attention_maps(vlm, collate([example], pad_id=vlm.pad_token_id).to(vlm.device, vlm.model.dtype))
            image = open_image(record.images[0])
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
            return None if maps is None else plot.overlay(np.asarray(image.convert("RGB")), maps.numpy())
    return None


def attention_maps(vlm: Vlm, batch: Batch) -> Tensor | None:
    """Attention of the text tokens on each patch of one image: [L, h, w], 0 in layers without attention weights.

    `batch` has one sample with one image. None when its image tokens do not form one grid.
    """
    num_tokens = int(batch.image_mask.sum())
    grid = _grid(batch, num_tokens)
    if grid is None:
        return None
    maps = torch.zeros(vlm.depth, num_tokens)

    def record(layer: int, attention: Attention) -> None:
        maps[layer] = attention.by_key[batch.image_mask].cpu()

    with eval_mode(vlm.model), watch_attention(vlm, record, queries=token_kinds(batch)["text"], keys=batch.image_mask):
        forward(vlm, batch)
    return maps.unflatten(1, grid)


def _grid(batch: Batch, num_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of image tokens: from the processor's output (Qwen), else a square for one view of the image."""
    if "image_grid_thw" in batch.inputs:
        _, rows, columns = batch.inputs["image_grid_thw"][0].tolist()
        merged = math.isqrt(rows * columns // num_tokens)
        return (rows // merged, columns // merged) if rows * columns == num_tokens * merged**2 else None
    side, pixels = math.isqrt(num_tokens), batch.inputs.get("pixel_values")
    one_view = pixels is not None and pixels.shape[:-3].numel() == 1  # all axes but channel, height and width
    return (side, side) if side**2 == num_tokens and one_view else None

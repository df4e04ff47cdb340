"""Where the image tokens of an example lie in its images.

Where each crop or tile lies is found by processing a ramp in the image's place: no processor needs rules of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from striate.data import Example, Record, encode, open_image
from striate.vlm import Vlm

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

SUMMARIES = ("aria", "blip-2", "idefics2", "instructblip", "instructblipvideo")
"""Families whose image tokens are each computed from the whole image by queries: they have no place in it."""


@dataclass(frozen=True)
class View:
    """A grid of image tokens over a part of one image.

    The token in a row and column is number `first + row * stride + column` of the example's image tokens. `box`: left,
    top, right and bottom of the grid as fractions of the image's width and height, beyond 0..1 where the processor
    padded the image; None where the tokens have no place in the image. `is_tile`: it covers one of several parts.
    """

    image: int
    first: int
    rows: int
    columns: int
    stride: int
    box: Box | None
    is_tile: bool = False

    @property
    def tokens(self) -> Tensor:
        """The numbers of its tokens [rows, columns]."""
        return self.first + torch.arange(self.rows)[:, None] * self.stride + torch.arange(self.columns)


def layout(vlm: Vlm, record: Record, example: Example) -> tuple[View, ...]:
    """The views that the image tokens of an encoded record form; tokens that end a row are in none.

    A family without a known layout gives one view without a place; cross-attention to images, or no image, none.
    """
    num_tokens = int(example.image_mask.sum())
    if not num_tokens or "cross_attention_mask" in example.inputs:
        return ()
    views: list[View] = []
    if vlm.model.config.model_type not in SUMMARIES:
        ways = (_of_grids, _of_sizes, _of_rows_with_ends, _of_tiles)
        views = next(filter(None, (way(vlm, record, example) for way in ways)), [])
    if not views:
        rows = max(n for n in range(1, math.isqrt(num_tokens) + 1) if num_tokens % n == 0)
        views = [View(0, 0, rows, num_tokens // rows, num_tokens // rows, None)]
    return tuple(views)


def pool(values: Tensor, views: Sequence[View], factor: int) -> Tensor:
    """Values of image tokens [..., P] as those of cells [..., C]: means over `factor` x `factor` tokens of a view.

    Cells are in the order of the views, row by row. Cells at the right and the bottom may have fewer tokens.
    """
    parts = [values[..., view.tokens.to(values.device)] for view in views]  # ... rows columns
    if factor > 1:
        pooled = [F.avg_pool2d(part.reshape(-1, 1, *part.shape[-2:]), factor, ceil_mode=True) for part in parts]
        parts = [small.reshape(*part.shape[:-2], *small.shape[-2:]) for small, part in zip(pooled, parts, strict=True)]
    return torch.cat([part.flatten(-2) for part in parts], dim=-1)


def num_cells(views: Sequence[View], factor: int) -> int:
    """Number of cells that `pool` returns."""
    return sum(-(-view.rows // factor) * -(-view.columns // factor) for view in views)


def _of_grids(_: Vlm, record: Record, example: Example) -> list[View]:
    """Grids of patches of any size, merged m x m to a token (Qwen, GLM): the whole image each."""
    grids = example.inputs.get("image_grid_thw")
    if grids is None or len(grids) != len(record.images):
        return []
    num_tokens = int(example.image_mask.sum())
    merged = max(1, math.isqrt(int(grids.prod(dim=1).sum()) // num_tokens))
    return _stack(((rows // merged, columns // merged) for _, rows, columns in grids.tolist()), num_tokens)


def _of_sizes(_: Vlm, record: Record, example: Example) -> list[View]:
    """Images scaled to sizes of their own (Pixtral, Mistral 3): the whole image each."""
    sizes, pixels = example.inputs.get("image_sizes"), example.inputs.get("pixel_values")
    if sizes is None or pixels is None or pixels.dim() != 4 or len(sizes) != len(record.images):
        return []
    num_tokens = int(example.image_mask.sum())
    side = math.sqrt(int(sizes.prod(dim=1).sum()) / num_tokens)  # pixels
    return _stack(((round(height / side), round(width / side)) for height, width in sizes.tolist()), num_tokens)


def _of_rows_with_ends(vlm: Vlm, record: Record, example: Example) -> list[View]:
    """LLaVA-NeXT and -OneVision: the whole image, and again at high resolution, with a token at the end of each row."""
    sizes, pixels = example.inputs.get("image_sizes"), example.inputs.get("pixel_values")
    runs = list(_runs(example.image_mask))
    if sizes is None or pixels is None or pixels.dim() != 5 or not len(sizes) == len(record.images) == len(runs):
        return []
    vision = vlm.model.config.vision_config
    side, views, first = vision.image_size // vision.patch_size, list[View](), 0
    for image, ((height, width), length) in enumerate(zip(sizes.tolist(), runs, strict=True)):
        views.append(View(image, first, side, side, side, WHOLE))
        left = length - side**2
        forms = [(rows, left // rows - 1) for rows in range(1, left) if left % rows == 0 and left // rows > 1]
        if forms:
            rows, columns = min(forms, key=lambda form: abs(math.log(form[1] / form[0] * height / width)))
            views.append(View(image, first + side**2, rows, columns, columns + 1, WHOLE, is_tile=True))
        first += length
    return views


def _of_tiles(vlm: Vlm, record: Record, example: Example) -> list[View]:
    """Equal crops or tiles of the images, or one of each, in the order of their tokens."""
    pixels = example.inputs.get("pixel_values")
    if pixels is None or pixels.dim() < 4:
        return []
    height, width = pixels.shape[-2:]
    num_tiles, num_tokens = pixels.shape[:-3].numel(), int(example.image_mask.sum())
    rows = round(math.sqrt(num_tokens / num_tiles * height / width))
    columns = rows * width // height
    if rows * columns * num_tiles != num_tokens:
        return []
    places = _places(vlm, record)
    counts = [sum(place[0] == image for place in places if place) for image in range(len(record.images))]
    return [
        View(place[0], tile * rows * columns, rows, columns, columns, place[1], _is_part(place[1], counts[place[0]]))
        for tile, place in enumerate(places)
        if place
    ]


def _is_part(box: Box, count: int) -> bool:
    """Whether a view, one of `count` of its image, covers a part of it."""
    left, top, right, bottom = (min(max(side, 0), 1) for side in box)
    return count > 1 and (right - left) * (bottom - top) < 0.9


def _places(vlm: Vlm, record: Record) -> list[tuple[int, Box] | None]:
    """The image and the box of each tile, found by images that are ramps; None for a tile without pixels of any."""
    sizes = [open_image(image, record.source).size for image in record.images]
    black, white = (_pixels(vlm, record, [Image.new("RGB", size, color) for size in sizes]) for color in (0, "#ffffff"))
    range_ = white - black  # N 3 H W; 0 where the processor padded
    padded = range_.abs().amin(dim=1) < 0.5 * range_.abs().max()
    places: list[tuple[int, Box] | None] = [None] * len(black)
    for number, size in enumerate(sizes):
        images = [_ramp(size) if other == number else Image.new("RGB", one) for other, one in enumerate(sizes)]
        shares = ((_pixels(vlm, record, images) - black) / range_).masked_fill(padded[:, None], math.nan)
        for tile, (x, y, here) in enumerate(shares):
            if (here > 0.5).any():
                left, right = _ends(x.nanmean(dim=0))
                top, bottom = _ends(y.nanmean(dim=1))
                places[tile] = (number, (left, top, right, bottom))
    return places


def _ends(ramp: Tensor) -> tuple[float, float]:
    """The values of a line through a ramp [n], NaN where it has none, half a step before its first and after its last
    place."""
    at = torch.arange(len(ramp), dtype=torch.float64)[~ramp.isnan()]
    values = ramp[~ramp.isnan()].double()
    spread = at - at.mean()
    slope = float((spread * values).sum() / spread.square().sum().clamp(min=1e-9))
    start = float(values.mean()) - slope * (float(at.mean()) + 0.5)
    return start, start + slope * len(ramp)


def _ramp(size: tuple[int, int]) -> Image.Image:
    """An image whose red is the share of the width, whose green is the share of the height, and whose blue is full."""
    width, height = size
    x = ((torch.arange(width) + 0.5) / width * 255).round().byte().expand(height, -1)
    y = ((torch.arange(height) + 0.5) / height * 255).round().byte()[:, None].expand(-1, width)
    return Image.fromarray(torch.stack([x, y, torch.full_like(x, 255)], dim=-1).numpy())


def _pixels(vlm: Vlm, record: Record, images: Sequence[Image.Image]) -> Tensor:
    """The pixels [N, 3, H, W] that the processor makes of other images in the record's place."""
    example = encode(replace(record, images=tuple(images)), vlm.processor, max_length=1 << 30, generation=True)
    return example.inputs["pixel_values"].flatten(0, -4).float()


def _stack(grids: Iterator[tuple[int, int]], num_tokens: int) -> list[View]:
    """One view of the whole image for each grid, one after the other; none if they do not make all the tokens."""
    views: list[View] = []
    first = 0
    for image, (rows, columns) in enumerate(grids):
        views.append(View(image, first, rows, columns, columns, WHOLE))
        first += rows * columns
    return views if first == num_tokens else []


def _runs(mask: Tensor) -> Iterator[int]:
    """Lengths of the runs of true entries of a mask [T]."""
    edges = F.pad(mask.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    yield from (end - start for start, end in list(pairwise(edges))[::2])

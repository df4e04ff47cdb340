"""Broken and hostile records and images: each becomes an example or a listed reason."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard import BYTES, HangError, Watch, in_time, watched
from pico import pico_processor
from PIL import Image
from plain import ended_by

from striate.data import Examples, RecordError, Skipped, collate, read
from striate.data.format import record_of
from striate.data.images import ImageFolder
from striate.data.keys import HONORED, LOSS_MARKS, REFUSED
from striate.errors import UserError

PROCESSOR = pico_processor()


def outcomes(data: Path, images: Path) -> Counter[str]:
    """How many records of a file become examples, and how many are left out; anything else is a fault, by its name."""
    with in_time():
        try:
            records = read(data, images=images, on_bad="skip")
        except UserError:  # nothing is left
            return Counter(refused=1)
    found = Counter(refused=len(records.skipped))
    examples = Examples(records.records, PROCESSOR)
    for index in range(len(examples)):
        try:
            with in_time(), warnings.catch_warnings(action="ignore"):
                example = examples[index]
                batch = collate([example], pad_id=0)
        except (Exception, HangError) as error:
            found[f"{type(error).__name__}: {error} ({records.records[index].source})"[:300]] += 1
            continue
        refused = isinstance(example, Skipped)
        assert len(batch) == (0 if refused else 1)
        found["refused" if refused else "read"] += 1
    return found


def judge(found: Counter[str], watch: Watch, tried: int) -> tuple[int, list[str]]:
    """How many were survived, and everything that is wrong."""
    survived = found["read"] + found["refused"]
    wrong = [name for name in found if name not in ("read", "refused")]
    wrong += [f"opened {name}" for name in watch.opened]
    wrong += [f"{watch.grown / 1e9:.1f} GB of memory"] if watch.grown > BYTES else []
    return min(survived, tried), wrong


# Images


def sound_images() -> list[tuple[str, bytes]]:
    """Valid images of every supported format, by the end of their name."""
    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    deep = Image.fromarray(draw.integers(0, 2**16, (24, 24), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    return [
        ("jpg", _saved(photo, "JPEG", exif=turned)),
        ("jpg", _saved(photo.convert("CMYK"), "JPEG")),
        ("jpg", _saved(photo, "JPEG", progressive=True)),
        ("png", _saved(photo, "PNG")),
        ("png", _saved(photo.convert("P"), "PNG", transparency=3)),
        ("png", _saved(deep, "PNG")),
        ("webp", _saved(photo, "WEBP")),
        ("webp", _saved(photo, "WEBP", **frames)),
        ("gif", _saved(photo.convert("P"), "GIF", **frames)),
        ("tiff", _saved(photo, "TIFF", compression="tiff_lzw")),
        ("tiff", _saved(deep, "TIFF")),
        ("bmp", _saved(photo, "BMP")),
    ]


def _saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def bombs() -> list[tuple[str, bytes]]:
    """Images that claim to be huge, or hold far more than they weigh."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(wide: int, high: int, body: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", wide, high, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(10**7), 9)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))
    sound = png(8, 8, zlib.compress(bytes(9 * 8)))
    return [
        ("png", png(2**31 - 1, 2**31 - 1, zeros)),
        ("png", png(60000, 60000, zeros)),
        ("png", png(1, 2**24, zeros)),
        ("png", sound[:33] + text + sound[33:]),
        ("gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b",".ljust(40, b"\xff")),
        ("bmp", b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)),
        ("tiff", b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 60000) + bytes(20)),
    ]


def corrupt(body: bytes, draw: random.Random) -> bytes:
    """Cut off, bits turned over, bytes put in, left out, zeroed, made huge, or doubled."""
    changed = bytearray(body)
    for _ in range(draw.randint(1, 6)):
        at, size = draw.randrange(len(changed) or 1), draw.randint(1, 64)
        match draw.randrange(7):
            case 0:
                del changed[at:]
            case 1 if changed:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                changed[at:at] = draw.randbytes(size)
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at : at + size] = bytes(size)
            case 5:
                changed[at : at + 4] = b"\xff\xff\xff\x7f"
            case 6:
                changed += changed[at : at + size]
    return bytes(changed)


def test_corrupted_images(tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]) -> None:
    draw, sound = random.Random(0), sound_images()
    images = tmp_path / "images"
    images.mkdir()
    files = [*sound, *bombs()]
    whole = len(files)
    files += [(end, corrupt(body, draw)) for end, body in (draw.choice(sound) for _ in range(amount(150, 2500)))]
    rows = []
    for number, (end, body) in enumerate(files):
        # Every tenth lies about its kind.
        name = f"{number}.{'png' if number > whole and number % 10 == 0 else end}"
        (images / name).write_bytes(body)
        rows.append({"id": str(number), "image": name, "conversations": _turns("<image>\nwhat is this ?", "a cat")})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    with watched(tmp_path) as watch:
        found = outcomes(data, images)
    survived, wrong = judge(found, watch, len(files))
    by_trainer = ended_by(PROCESSOR, images, rows)
    note_fault("corrupted images of ten kinds, and bombs", len(files), survived, trainer=by_trainer)
    assert not wrong
    assert survived == len(files)
    assert found["read"] >= len(sound)
    assert found["refused"] >= len(bombs()) - 1  # hidden text can be passed over


# Records


def _turns(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ODD: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, "", " ", "\0", "\ud800", "<image>", "<image>" * 40, "a cat " * 3000, "\u202e",
    "</s><user>", [], [[]], [None], {}, {"a": {"a": {}}}, {"bytes": "x"}, {"path": None}, "cat.jpg", ["cat.jpg"],
    ["cat.jpg"] * 30, "~/cat.jpg",
    "../secret.jpg", "/etc/passwd", "link.jpg", "images/../../secret.jpg", "a/" * 2000, "x" * 5000, "cat.jpg\0", ".",
    "/dev/zero", "/dev/stdin", "fifo", "http://127.0.0.1:9/cat.jpg", "file:///etc/passwd", "data:image/png;base64,AAAA",
]  # fmt: skip
KEYS = (
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "task",
    "choices",
    "answer",
    "from",
    "value",
    "role",
    "content",
)


def odd_records(number: int) -> Iterator[Any]:
    """Sound records in which one to four values, somewhere, were replaced, renamed, doubled or taken away."""
    draw = random.Random(1)
    for index in range(number):
        llava = {"id": str(index), "image": "cat.jpg", "conversations": _turns("<image>\nwhat is this ?", "a cat")}
        content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
        record: Any = llava if index % 2 else {"id": index, "images": ["cat.jpg"], "messages": turns}
        record = json.loads(json.dumps(record))
        for _ in range(draw.randint(1, 4)):
            record = _changed(record, draw)
        yield record


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one place in it changed."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or draw.random() < 0.15:
        return deepcopy(draw.choice(ODD))
    at = draw.choice(inner)
    kind = draw.random()
    if kind < 0.1:
        del value[at]
    elif kind < 0.2 and isinstance(value, dict):
        value[draw.choice(KEYS)] = value.pop(at)
    elif kind < 0.3 and isinstance(value, list):
        value.append(value[at])
    else:
        value[at] = _changed(value[at], draw)
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image inside; a secret outside, and ways to it."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32), "red").save(images / "cat.jpg")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "secret.jpg")
    (images / "link.jpg").symlink_to("../secret.jpg")
    os.mkfifo(images / "fifo")
    return images


def test_odd_records(
    folder: Path, tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    number, found = amount(600, 12_000), Counter[str]()
    rows = list(odd_records(number))
    with watched(folder, tmp_path / "data") as watch:
        (tmp_path / "data").mkdir()
        for begin in range(0, number, 200):  # in files: a reader that gives up on one gives up on 200
            data = tmp_path / "data" / f"{begin}.json"
            data.write_text(json.dumps(rows[begin : begin + 200]))
            found += outcomes(data, folder)
    survived, wrong = judge(found, watch, number)
    tried = rows[1:600:2]  # those in LLaVA's format; not all, since each that it waits at takes five seconds
    by_trainer = f"{ended_by(PROCESSOR, folder, tried)} ({len(tried)} tried)"
    note_fault("records with odd values, keys and paths", number, survived, trainer=by_trainer)
    assert not wrong
    assert survived == number
    assert min(found["read"], found["refused"]) > number // 10


# Keys and layouts


JUNK: list[Any] = [
    "x.mp4",
    "cat.jpg",
    ["cat.jpg"],
    True,
    0,
    0.5,
    {"url": "cat.jpg"},
    [{"a": 1}],
    "<image>",
    ["x", None],
]
NOTHING: list[Any] = [None, "", [], {}, float("nan"), [None], {"a": None}]


def keyed_records() -> Iterator[tuple[str, str, Any, Any]]:
    """Every key of the list in every place, with values of every kind: place, key, value, record."""
    keys = sorted({key for place in HONORED for key in (*HONORED[place], *REFUSED[place])} | {"nobody_knows"})
    for place, key, value in product(HONORED, keys, [*JUNK, *NOTHING]):
        part = {"type": "text", "text": "what is this ?"}
        first, again = [{"role": "assistant", "content": "a cat"}, {"role": "assistant", "content": "no"}]
        row = {"messages": [{"role": "user", "content": [part]}, first, {"role": "user", "content": "so ?"}, again]}
        {"row": row, "turn": first, "part": part}[place][key] = value
        yield place, key, value, row


def test_no_key_is_dropped_without_a_word(
    folder: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    images, dropped, tried = ImageFolder(folder), [], 0
    cases = list(keyed_records())
    plain = next(record_of(row, "a:1", images) for _, key, value, row in cases if key == "video" and value is None)
    for place, key, value, row in random.Random(2).sample(cases, min(len(cases), amount(1500, 10**6))):
        unknown: set[str] = set()
        tried += 1
        try:
            found = record_of(row, "a:1", images, unknown)
        except RecordError:
            continue
        says_nothing = repr(value) in map(repr, NOTHING) or value in (False, 0)
        sure = value in (True, 1) and key in LOSS_MARKS  # as without it
        if found == plain and not (says_nothing or sure or unknown & {key, "text"}):
            dropped.append(f"{place} {key} {value!r}")
    note_fault("keys that mean something, in a row, a turn or a part", tried, tried - len(dropped))
    assert dropped == []


LAYOUTS = ("{}", "{}.gz", "part/{}", "part/deep/{}.gz", "train/{}", "test/{}", ".{}", "{}.zst", "{}.bak.tar", "{}.csv")


def test_no_file_is_passed_over_without_a_word(
    tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    draw, silent, number = random.Random(3), [], amount(40, 1000)
    for index in range(number):
        home, files = tmp_path / str(index), set[str]()
        for name in draw.sample(["a.json", "b.jsonl", "c.ndjson", "val.json", "train-0.jsonl"], draw.randint(1, 4)):
            file = home / draw.choice(LAYOUTS).format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            row = json.dumps({"id": file.relative_to(home).as_posix(), "text": "a cat"})
            body = (f"[{row}]" if ".json." in f"{file.name}." else row).encode()
            file.write_bytes(gzip.compress(body) if file.suffix == ".gz" else body)
            files.add(file.relative_to(home).as_posix())
        try:
            found = read(home)
            messages = " ".join(found.notes)
            ids = {record.id for record in found}
        except UserError as error:
            messages, ids = str(error), set()
        silent += [
            name for name in files - ids
            if name not in messages and f" {Path(name).suffix}" not in messages and not Path(name).name.startswith(".")
        ]  # fmt: skip
    note_fault("folders of files, packed, nested, split or of another kind", number, number - len(silent))
    assert silent == []

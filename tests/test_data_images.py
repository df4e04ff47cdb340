"""Images as they occur in real data sets: each opens as upright 8-bit RGB, or is refused in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from base64 import b64encode, encodebytes, urlsafe_b64encode
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from striate.data import RecordError, open_image
from striate.data import images as images_module
from striate.data.images import MAX_PIXELS, MAX_SIDE, MIN_SIDE, ImageFolder
from striate.data.record import ImageSource

# Left half red, right half blue, 8 x 6.
FLAG = Image.new("RGB", (8, 6), "red")
FLAG.paste("blue", (4, 0, 8, 6))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: ImageSource) -> np.ndarray:
    opened = open_image(image, "train.json:1")
    assert opened.mode == "RGB"
    return np.asarray(opened)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_kinds_without_loss(kind: str) -> None:
    data = encoded(FLAG, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(data), np.asarray(FLAG))


def test_the_same_from_path_bytes_and_memory(tmp_path: Path) -> None:
    FLAG.save(tmp_path / "flag.png")
    for source in (tmp_path / "flag.png", (tmp_path / "flag.png").read_bytes(), FLAG):
        np.testing.assert_array_equal(pixels(source), np.asarray(FLAG))


@pytest.mark.parametrize(("orientation", "turned"), [
    (1, FLAG), (2, FLAG.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), (3, FLAG.rotate(180)),
    (6, FLAG.transpose(Image.Transpose.ROTATE_270)), (8, FLAG.transpose(Image.Transpose.ROTATE_90)),
])  # fmt: skip
def test_exif_rotation_is_applied(orientation: int, turned: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(FLAG, "PNG", exif=exif)), np.asarray(turned))


def test_palettes_and_transparency_lie_on_white() -> None:
    clear = FLAG.convert("RGBA")
    clear.paste((0, 255, 0, 0), (0, 0, 4, 6))
    expected = np.asarray(FLAG).copy()
    expected[:, :4] = 255
    np.testing.assert_array_equal(pixels(encoded(clear, "PNG")), expected)
    np.testing.assert_array_equal(pixels(encoded(FLAG.quantize(2), "PNG")), np.asarray(FLAG))
    palette = FLAG.quantize(2)
    red = palette.getpixel((0, 0))
    np.testing.assert_array_equal(pixels(encoded(palette, "PNG", transparency=red)), expected)
    np.testing.assert_array_equal(pixels(encoded(FLAG, "PNG", transparency=(255, 0, 0))), expected)
    gray = Image.new("LA", (4, 4), (100, 128))
    assert abs(int(pixels(encoded(gray, "PNG"))[0, 0, 0]) - (100 * 128 + 255 * 127) // 255) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels(encoded(Image.fromarray(ramp), kind))
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], np.rint(ramp / 257))


@pytest.mark.parametrize("values", [np.array([[-1.5, 0.0], [0.5, 2.5]], np.float32), np.array([[0, 10**6]], np.int32)])
def test_wider_numbers_are_spread(values: np.ndarray) -> None:
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert found.min() == 0
    assert found.max() == 255
    broken = np.full((8, 8), np.nan, np.float32)
    assert (pixels(encoded(Image.fromarray(broken), "TIFF")) == 0).all()


def test_one_bit_and_cmyk() -> None:
    bits = Image.fromarray(np.eye(8, dtype=bool))
    np.testing.assert_array_equal(pixels(encoded(bits, "PNG"))[..., 0], np.eye(8, dtype=np.uint8) * 255)
    red, _, blue = pixels(encoded(FLAG.convert("CMYK"), "TIFF"))[0, 0]
    assert red > 250
    assert blue < 5


def test_the_first_frame_of_a_moving_one() -> None:
    rest = [Image.new("RGB", FLAG.size, color) for color in ("green", "black")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(FLAG, kind, save_all=True, append_images=rest, **options)
        np.testing.assert_array_equal(pixels(data), np.asarray(FLAG))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 3)])
def test_slim_images_are_widened(size: tuple[int, int]) -> None:
    found = pixels(encoded(Image.new("RGB", size, "red"), "PNG"))
    assert found.shape == (max(size[1], MIN_SIDE), max(size[0], MIN_SIDE), 3)
    assert (found == (255, 0, 0)).all()


def test_the_callers_image_is_left_alone() -> None:
    mine = FLAG.copy()
    open_image(mine).paste("white", (0, 0, 8, 6))
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(FLAG))


# Refused.


def bomb(side: int, high: int = 0) -> bytes:
    """A PNG of a few hundred bytes that says it has `side` x `side` (or `high`) pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, high or side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "message"), [
    (bomb(9_000), f"image data has more than {MAX_PIXELS:,} pixels; scale it down"),
    (bomb(12_000), f"image data has more than {MAX_PIXELS:,} pixels; scale it down"),
    (bomb(60_000), f"image data has more than {MAX_PIXELS:,} pixels; scale it down"),
    (bomb(1, 2**24), f"image data has more than {MAX_SIDE:,} pixels on a side; scale it down"),
    (encoded(FLAG, "PNG")[:-30], "image data is corrupted"),
    (encoded(FLAG.resize((99, 99)), "JPEG")[:-200], "image data is corrupted"),
    (b"", "is not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    (b"cos\nsystem\n(S'touch pickled'\ntR.", "is not an image"),
    (Path("nowhere.png"), "image nowhere.png not found"),
])  # fmt: skip
def test_refused_in_one_line(data: ImageSource, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(RecordError) as caught:
            open_image(data, "train.json:12")
    assert str(caught.value).startswith("train.json:12: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


SEEDS = [
    encoded(FLAG.resize((40, 30)), "JPEG"), encoded(FLAG, "PNG"), encoded(FLAG, "GIF"), encoded(FLAG, "TIFF"),
    encoded(FLAG, "WEBP"), encoded(FLAG, "BMP"), encoded(FLAG.quantize(4), "PNG", transparency=1),
]  # fmt: skip


@settings(max_examples=150, deadline=5000)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    end=st.none() | st.integers(0, 400),
)
def test_mutated_files_open_or_are_refused(seed: bytes, changes: list[tuple[int, int]], end: int | None) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    with warnings.catch_warnings(), suppress(RecordError):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files
        assert open_image(bytes(data[:end]), "fuzz:1").mode == "RGB"


# Where images may be.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("secret.png", "images/flag.png", "images/deep/flag.png"):
        FLAG.save(tmp_path / name)
    (tmp_path / "images" / "escape.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "inner.png").symlink_to(tmp_path / "images" / "flag.png")
    (tmp_path / "images" / "loop.png").symlink_to(tmp_path / "images" / "loop.png")
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["flag.png", "deep/flag.png", "deep/../flag.png", "inner.png", "./flag.png"])
def test_images_inside_the_folder(folder: Path, name: str) -> None:
    assert ImageFolder(folder).locate(name, "x") == folder.resolve() / name.replace("deep/../", "").replace(
        "inner", "flag"
    )
    assert ImageFolder(folder).locate(str(folder / "flag.png"), "x").is_file()


def test_an_image_that_becomes_a_link_is_rejected(folder: Path) -> None:
    images = ImageFolder(folder)
    assert images.locate("deep/flag.png", "x") == (folder / "deep/flag.png").resolve()
    (folder / "deep/flag.png").unlink()
    (folder / "deep/flag.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(RecordError, match="is outside the image folder"):
        images.locate("deep/flag.png", "x")
    for name in ("up/images/flag.png", "deep/.", "deep/..", "deep/", "up"):  # through a link, and no file
        for _ in range(2):
            if name == "up/images/flag.png":
                assert images.locate(name, "x") == (folder / "flag.png").resolve()
            else:
                with pytest.raises(RecordError, match=r"is not a file|is outside"):
                    images.locate(name, "x")


@pytest.mark.parametrize(("name", "message"), [
    ("../secret.png", "is outside the image folder"),
    ("/etc/passwd", "is outside the image folder"),
    ("escape.png", "is outside the image folder"),
    ("up/secret.png", "is outside the image folder"),
    ("deep/../../secret.png", "is outside the image folder"),
    ("missing.png", "not found in"),
    ("../missing.png", "is outside the image folder"),
    ("loop.png", "not found in"),
    ("nul\0.png", "not found in"),
    ("x" * 5000, "has 5,000 characters and is neither a path nor a base64 image"),
    ("pipe.png", "is not a file"),
    ("deep", "is not a file"),
    ("", "an image must be a path or data, found"),
    (7, "an image must be a path or data, found 7"),
    (None, "an image must be a path or data, found None"),
    ({"bytes": None, "path": "../secret.png"}, "is outside the image folder"),
    ("file:///etc/passwd", "image /etc/passwd is outside the image folder"),
    ("file://localhost/etc/passwd", "image /etc/passwd is outside the image folder"),
    ("file://elsewhere/a.png", "not found in"),
    ("s3://bucket/a.png", "image s3://bucket/a.png is a URL; download it, and name the file instead"),
    ("gs://bucket/a.png", "is a URL; download it, and name the file instead"),
    ("hf://datasets/a/b.png", "is a URL; download it, and name the file instead"),
    ("data:video/mp4;base64,AAAA", "image data:video/mp4;base64,AAAA is not a data URI of an image"),
    ("data:image/png;base64", "is not a data URI of an image"),
    ("data:image/png;base64,A*", "is not valid base64"),
    ({"bytes": "x"}, "image x is not valid base64"),
    ({"bytes": [137, 80]}, "an image must be a path or data, found [137, 80]"),
    ({"bytes": None, "path": None}, "an image must be a path or data, found None"),
    ({"a": 1}, "an image must be a path or data, found None"),
    ("https://example.org/a.png", "is a URL; download it, and name the file instead"),
])  # fmt: skip
def test_images_that_may_not_be_opened(folder: Path, name: object, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        ImageFolder(folder).locate(name, "train.json:3")
    assert str(caught.value).startswith("train.json:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


KINDS = {"PNG": {}, "JPEG": {}, "GIF": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "JPEG2000": {}}


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind, **KINDS[kind])
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_a_record_holds_itself(tmp_path: Path, kind: str) -> None:
    data = saved(kind)
    text, folder = b64encode(data).decode(), ImageFolder(tmp_path)
    texts = [text, encodebytes(data).decode(), urlsafe_b64encode(data).decode(), text.rstrip("="), f" {text}\n"]
    uris = [f"data:image/{kind.lower()};base64,{one}" for one in texts[:1]]
    uris += [
        f"DATA:;charset=utf-8;base64,{text}",
        f"data:image/x,{quote_from_bytes(data)}",
        f"data:;base64,{quote(text)}",
    ]
    pairs = [{"bytes": one, "path": "nowhere.png"} for one in (data, text, uris[0])]
    pairs += [{"base64": text}, {"url": uris[0]}, {"image_url": {"url": uris[0]}}, {"path": None, "bytes": text}]
    for value in [data, *texts, *uris, *pairs]:
        assert folder.locate(value, "train.json:3") == data
    assert open_image(data).getpixel((8, 8))[0] > 250


@pytest.mark.parametrize("ending", ["JPG", "png", "jpeg"])
def test_base64_that_ends_like_the_name_of_a_file(tmp_path: Path, ending: str) -> None:
    text = b64encode(saved("JPEG") + bytes(5)).decode().rstrip("=")
    text = text[: len(text) // 4 * 4] + ending.rjust(4, "A")  # what follows the end of a JPEG does not matter
    assert open_image(ImageFolder(tmp_path).locate(text, "")).size == (16, 16)


def test_data_of_more_pixels_than_a_file_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_PIXELS", 100)
    image = ImageFolder(tmp_path).locate("data:image/png;base64," + b64encode(saved("PNG")).decode(), "")
    with pytest.raises(RecordError, match="image data has more than 100 pixels; scale it down"):
        open_image(image)


@pytest.mark.parametrize("form", ["file://{}", "FILE://{}", "file://localhost{}", "file:///{}"])
def test_addresses_of_files(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a cat.png"
    file.write_bytes(saved("PNG"))
    assert ImageFolder(tmp_path).locate(form.format(quote(str(file))), "") == file

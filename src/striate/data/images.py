"""Open images of untrusted records safely: the result is always upright 8-bit RGB."""

from __future__ import annotations

import binascii
import errno
import io
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from striate.data.record import DatasetImage, ImageSource, RecordError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Supported formats. Not EPS: Pillow would run Ghostscript, which can execute programs."""

MAX_PIXELS = 2**26
"""Larger images are rejected before decoding: 67 million pixels are 200 MB as RGB."""

MAX_SIDE = 2**16
"""Largest side in pixels, about the limit of JPEG. An image of 1 x 16 million pixels takes over 5 s and 1.6 GB."""

MIN_SIDE = 4
"""Smallest side in pixels; smaller images are enlarged. `transformers` takes a side of 1 or 3 for color channels."""


@dataclass(frozen=True)
class ImageFolder:
    """The image folder of a data file: images are files inside `root`. Nothing is downloaded."""

    root: Path
    _real: dict[str, str | None] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, value: Any, source: str) -> ImageSource:
        """Find the image of `value`: a path, file://, data URI, base64, bytes, image, or an object with one of these.

        Raises:
            RecordError: the file is missing or, after following links, outside the folder; or the image is on the web.
        """
        if isinstance(value, str) and "." in value and ":" not in value:  # neither base64 nor a URL
            return self._file(value, source)
        if (data := image_data(value, source)) is not None:
            return data
        value = _unwrap(value)[1]
        if isinstance(value, Image.Image | DatasetImage):
            return value
        if not isinstance(value, str) or not value:
            raise RecordError(source, f"an image must be a path or data, found {_brief(value)}")
        if found := _URL.match(value):
            if found[1].lower() != "file":
                raise RecordError(source, f"image {_brief(value)} is a URL; download it, and name the file instead")
            value = unquote(re.sub("^//(localhost(?=/))?", "", value[len("file:") :]))
        return self._file(value, source)

    def _file(self, name: str, source: str) -> Path:
        # Fast path: a regular file in a folder that is inside `root` is inside, too. Folders are resolved once, so that
        # half a million images take one `lstat` each.
        parent, last = os.path.split(name)
        try:
            if parent not in self._real:
                self._real[parent] = self._inside(parent)
            folder = self._real[parent]
            if folder is not None and stat.S_ISREG(os.lstat(os.path.join(folder, last)).st_mode):
                return Path(folder, last)
            path = self._inside(name)
            regular = path is not None and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                what = f"image {_brief(name)} has {len(name):,} characters and is neither a path nor a base64 image"
                raise RecordError(source, what) from None
            raise RecordError(source, f"image {_brief(name)} not found in {self.root}; set --images") from None
        if path is None:
            raise RecordError(source, f"image {_brief(name)} is outside the image folder {self.root}; set --images")
        if not regular:
            raise RecordError(source, f"image {_brief(name)} in {self.root} is not a file")
        return Path(path)

    def _inside(self, name: str) -> str | None:
        """The path of a name after following all links, if it is inside the folder."""
        root, real = os.path.realpath(self.root), os.path.realpath(os.path.join(self.root, name))
        return real if os.path.commonpath((root, real)) == root else None


_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_HOLDERS = ("bytes", "base64", "data", "path", "url", "image_url", "image", "source", "file_name")
"""Keys of an object that can hold the image."""

# Start of JPEG, PNG, GIF, WebP, BMP, TIFF and JPEG 2000 in base64; a long text of its alphabet is not a path.
_BASE64 = re.compile(r"\s*(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A|AAAADGpQ)[A-Za-z0-9+/_\s-]{40,}={0,2}\s*")


def _unwrap(value: Any) -> tuple[str, Any]:
    """The key and value of an object's image; the key is empty for a value that is not an object."""
    key = ""
    while isinstance(value, dict):
        key = next((key for key in _HOLDERS if value.get(key)), "")
        value = value.get(key)
    return key, value


def image_data(value: Any, source: str) -> bytes | None:
    """The bytes of an image inside the record, from bytes, data URI or base64; None for paths, URLs and objects.

    Raises:
        RecordError: the data URI or base64 is invalid.
    """
    key, value = _unwrap(value)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return None
    if value[:5].lower() == "data:":
        return _decode_uri(value, source)
    if key in ("bytes", "base64", "data") or _BASE64.fullmatch(value):
        return _decode_base64(value, source)
    return None


def _decode_uri(value: str, source: str) -> bytes:
    header, comma, body = value[5:].partition(",")
    kind, *settings = header.lower().split(";")
    if not comma or (kind and not kind.startswith("image/") and kind != "application/octet-stream"):
        raise RecordError(source, f"image {_brief(value[:80])} is not a data URI of an image")
    return _decode_base64(unquote(body), source) if "base64" in settings else unquote_to_bytes(body)


def _decode_base64(text: str, source: str) -> bytes:
    letters = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return binascii.a2b_base64(letters + "=" * (-len(letters) % 4), strict_mode=True)
    except ValueError as error:
        raise RecordError(source, f"image {_brief(text[:80])} is not valid base64 ({_brief(error)})") from None


def open_image(image: ImageSource, source: str = "") -> Image.Image:
    """Open an image as upright 8-bit RGB: the first frame of an animation, with transparency on white.

    Sides are at least `MIN_SIDE` pixels; 16-bit values are scaled, not clipped.

    Raises:
        RecordError: the image of record `source` cannot be read, is truncated, or is larger than `MAX_PIXELS` pixels or
            `MAX_SIDE` on a side.
    """
    name = _name(image)
    try:
        if isinstance(image, DatasetImage):
            image = image_data(image.load(), source) or b""
        if isinstance(image, Image.Image):
            return _upright_rgb(image.copy())
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            return _upright_rgb(opened)
    except FileNotFoundError:
        raise RecordError(source, f"image {name} not found") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RecordError(source, f"image {name} has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except _TooLargeError as error:
        raise RecordError(source, f"image {name} has more than {error}; scale it down") from None
    except Image.UnidentifiedImageError:
        raise RecordError(source, f"image {name} is not an image, or its format is not supported") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors on corrupted data
        raise RecordError(source, f"image {name} is corrupted ({_brief(error)})") from error


class _TooLargeError(Exception):
    pass


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB, in place where possible: a copy of the largest size takes 270 MB."""
    if image.width * image.height > MAX_PIXELS:
        raise _TooLargeError(f"{MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_SIDE:
        raise _TooLargeError(f"{MAX_SIDE:,} pixels on a side")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if min(image.size) < MIN_SIDE:
        image = image.resize((max(image.width, MIN_SIDE), max(image.height, MIN_SIDE)), Image.Resampling.NEAREST)
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert high-depth grayscale to 8 bits: 16-bit values by their type's range, others by their own range."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False)
    low, high = float(values.min()), float(values.max())
    if not image.mode.startswith("F") and low >= 0 and high < 2**16:
        low, high = 0.0, 2.0**16 - 1
    values -= low
    values *= 255 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _name(image: ImageSource) -> str:
    return str(image) if isinstance(image, Path) else "data"


def _brief(value: Any) -> str:
    """A value from a file as one short line for an error message."""
    text = " ".join(str(value[:200] if isinstance(value, str | bytes | list) else value).split())
    return text if len(text) <= 80 else text[:77] + "..."

"""Images as they come in the wild, opened safely: what reaches a model is upright, 8-bit, RGB."""

from __future__ import annotations

import io
import os
import stat
import time
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from striate.data.record import Cell, ImageSource, RecordError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Not EPS: Pillow hands that to Ghostscript, which runs programs."""

MAX_PIXELS = 2**26
"""Larger images are refused before decoding: 67 million pixels are 200 MB as RGB."""

MAX_SIDE = 2**16
"""Pixels, about the most that JPEG can say. Sixteen million of them in one column cost over 5 s and 1.6 GB."""

MIN_SIDE = 4
"""Pixels; slimmer images are widened. `transformers` takes a side of 1 or 3 for the colour channels."""

URL_BYTES, URL_SECONDS = 32 * 2**20, 20.0


@dataclass(frozen=True)
class ImageFolder:
    """Where the images of a data file may be: files really inside `root` and, if allowed, on the web."""

    root: Path
    allow_urls: bool = False
    _real: dict[str, str | None] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, value: Any, source: str) -> ImageSource:
        """What `value` (a path, URL, bytes, image, or a `{"bytes", "path"}` pair) stands for.

        Raises `RecordError` for a file that is missing or lies outside the folder, also by way of a link.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | Image.Image | Cell):
            return value
        if not isinstance(value, str) or not value:
            raise RecordError(source, f"an image must be a path, found {_brief(value)}")
        if value.startswith(("http://", "https://")):
            if not self.allow_urls:
                raise RecordError(source, f"image {_brief(value)} is a URL; download it, or pass --allow-urls")
            return value
        return self._file(value, source)

    def _file(self, name: str, source: str) -> Path:
        # In a folder that really is inside, a file that is no link is inside. Half a million pictures lie in few
        # folders, so that one question a picture is left to ask; what has another answer is looked at closely.
        parent, last = os.path.split(name)
        try:
            if parent not in self._real:
                self._real[parent] = self._inside(parent)
            folder = self._real[parent]
            if folder is not None and stat.S_ISREG(os.lstat(os.path.join(folder, last)).st_mode):
                return Path(folder, last)
            path = self._inside(name)
            regular = path is not None and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):
            raise RecordError(source, f"image {_brief(name)} not found in {self.root}; set --images") from None
        if path is None:
            raise RecordError(source, f"image {_brief(name)} is outside the image folder {self.root}; set --images")
        if not regular:
            raise RecordError(source, f"image {_brief(name)} in {self.root} is not a file")
        return Path(path)

    def _inside(self, name: str) -> str | None:
        """Where a name leads through all its links, if that is inside the folder."""
        root, real = os.path.realpath(self.root), os.path.realpath(os.path.join(self.root, name))
        return real if os.path.commonpath((root, real)) == root else None


def open_image(image: ImageSource, source: str = "") -> Image.Image:
    """The image as upright 8-bit RGB, its first frame if it moves, transparency laid over white.

    Sides are at least `MIN_SIDE` pixels; 16-bit values are scaled, not clipped. Raises `RecordError`, naming
    `source`, when it cannot be read, is truncated, or has more than `MAX_PIXELS` pixels or `MAX_SIDE` on a side.
    """
    name = _name(image)
    if isinstance(image, str):
        image = _fetch(image, source)
    try:
        if isinstance(image, Cell):
            image = image.load()
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
        raise RecordError(source, f"image {name} is not an image, or of a kind that is not read") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything
        raise RecordError(source, f"image {name} is damaged ({_brief(error)})") from error


class _TooLargeError(Exception):
    pass


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Changes `image` where it can: at the largest size each copy is 270 MB."""
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
    """Deep greyscale as 8 bit: 16-bit values by their range, wider integers and floats by what is there."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False)
    low, high = float(values.min()), float(values.max())
    if not image.mode.startswith("F") and low >= 0 and high < 2**16:
        low, high = 0.0, 2.0**16 - 1
    values -= low
    values *= 255 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _fetch(url: str, source: str) -> bytes:
    try:
        return _download(url)
    except (OSError, ValueError, HTTPException) as error:
        raise RecordError(source, f"image {_brief(url)} could not be fetched ({_brief(error)})") from error


def _download(url: str) -> bytes:
    """The bytes behind a web address; the limits hold for the whole of it, however slowly it drips."""
    deadline, data = time.monotonic() + URL_SECONDS, bytearray()
    with urllib.request.urlopen(url, timeout=URL_SECONDS) as response:
        while chunk := response.read1(2**16):
            data += chunk
            if len(data) > URL_BYTES:
                raise ValueError(f"larger than {URL_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {URL_SECONDS:.0f} s")
    return bytes(data)


def _name(image: ImageSource) -> str:
    match image:
        case Path():
            return str(image)
        case str():
            return _brief(image)
        case _:
            return "data"


def _brief(value: Any) -> str:
    """One short line for an error message, whatever a file put there."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."

"""One example in memory, whatever spelling it had on disk, and what is said about a bad one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from striate.errors import UserError


@dataclass(frozen=True)
class Cell:
    """An image inside a Parquet file or a hub data set, read only when it is opened."""

    dataset: Any
    row: int
    column: str
    index: int | None = None  # place in the list, None where the column holds one image a row

    def load(self) -> bytes:
        value = self.dataset[self.row][self.column]
        value = value if self.index is None else value[self.index]
        return value["bytes"] if isinstance(value, dict) else value


ImageSource = Path | bytes | Image.Image | str | Cell
"""A file, its bytes, an open image, a URL, or a place in a data set."""


@dataclass(frozen=True)
class Record:
    """One example: a conversation about images, or plain text.

    `messages` are in the Hugging Face spelling, contents as lists:
    `{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}`.
    The n-th image part means `images[n]`; an assistant's content is one text part. `source` names the file
    and the record or line in it, counted from 1: `train.json:12`. Plain text has `text` and no `messages`.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    source: str = ""
    text: str = ""
    task: str = ""
    metric: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that was left out; `too_long` ones are sound and only did not fit the token limit."""

    source: str
    reason: str
    too_long: bool = False


class RecordError(UserError):
    """A record that cannot be used; `source` says which, `reason` why and what to do."""

    def __init__(self, source: str, reason: str, *, too_long: bool = False):
        super().__init__(f"{source}: {reason}" if source else reason)
        self.source, self.reason, self.too_long = source, reason, too_long

    def __reduce__(self):
        # Exceptions are pickled by their one-line text; data workers hand over the parts.
        return _rebuild, (self.source, self.reason, self.too_long)

    @property
    def skipped(self) -> Skipped:
        return Skipped(self.source, self.reason, self.too_long)


def _rebuild(source: str, reason: str, too_long: bool) -> RecordError:
    return RecordError(source, reason, too_long=too_long)

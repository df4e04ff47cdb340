"""A record in memory, independent of its format on disk, and the errors of invalid records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from striate.errors import UserError


@dataclass(frozen=True)
class DatasetImage:
    """An image inside a Parquet file or a hub data set, read lazily."""

    dataset: Any
    row: int
    column: str
    index: int | None = None  # position in the list; None where the column holds one image per row

    def load(self) -> Any:
        """The stored value: bytes, an object with bytes, a data URI or base64."""
        value = self.dataset[self.row][self.column]
        return value if self.index is None else value[self.index]


ImageSource = Path | bytes | Image.Image | DatasetImage
"""A file, its bytes, an open image, or an image in a data set."""


@dataclass(frozen=True)
class Record:
    """A record: a conversation about images, or plain text.

    `messages` are in the Hugging Face format, with contents as lists:
    `{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}`.
    The n-th image part is `images[n]`; an assistant's content is one text part. An assistant's message has
    `learn: False` if the loss ignores it, and `reasoning_content` if the record has reasoning. `source` is the file
    and the number of the record or line, from 1: `train.json:12`. Plain text has `text` and no `messages`.
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
    """A record that was skipped; with `too_long` it is valid and only exceeds the token limit."""

    source: str
    reason: str
    too_long: bool = False


class RecordError(UserError):
    """An invalid record; `source` says which, `reason` what is wrong and the fix."""

    see = "bad-records"

    def __init__(self, source: str, reason: str, *, too_long: bool = False):
        super().__init__(f"{source}: {reason}" if source else reason)
        self.source, self.reason, self.too_long = source, reason, too_long

    def __reduce__(self):
        # Exceptions are pickled by their message; data workers need the fields.
        return _rebuild, (self.source, self.reason, self.too_long)

    @property
    def skipped(self) -> Skipped:
        return Skipped(self.source, self.reason, self.too_long)


def _rebuild(source: str, reason: str, too_long: bool) -> RecordError:
    return RecordError(source, reason, too_long=too_long)

"""From records on disk to batches: read both spellings, open images safely, encode, collate."""

from striate.data.batch import Batch, Examples, collate
from striate.data.example import IGNORED, TOKEN_KEYS, Example, encode
from striate.data.images import open_image
from striate.data.record import ImageSource, Record, RecordError, Skipped
from striate.data.records import Records, read
from striate.data.stored import Stored

__all__ = [
    "IGNORED",
    "TOKEN_KEYS",
    "Batch",
    "Example",
    "Examples",
    "ImageSource",
    "Record",
    "RecordError",
    "Records",
    "Skipped",
    "Stored",
    "collate",
    "encode",
    "open_image",
    "read",
]

"""From records on disk to batches: read common formats, open images safely, encode, collate."""

from striate.data.batch import Batch, Examples, collate
from striate.data.example import IGNORED, Example, encode
from striate.data.images import open_image
from striate.data.lazy_records import LazyRecords
from striate.data.record import ImageSource, Record, RecordError, Skipped
from striate.data.records import Records, read
from striate.vlm.processors import TOKEN_KEYS

__all__ = [
    "IGNORED",
    "TOKEN_KEYS",
    "Batch",
    "Example",
    "Examples",
    "ImageSource",
    "LazyRecords",
    "Record",
    "RecordError",
    "Records",
    "Skipped",
    "collate",
    "encode",
    "open_image",
    "read",
]

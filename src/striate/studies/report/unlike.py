"""Differences between compared runs that are not differences in options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Notes by the first word of the digests in run.json.
MADE_FROM = {
    "data": "trained on different records from",
    "model": "from a different model than",
    "code": "by different code than",
}


def unlike(info: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Iterator[str]:
    """How two trainings differ by more than their options, from their run.json; `name` is the other run's name."""
    own, others = info.get("content"), other.get("content")
    if not own or not others:
        return
    for word, note in MADE_FROM.items():
        if _of(own, word) != _of(others, word):
            yield f"{note} {name}"
    before = other.get("versions", {})
    for package, version in info.get("versions", {}).items():
        if package != "striate" and before.get(package, version) != version:  # its code has a digest
            yield f"{package} {version}, {name} with {before[package]}"


def _of(content: Mapping[str, str], word: str) -> dict[str, str]:
    return {key: value for key, value in content.items() if key.split(" ")[0] == word}

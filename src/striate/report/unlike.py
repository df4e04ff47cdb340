"""What runs that are compared should have in common, and do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What a training is made from, by the first word of its digests in run.json.
MADE_FROM = {"data": "trained on other records than", "model": "from another model than", "code": "by other code than"}


def unlike(info: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Iterator[str]:
    """Why two trainings, as run.json tells of them, differ by more than their options; `name` is the other's."""
    own, others = info.get("content"), other.get("content")
    if not own or not others:
        return
    for word, said in MADE_FROM.items():
        if _of(own, word) != _of(others, word):
            yield f"{said} {name}"
    before = other.get("versions", {})
    for package, version in info.get("versions", {}).items():
        if package != "striate" and before.get(package, version) != version:  # its code has a digest
            yield f"{package} {version}, {name} with {before[package]}"


def _of(content: Mapping[str, str], word: str) -> dict[str, str]:
    return {key: value for key, value in content.items() if key.split(" ")[0] == word}

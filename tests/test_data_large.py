"""Large JSON lists: read by the block and kept as places, to the same records."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from striate.data import read, records
from striate.errors import UserError


def rows(number: int) -> list[dict]:
    words = ["plain", "ünïcödé 日本 😀", 'a "quote" ] [ {', "\\ and \n lines"]
    return [
        {"id": str(i), "conversations": [{"from": "human", "value": f"{i} {words[i % 4]}"},
                                         {"from": "gpt", "value": words[(i + 1) % 4]}]}
        for i in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_same_records(
    block: int, ascii_only: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.json"
    path.write_text(" \n" + json.dumps(rows(23), ensure_ascii=ascii_only, indent=indent) + "\n", encoding="utf-8")
    small = list(read(path))
    monkeypatch.setattr(records, "LARGE", 0)
    monkeypatch.setattr(records, "BLOCK", block)
    large = read(path).records
    assert list(large) == small
    assert list(large[3:9:2]) == small[3:9:2]
    assert large[-1] == small[-1]
    assert list(pickle.loads(pickle.dumps(large))) == small


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace('"id"', "id", 1)])
def test_damage_is_said(damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    path.write_text(damage(json.dumps(rows(9))))
    monkeypatch.setattr(records, "LARGE", 0)
    monkeypatch.setattr(records, "BLOCK", 16)
    with pytest.raises(UserError, match=r"data\.json: not valid JSON"):
        read(path)

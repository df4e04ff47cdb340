"""The page of `explore` and its size, and the verb: its files, its errors, the report that links it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_llava
from reporting import make_run
from test_explore_browser import exploration, sample
from test_train import write_data

from striate.errors import UserError
from striate.exploration import Attention, View, asking
from striate.exploration.layout import pool
from striate.region import Region
from striate.runs.cli import main
from striate.studies.explore import EXPLORE, explore
from striate.studies.explore.page import SIZE, Maps, coarse, pack_maps, page
from striate.studies.report import report

ONE = replace(EXPLORE, samples=1, device="cpu")


def unpack(maps: Maps, shape: tuple[int, ...]) -> torch.Tensor:
    codes = np.frombuffer(zlib.decompress(base64.b64decode(maps.data)), np.uint8)
    return torch.tensor(maps.peak * (codes / 255.0) ** 2).reshape(shape)


def test_packed_maps_are_the_values_to_half_a_step() -> None:
    views = [View(0, 0, 3, 4, 5, None)]  # with tokens that end rows
    values = torch.rand(2, 3, 15) ** 4
    maps = pack_maps(values, views, size=10_000)
    cells = pool(values, views, 1)
    assert (maps.factor, maps.peak) == (1, float(cells.max()))
    roots = unpack(maps, (2, 3, 12)).sqrt() - cells.double().sqrt()
    assert float(roots.abs().max()) <= 0.5 / 255 * maps.peak**0.5 + 1e-6
    assert unpack(pack_maps(values * 0, views, size=10_000), (2, 3, 12)).max() == 0
    assert unpack(pack_maps(values * torch.nan, views, size=10_000), (2, 3, 12)).max() == 0


def test_maps_are_averaged_until_they_fit() -> None:
    views = [View(0, 0, 12, 12, 12, None), View(0, 144, 6, 12, 12, None)]
    values = torch.rand(4, 5, 216)
    maps = pack_maps(values, views, size=1500)
    assert maps.factor > 1
    assert len(maps.data) <= 1500
    cells = pool(values, views, maps.factor)
    torch.testing.assert_close(unpack(maps, cells.shape).float(), cells, atol=0.01, rtol=0)
    again = pack_maps(pool(values, views, 2), views, factor=2, size=1500)  # cells of cells
    assert again.factor % 2 == 0
    assert len(again.data) <= 1500
    assert [(view.first, view.rows, view.columns) for view in coarse(views, 5)] == [(0, 3, 3), (9, 2, 3)]


def test_a_page_of_large_models_is_small() -> None:
    """Six samples of 576 image tokens and 40 text tokens, of 32 layers and 32 heads: 6 MB. Here, one, and 8 layers."""
    depth, heads, side, texts = 8, 32, 24, 40
    torch.manual_seed(0)
    peaked = 1.5 * torch.randn(depth, 1, texts, side**2)
    peaked[..., 100] = 7  # most attention is on one patch, as on sinks
    peaked = peaked.softmax(dim=-1)
    by_head = (peaked * torch.rand(depth, heads, texts, 1)).half()
    mean = by_head.float().mean(dim=1)
    small = sample()
    words = torch.randint(1000, (depth, side**2 + texts, 3))
    large = replace(
        small,
        attention=Attention(mean, by_head, 1),
        views=(View(0, 0, side, side, side, (0.0, 0.0, 1.0, 1.0)),),
        texts=("word",) * texts, roles=("prompt",) * texts,
        influence={"image": torch.rand(depth).double(), "text": torch.rand(depth).double()},
        lens=replace(small.lens, words=words, probabilities=torch.rand(words.shape), num_image=side**2),
    )  # fmt: skip
    explored = replace(exploration(large), depth=depth, region=None, route=None)
    whole = page(explored, numbers="explore.json", size=SIZE // 6 // 4)
    assert len(whole) < SIZE // 6 // 4 + 60_000  # of style and script
    (shown,) = data_of(whole)["samples"]
    assert shown["attention"]["factor"] <= 2
    assert shown["heads"]["factor"] <= 6  # 4 x 4 cells at least


def data_of(text: str) -> Any:
    """The data that the script of a page reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_names_its_script_and_nothing_else() -> None:
    text = page(exploration(sample()), numbers="explore.json")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a model of four layers, tuned in layer 1, and records."""
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 2)
    run = make_run(tmp_path / "run", region=None)
    pico_llava(run / "checkpoint")
    Region((1,), 4).save(run / "region.json")
    write_data(tmp_path).rename(tmp_path / "train.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_verb_writes_a_page_and_its_numbers_into_the_run_and_the_report_links_it(folder: Path) -> None:
    command = "explore run --data train.json --samples 2 --device cpu --backbone run/checkpoint"
    assert main(command.split()) == 0
    data = data_of((folder / "run/explore.html").read_text())
    numbers = json.loads((folder / "run/explore.json").read_text())
    assert data["region"] == numbers["region"] == [1]
    assert len(data["samples"]) == len(numbers["samples"]) == 2
    lesions = numbers["samples"][0]["lesions"]
    assert {one["kind"] for one in lesions} == {"bypass", "image", "revert"}
    assert not any(one["changed"] for one in lesions if one["kind"] == "revert")  # it is its own backbone
    assert main(command.split()) == 0  # a page of its own is replaced
    page = report([folder / "run"], out=folder / "pages" / "report.html", page_only=True).read_text()
    assert '<a href="../run/explore.html">layer by layer</a>' in page


def test_a_model_that_is_no_run_leaves_the_page_here(folder: Path) -> None:
    shutil.move(folder / "run/checkpoint", folder / "model")
    out = explore("model", data=folder / "train.json", region="last:2", options=ONE)
    assert out == Path("explore.html")
    assert data_of(out.read_text())["region"] == [2, 3]
    (folder / "mine.html").write_text("<p>my page</p>")
    for arguments, message in (
        ({"out": Path("mine.html")}, r"mine.html exists and is not a page of striate"),
        ({"region": "first:9"}, r"first:9"),
        ({"backbone": "nowhere"}, r"nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            explore("model", data=folder / "train.json", options=ONE, **arguments)

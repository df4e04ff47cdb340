"""Untrusted checkpoints: none of their code runs, nothing outside them is read, nothing is allocated for a lie."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from guard import BYTES, RUN_SECONDS, HangError, in_time, watched
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import striate
from striate.errors import UserError
from striate.runs.evaluating import evaluate
from striate.runs.pruning import prune
from striate.runs.reading import ReadOptions
from striate.runs.scoring import score
from striate.runs.training import tune
from striate.studies.assemble import assemble
from striate.studies.cost import cost
from striate.train import TrainOptions

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A checkpoint to corrupt."""
    return Path(shutil.copytree(model, tmp_path / "model"))


OPENERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "load": lambda model, data, out: striate.load(model, device="cpu").processor,
    "tune": lambda model, data, out: tune(
        model, data=data, out=out, options=TrainOptions(batch=2, micro_batch=2, steps=1, device="cpu")
    ),
    "score": lambda model, data, out: score(model, data=data, out=out, options=ReadOptions(samples=2, device="cpu")),
    "eval": lambda model, data, out: evaluate(model, data=data, out=out, options=ReadOptions(samples=2, device="cpu")),
    "prune": lambda model, data, out: prune(model, layers="3", out=out),
    "cost": lambda model, data, out: cost(str(model)),
    "assemble": lambda model, data, out: assemble(out=out, import_=str(model)),
}


def opened(opener: str, folder: Path, data: Path) -> str:
    """What a verb says when it opens a checkpoint; "opened" where it finds nothing wrong. Nothing but one line."""
    out = Path(tempfile.mkdtemp(dir=folder.parent)) / opener
    try:
        with in_time(RUN_SECONDS):
            OPENERS[opener](folder, data, out)
    except UserError as error:
        return str(error)
    return "opened"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


# Code


@pytest.mark.parametrize("opener", [name for name in OPENERS if name != "cost"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_opened(
    folder: Path, data: Path, opener: str, zipped: bool, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    mark = tmp_path / "ran"
    weights: dict[str, Any] = dict(load_file(folder / WEIGHTS)) | {"extra": Payload(mark)}
    (folder / WEIGHTS).unlink()
    if zipped:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    said = opened(opener, folder, data)
    note_fault("weights that run code when they are unpickled", 1, int(said != "opened" and not mark.exists()))
    assert not mark.exists()
    assert said != "opened"


@pytest.mark.parametrize("opener", OPENERS)
def test_code_beside_the_weights_is_not_run(
    folder: Path, data: Path, opener: str, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Any: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        about = json.loads((folder / file).read_text())
        about["auto_map"] = dict.fromkeys(names, "evil.Any")
        (folder / file).write_text(json.dumps(about))
    known = opened(opener, folder, data)
    about = json.loads((folder / "config.json").read_text()) | {"model_type": "evil", "architectures": ["Any"]}
    (folder / "config.json").write_text(json.dumps(about))
    unknown = opened(opener, folder, data)
    note_fault("checkpoints with code of their own (auto_map)", 2, 2 * int(not mark.exists()))
    assert not mark.exists()
    assert known == "opened" or "evil" not in known
    assert unknown != "opened"


# Files


def header(text: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(begin: int, end: int, *, shape: Any = (2,), dtype: str = "F32", name: str = "a") -> bytes:
    about = json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
    return f'"{name}": {about}'.encode()


LIES = {
    "nothing": b"",
    "half a length": b"\x08\0\0",
    "a header of 2^60 bytes": header(b"{}", length=2**60),
    "a header of 10 GB": header(b"{}", length=10**10),
    "a header that is cut": header(b'{"a": {"dtype"', length=4000),
    "no JSON": header(b"[[[[[["),
    "JSON nested 100,000 deep": header(b"[" * 100_000),
    "a tensor of 10 GB in 8 bytes": header(b"{" + tensor(0, 10**10, shape=(10**10 // 4,)) + b"}", bytes(8)),
    "a tensor larger than any memory": header(b"{" + tensor(0, 2**62, shape=(2**60,)) + b"}", bytes(8)),
    "sizes whose product runs over": header(b"{" + tensor(0, 8, shape=(2**40, 2**40)) + b"}", bytes(8)),
    "an end before the beginning": header(b"{" + tensor(8, 0) + b"}", bytes(8)),
    "two tensors in one place": header(b"{" + tensor(0, 8) + b"," + tensor(0, 8, name="b") + b"}", bytes(8)),
    "a hole": header(b"{" + tensor(0, 8) + b"," + tensor(16, 24, name="b") + b"}", bytes(24)),
    "a negative size": header(b"{" + tensor(0, 8, shape=(-2,)) + b"}", bytes(8)),
    "an unknown type": header(b"{" + tensor(0, 8, dtype="X7") + b"}", bytes(8)),
    "more behind its end": header(b"{" + tensor(0, 8) + b"}", bytes(4000)),
}


def test_headers_that_lie(folder: Path, data: Path, note_fault: Callable[..., None]) -> None:
    wrong = []
    for name, body in LIES.items():
        (folder / WEIGHTS).write_bytes(body)
        with watched(folder) as watch:
            said = opened("load", folder, data)
        if WEIGHTS not in said or watch.grown > BYTES:
            wrong.append(f"{name}: {said}")
    note_fault("safetensors files that lie about what they hold", len(LIES), len(LIES) - len(wrong))
    assert wrong == []


@pytest.mark.parametrize("opener", OPENERS)
def test_links_out_of_the_folder_are_not_followed(
    folder: Path, data: Path, opener: str, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    secret = tmp_path / "secret"
    survived, plainly = [], ""
    for file in sorted(folder.iterdir()):
        shutil.move(file, secret)
        file.symlink_to(secret)
        survived.append("is a link that points outside its folder" in opened(opener, folder, data))
        if file.name == WEIGHTS and AutoModelForImageTextToText.from_pretrained(folder):
            plainly = "follows them"
        file.unlink()
        shutil.move(secret, file)
    note_fault("checkpoints with links to files elsewhere", len(survived), sum(survived), trainer=plainly)
    assert all(survived)


def test_links_within_the_cache_of_the_hub_are_followed(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--llava"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, cached / "blobs" / f"of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/of-{file.name}")
    assert striate.load(snapshot, device="cpu").depth == 4


def test_an_index_that_leads_out_of_the_folder(folder: Path, data: Path, tmp_path: Path) -> None:
    shutil.move(folder / WEIGHTS, tmp_path / "secret.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "secret.safetensors"), "../secret.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for opener in OPENERS:
        assert "points outside its folder" in opened(opener, folder, data)


# Configs


@contextmanager
def changed(file: Path, place: tuple[str, ...], value: Any) -> Iterator[None]:
    """A config with one entry changed."""
    before = file.read_text()
    about = json.loads(before)
    holder = about
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    file.write_text(json.dumps(about))
    try:
        yield
    finally:
        file.write_text(before)


ABSURD: list[tuple[tuple[str, ...], Any]] = [
    (("text_config", "hidden_size"), 10**7),
    (("text_config", "num_hidden_layers"), 10**6),
    (("text_config", "num_hidden_layers"), 10**30),
    (("vision_config", "num_hidden_layers"), 10**9),
    (("text_config", "vocab_size"), 10**12),
    (("text_config", "vocab_size"), 10**30),
    (("text_config", "intermediate_size"), 10**11),
    (("text_config", "hidden_size"), -32),
    (("text_config", "hidden_size"), 0),
    (("text_config", "num_attention_heads"), 0),
    (("text_config", "hidden_size"), "32 or so"),
    (("text_config",), []),
    (("text_config",), None),
    (("vision_config", "image_size"), 10**9),
    (("vision_config", "patch_size"), 0),
    (("model_type",), ["llava"]),
    (("model_type",), "../../llava"),
]


@pytest.mark.parametrize("opener", ["load", "tune", "prune", "cost"])
def test_absurd_sizes(folder: Path, data: Path, opener: str, note_fault: Callable[..., None]) -> None:
    wrong = []
    for place, value in ABSURD:
        with changed(folder / "config.json", place, value), watched(folder) as watch:
            said = opened(opener, folder, data)
        # Says what it would take; no text_config is LLaVA's own, of 7B.
        priced = opener == "cost" and (value is None or (isinstance(value, int) and value > 0))
        if (said == "opened" and not priced) or watch.grown > BYTES:
            wrong.append((place, value, said))
    note_fault("configs with absurd sizes", len(ABSURD), len(ABSURD) - len(wrong))
    assert wrong == []


def test_a_model_larger_than_this_machine_is_rejected_with_its_size(folder: Path, data: Path) -> None:
    with changed(folder / "config.json", ("text_config", "vocab_size"), 10**12):
        assert "its weights take 256,000 GB, and this machine has" in opened("load", folder, data)
    with changed(folder / "config.json", ("text_config", "num_hidden_layers"), 10**6):
        assert "its config has num_hidden_layers 1,000,000, which is out of range" in opened("load", folder, data)


def test_json_nested_without_end(folder: Path, data: Path) -> None:
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        before = (folder / file).read_bytes()
        (folder / file).write_text('{"a":' * 100_000)
        assert opened("load", folder, data) != "opened"
        (folder / file).write_bytes(before)


# Chance


def test_corrupted_checkpoints(
    model: Path, data: Path, tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    draw, number, wrong, read = random.Random(2), amount(60, 1000), [], 0
    files = sorted(file.name for file in model.iterdir())
    with watched(tmp_path) as watch:
        for index in range(number):
            folder = tmp_path / "model"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
            file = folder / draw.choice(files)
            file.write_bytes(corrupt_json(file, draw) if draw.random() < 0.5 else corrupt(file.read_bytes(), draw))
            try:
                read += opened("load", folder, data) == "opened"
            except (Exception, HangError) as error:
                wrong.append(f"{index}, {file.name}: {type(error).__name__}: {error}"[:300])
    note_fault("checkpoints with a corrupted file", number, number - len(wrong))
    assert wrong == []
    assert watch.grown < BYTES
    assert 0 < read < number


def corrupt(body: bytes, draw: random.Random) -> bytes:
    """Bytes turned over, left out, put in; the header of weights above all."""
    changed = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(changed), 4000) or 1)
        match draw.randrange(4):
            case 0 if changed:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + draw.randint(1, 64)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randint(1, 16))
            case 3:
                del changed[draw.randrange(len(changed) or 1) :]
    return bytes(changed)


ODD: list[Any] = [None, True, -1, 0, 1.5, 10**20, "", "\0", "x" * 5000, [], {}, [None], {"a": []}, "../x", "evil.Any"]


def corrupt_json(file: Path, draw: random.Random) -> bytes:
    """One value in a file of JSON replaced; another file is corrupted byte by byte."""
    try:
        about = json.loads(file.read_bytes())
    except ValueError:
        return corrupt(file.read_bytes(), draw)
    holder, keys = about, list(about)
    while True:
        key = draw.choice(keys)
        inner = holder[key]
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys or draw.random() < 0.4:
            holder[key] = draw.choice(ODD)
            return json.dumps(about).encode()
        holder = inner

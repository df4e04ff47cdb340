"""How far the layers moved from the backbone: by hand, streamed against in memory, and backbones that do not match."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from pico import DEPTH, pico_llava
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import striate
import striate.weights as stored_weights
from striate.errors import UserError
from striate.runs.run import Run
from striate.scores import weights
from striate.scores.backbone import Backbone
from striate.scores.table import Score
from striate.scores.weights import (
    FORMULAS,
    METRICS,
    StoredLayers,
    parameter_change,
    signal_scores,
    signal_share,
    weight_angle,
    weight_scores,
)

TEXT = {key: value for key, value in pico.FAMILIES["llava"]["text_config"].items() if key != "model_type"}


def language_model(folder: Path, seed: int = 1, **changes: Any) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**TEXT, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return pico_llava(tmp_path / "llava")


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return language_model(tmp_path / "llm", vocab_size=50)


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


def test_parameter_change_by_hand() -> None:
    base = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # norm 5
    assert parameter_change(base + torch.tensor([[0.0, 0.6], [0.8, 0.0]]), base) == pytest.approx(0.2)
    assert parameter_change(2 * base, base) == pytest.approx(1.0)
    assert parameter_change(base, base) == 0.0
    assert parameter_change(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert parameter_change(base, torch.zeros(2, 2)) == math.inf


def test_weight_angle_by_hand() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert weight_angle(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), one) == pytest.approx(0.25)
    assert weight_angle(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), one) == pytest.approx(0.5)
    assert weight_angle(-3 * one, one) == pytest.approx(1.0)
    assert weight_angle(5 * one, one) == 0.0
    assert weight_angle(0 * one, 0 * one) == 0.0
    # Where arccos of the cosine is all rounding: its derivative at 1 is infinite.
    small = torch.tensor([[1.0, 1e-9], [0.0, 0.0]], dtype=torch.float64)
    assert weight_angle(small, one.double()) == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_chunks_and_narrow_numbers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.randn(3, 37, 11), torch.randn(3, 37, 11).to(torch.bfloat16)
    whole = parameter_change(one, other), weight_angle(one, other)
    a, b = one.double().flatten(), other.double().flatten()
    assert whole[0] == pytest.approx(float((a - b).norm() / b.norm()))
    assert whole[1] == pytest.approx(math.acos(float(a @ b / (a.norm() * b.norm()))) / math.pi)
    monkeypatch.setattr(weights, "CHUNK", 100)
    assert (parameter_change(one, other), weight_angle(one, other)) == pytest.approx(whole, rel=1e-12)


def in_memory(tuned: dict[str, Tensor], base: dict[str, Tensor], mark: str) -> dict[str, list[float]]:
    """Both scores in plain loops; `mark` is what the decoder's layers are called in `tuned`."""
    found = {name: [0.0] * DEPTH for name in FORMULAS}
    for name, weight in base.items():
        if name.startswith("model.layers.") and weight.dim() > 1:
            layer = int(name.split(".")[2])
            a, b = tuned[name.replace("model.layers", mark)].double().flatten(), weight.double().flatten()
            found["parameter_change"][layer] += float((a - b).norm() / b.norm())
            found["weight_angle"][layer] += math.acos(float(a @ b / (a.norm() * b.norm()))) / math.pi
    return found


def test_streamed_equals_in_memory_whatever_the_shards(tuned: Path, backbone: Path) -> None:
    names = load_file(tuned / "model.safetensors")
    mark = next(name for name in names if "language_model" in name and "layers.0." in name).partition(".0.")[0]
    expected = in_memory(names, load_file(backbone / "model.safetensors"), mark)
    for folder in (tuned, backbone):
        found = by_name(weight_scores(tuned, backbone))
        assert set(found) == set(FORMULAS)
        for name, score in found.items():
            assert score.values == pytest.approx(expected[name], rel=1e-9)
            assert (score.stderr, score.n, score.source) == (None, 0, METRICS[name].source)
        shard(folder)
    assert len(list(tuned.glob("*.safetensors"))) > 3
    assert by_name(weight_scores(tuned, backbone))["weight_angle"].values == pytest.approx(expected["weight_angle"])
    (score,) = weight_scores(tuned, backbone, names=["parameter_change"])
    assert score.values == pytest.approx(expected["parameter_change"])


def shard(folder: Path) -> None:
    """The same checkpoint in four files with an index."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{number % 4 + 1:05}-of-00004.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()


def test_two_tensors_are_in_memory_at_a_time(tuned: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, reader = 0, stored_weights._reader

    def read(file: Path, name: str) -> Tensor:
        nonlocal most
        tensor = reader(file, name)()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in alive))
        return tensor

    monkeypatch.setattr(stored_weights, "_reader", lambda file, name: partial(read, file, name))
    weight_scores(tuned, backbone)
    assert len(alive) == 2 * 7 * DEPTH  # matrices of the decoder's layers, and nothing else
    assert most == 2


def test_a_model_did_not_move_from_itself(tuned: Path) -> None:
    found = weight_scores(tuned, tuned)
    assert [score.name for score in found] == list(FORMULAS)
    assert [score.values for score in found] == [(0.0,) * DEPTH] * len(FORMULAS)


def test_any_checkpoint_of_the_family_is_a_backbone(tuned: Path, backbone: Path, tmp_path: Path) -> None:
    expected = weight_scores(tuned, backbone)
    tensors = load_file(backbone / "model.safetensors")
    for prefix in ("", "language_model.", "model.language_"):
        other = tmp_path / f"other-{prefix}"
        other.mkdir()
        renamed = {prefix + name: tensor for name, tensor in tensors.items()}
        # What a tower and an old checkpoint bring along; the tower here has more layers than the decoder.
        renamed |= {f"vision_tower.encoder.layers.{n}.mlp.gate_proj.weight": torch.ones(2, 2) for n in range(9)}
        renamed |= {f"{prefix}model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(DEPTH)}
        save_file(renamed, other / "model.safetensors")
        assert weight_scores(tuned, other) == expected
        assert weight_scores(other, backbone)[0].values == (0.0,) * DEPTH
    run = Run.create(tmp_path / "run", verb="tune", options={})
    run.checkpoint.symlink_to(tuned)
    assert weight_scores(run.path, backbone) == expected


def test_tower_layers_are_left_aside(tmp_path: Path) -> None:
    for family in pico.FAMILIES:
        model = pico.pico(family)
        model.save_pretrained(tmp_path / family)
        stored = StoredLayers.open(tmp_path / family)
        assert stored.depth == DEPTH
        own = model.get_decoder().layers[1].state_dict()
        assert {name: one.shape for name, one in stored.layers[1].items()} == {
            name: tuple(tensor.shape) for name, tensor in own.items()
        }, family


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"bad has 3 decoder layers, the model 4: not its backbone$"),
        (
            {"intermediate_size": 48},
            r"bad: model.layers.0.mlp.down_proj.weight is 32 x 48, the model's is 32 x 64: it is not this",
        ),
    ],
)
def test_a_backbone_of_another_shape(tuned: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weight_scores(tuned, language_model(tmp_path / "bad", **changes))


def test_broken_and_missing_checkpoints(tuned: Path, backbone: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path = backbone) -> None:
        with pytest.raises(UserError, match=message):
            weight_scores(tuned, folder)

    refused("gone is not a model folder", tmp_path / "gone")
    tensors = load_file(backbone / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.layers.2.mlp.up_proj.weight"}
    save_file(lacking, backbone / "model.safetensors")
    refused(r"llm has no mlp.up_proj.weight in layer 2: it is not this model's backbone$")
    for layer in (0, 2):
        some = {name: tensor for name, tensor in tensors.items() if f"layers.{layer}." not in name}
        save_file(some, backbone / "model.safetensors")
        refused(rf"llm has weights of layer 3, but none of layer {layer}$")
    save_file({"lm_head.weight": torch.ones(2, 2)}, backbone / "model.safetensors")
    refused("llm has no decoder layers")
    (backbone / "model.safetensors").write_bytes(b"no tensors at all")
    refused(r"cannot read .*model.safetensors: ")
    (backbone / "model.safetensors").unlink()
    refused("llm has no model.safetensors: weights are read from safetensors only")
    (backbone / "model.safetensors.index.json").write_text("{")
    refused("cannot read .*index.json")


@pytest.mark.parametrize(("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantized_matrices_are_refused(tuned: Path, backbone: Path, dtype: torch.dtype, code: str) -> None:
    vlm, tensors = striate.load(tuned), load_file(backbone / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    mask = {f"model.layers.{layer}.self_attn.bias": torch.ones(2, 2, dtype=torch.uint8) for layer in range(DEPTH)}
    save_file(tensors | mask, backbone / "model.safetensors")  # of an old checkpoint: no weight
    expected = weight_scores(tuned, tuned), weight_scores(tuned, backbone), signal_scores(backbone)
    assert all(expected)
    save_file(tensors | {name: tensors[name].to(dtype)}, backbone / "model.safetensors")
    uses = (
        lambda: weight_scores(tuned, backbone), lambda: weight_scores(backbone, tuned),
        lambda: signal_scores(backbone), lambda: Backbone(vlm, backbone),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(UserError, match=rf"llm: {name} is stored as {code}, quantized: give the checkpoint before"):
            use()


def test_signal_share_against_singular_values_of_numpy() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(60, 40))
    spiked = noise + 30 * np.outer(np.ones(60), np.ones(40)) / np.sqrt(60 * 40)
    for matrix, above in ((noise, 0), (spiked, 1), (np.eye(60, 40), 0)):
        edge = np.sqrt((matrix**2).mean()) * (np.sqrt(matrix.shape[0]) + np.sqrt(matrix.shape[1]))
        values = np.linalg.svd(matrix, compute_uv=False)
        assert (values > edge).sum() == above
        found = signal_share(torch.tensor(matrix, dtype=torch.float32))
        assert found == signal_share(torch.tensor(matrix.T.copy())) == above / len(values)
    assert signal_share(torch.tensor(np.stack([noise, spiked]))) == 1 / 80  # two experts
    assert signal_share(torch.zeros(3, 4)) == 0


def test_signal_by_module_and_layer(backbone: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    with torch.no_grad():  # a strong direction is above the edge of the random ones
        model.model.layers[2].mlp.down_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "spiked")
    found = signal_scores(tmp_path / "spiked")
    assert set(found.parts) == {"attention", "mlp", "gate_up", "down", "qkv", "o"}
    assert found.parts["down"][2] == 1 / 32
    for layer in range(DEPTH):
        weights_of = dict(model.model.layers[layer].named_parameters())
        shares = {name: signal_share(weight.data) for name, weight in weights_of.items() if weight.dim() == 2}
        assert found.values[layer] == pytest.approx(sum(shares.values()) / 7)
        assert found.parts["gate_up"][layer] == pytest.approx(
            (shares["mlp.gate_proj.weight"] + shares["mlp.up_proj.weight"]) / 2
        )
    assert Score.from_json("snr", json.loads(json.dumps(found.to_json()))) == found
    assert found.stderr is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_not_on_disk_any_more_is_refused(tuned: Path, backbone: Path, dtype: str) -> None:
    vlm = striate.load(tuned, dtype=dtype)
    score = partial(striate.score, vlm, metrics="weight_angle", backbone=str(backbone))
    assert score().depth == DEPTH
    with torch.no_grad():
        vlm.layers[2].mlp.up_proj.weight[0, 0] += 1  # as by a training
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight of layer 2 .* save the model, and load it"):
        score()
    del vlm.layers[2]
    with pytest.raises(UserError, match="4 decoder layers, the model in memory 3: save the model, and load it"):
        score()
    with pytest.raises(UserError, match="was not loaded from one: save the model, and load it"):
        striate.score(replace(vlm, source=""), metrics="snr")


def test_signal_of_broken_weights_is_one_line(backbone: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or Inf"):
        signal_scores(tmp_path / "nan")

"""The matrices of a region's layers by role: which train, in every family, and that nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import DEPTH, FAMILIES, pico, pico_more
from training import OPTIONS, changed, tune, weights

import striate
from striate.region import Region
from striate.runs import training
from striate.runs.cli import main
from striate.train.adapter import adapt
from striate.vlm import Vlm, select
from striate.vlm.modules import MODULES, parse_modules, role_of

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WORDS = {
    "attention": ATTENTION,
    "qkv": ATTENTION[:3],
    "o": ATTENTION[3:],
    "mlp": MLP,
    "gate_up": MLP[:2],
    "down": MLP[2:],
    "o,down": (ATTENTION[3], MLP[2]),
}


def inside(vlm: Vlm, modules: str, layer: int = 1) -> set[str]:
    """The modules of a layer that a selection trains, by their names within it."""
    prefix = f"{vlm.parts.layers}.{layer}."
    names = select(vlm, Region((layer,), vlm.depth), modules=modules, projector=False).names
    assert all(name.startswith(prefix) for name in names)
    return {name.removeprefix(prefix).removesuffix(".weight").removesuffix(".bias") for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_a_family(family: str) -> None:
    vlm = Vlm.of(pico(family))
    for modules, names in WORDS.items():
        assert inside(vlm, modules) == set(names), modules
        targets = vlm.linear_modules(Region((1,), DEPTH), modules)
        assert {name.partition(".layers.1.")[2] for name in targets} == set(names)
    everything = {name.rpartition(".")[0] for name, _ in vlm.layers[1].named_parameters()}
    assert inside(vlm, "all") == everything > inside(vlm, "attention,mlp")  # norms train with all alone


def test_a_fused_matrix_has_one_role() -> None:
    vlm = Vlm.of(pico_more("llava_phi3"))
    assert inside(vlm, "qkv") == {"self_attn.qkv_proj"}
    assert inside(vlm, "gate_up") == {"mlp.gate_up_proj"}


def test_experts_are_mlps_and_their_router_is_not() -> None:
    vlm = Vlm.of(pico_more("qwen3_5_moe"))
    own = {"mlp.experts.gate_up_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
    assert inside(vlm, "gate_up") == own
    assert inside(vlm, "mlp") == own | {"mlp.experts.down_proj", "mlp.shared_expert.down_proj"}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("linear_attn.in_proj_qkv.weight", "qkv"),
        ("linear_attn.in_proj_z.weight", "attention gate"),
        ("self_attn.gate_proj.weight", "attention gate"),
        ("attention.output.dense.bias", "o"),
        ("output.dense.weight", "down"),
        ("self_attn.q_norm.weight", None),
        ("mlp.gate.weight", None),
        ("feed_forward.w3.weight", "gate_up"),
    ],
)
def test_role_of(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_a_layer_without_attention_trains_what_it_has() -> None:
    vlm = Vlm.of(pico_more("lfm2_vl"))  # convolutions in layers 0 and 2
    plan = select(vlm, "all", modules="qkv", projector=False)
    assert {int(name.split(".layers.")[1].partition(".")[0]) for name in plan.names} == {1, 3}
    with pytest.raises(striate.UserError, match="--modules qkv: these layers of lfm2_vl have no such matrices; they"):
        select(vlm, "0,2", modules="qkv")


@pytest.mark.parametrize(
    ("text", "message"),
    [("gate-up", "--modules 'gate-up'; nearest: gate_up"), ("", "is empty"), (" , ", "is empty")],
)
def test_bad_modules_are_one_line(text: str, message: str) -> None:
    with pytest.raises(striate.UserError, match=message) as caught:
        parse_modules(text)
    assert "\n" not in str(caught.value)


def test_modules_in_any_order_are_the_same() -> None:
    assert parse_modules("down , attention") == parse_modules("attention,down,down") == "attention,down"
    assert parse_modules("mlp,all") == "all"
    assert MODULES["mlp"] == MODULES["gate_up"] | MODULES["down"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_exactly_these_tensors_change(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    run = tune(model, data, tmp_path / "run", OPTIONS, method=method, modules="gate_up", rank=4, projector="freeze")
    expected = {f"model.language_model.layers.{layer}.{name}.weight" for layer in (1, 3) for name in MLP[:2]}
    assert changed(weights(model), weights(run.path)) == expected
    assert json.loads((run.path / "region.json").read_text())["modules"] == "gate_up"
    assert json.loads((run.checkpoint / "region.json").read_text())["modules"] == "gate_up"
    assert "trained the gate_up matrices of 2 decoder layers" in (run.checkpoint / "README.md").read_text()
    assert run.info["options"]["modules"] == "gate_up"
    assert run.info["training"]["groups"].keys() == {"layers"}


def test_all_modules_are_the_whole_layers(model: Path, data: Path, tmp_path: Path) -> None:
    vlm = striate.load(model)
    region = Region.parse("1,3", vlm.depth)
    prefixes = tuple(f"{vlm.parts.layers}.{layer}." for layer in region)
    assert select(vlm, region, modules="all", projector=False).names == tuple(
        name for name, _ in vlm.model.named_parameters() if name.startswith(prefixes)
    )
    whole = tune(model, data, tmp_path / "whole", OPTIONS)
    assert "modules" not in json.loads((whole.path / "region.json").read_text())
    parts = tune(model, data, tmp_path / "parts", OPTIONS, modules="attention,mlp")
    norms = changed(weights(model), weights(whole.path)) - changed(weights(model), weights(parts.path))
    assert norms
    assert all("layernorm" in name for name in norms)


def test_the_library_counts_what_it_trains(model: Path, data: Path) -> None:
    vlm = striate.load(model)
    o_proj = sum(torch.numel(layer.self_attn.o_proj.weight) for layer in vlm.layers)  # type: ignore[union-attr, arg-type]
    trained = striate.tune(
        vlm, striate.read(data), region="all", modules="o", method="full", projector="freeze",
        options=replace(OPTIONS, steps=1),
    )  # fmt: skip
    assert trained.modules == "o"
    assert trained.groups == {"layers": o_proj}


def test_adapters_of_modules_the_layers_lack_are_refused() -> None:
    vlm = Vlm.of(pico_more("llama4"))  # experts in one tensor have no linear modules
    _, groups = adapt(vlm, Region.parse("1", vlm.depth), projector=False, modules="attention")
    assert all("self_attn" in name for name in groups["layers"])
    with pytest.raises(striate.UserError, match="has no linear modules of --modules qkv to adapt"):
        striate.lora_config(Vlm.of(pico_more("lfm2_vl")), Region((0,), DEPTH), modules="qkv")


def test_the_plan_names_the_modules(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--region", "1,3", "--modules", "gate_up"]) == 0
    vlm = striate.load(model)
    number = sum(torch.numel(vlm.layers[0].get_submodule(name).weight) for name in MLP[:2]) * 2  # type: ignore[arg-type]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trains: layers"))
    assert f"{number:,}" in line
    assert "gate_up" in line


def test_unknown_modules_stop_before_any_work(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(striate.UserError, match="--modules 'attn'"):
        training.tune(model, data=data, out=tmp_path / "run", modules="attn", options=OPTIONS)
    assert not (tmp_path / "run").exists()

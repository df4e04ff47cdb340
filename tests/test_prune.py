"""Pruning: bypass, cut, reload agree; surgery streams and carries all along; nothing half done is left behind."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico as pico_module
import pytest
import torch
from pico import DEPTH, pico, pico_llava, pico_more, pico_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import striate
from striate import weights
from striate.data.lazy_records import RecordLocation
from striate.errors import UserError
from striate.prune import Numbering, Surgery, bypass, cut, cut_checkpoint, drop_layers
from striate.prune.choice import blocks
from striate.prune.proof import observe, verify_cut
from striate.region import Region
from striate.runs.cli import main
from striate.runs.pruning import prune
from striate.runs.run import Run
from striate.runs.training import tune
from striate.train import TrainOptions
from striate.vlm import Vlm, load
from striate.weights import INDEX, WEIGHTS, file_tensors

OPTIONS = TrainOptions(batch=4, micro_batch=4, steps=2, device="cpu", dtype="float32")
LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_llava(tmp_path_factory.mktemp("pico") / "llava")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Pico\n")
    (folder / "LICENSE").write_text("as you like")
    (folder / "old_weights.bin").write_bytes(b"stale")
    return folder


def pruned(model: Path, out: Path, **settings: Any) -> Run:
    prune(model, out=out, **{"region": "0,3", "layers": "1", "options": OPTIONS, **settings})
    return Run.open(out)


def numbering(*layers: int, depth: int = DEPTH) -> Numbering:
    return Numbering(Region(layers, depth))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What stays, by its new number.


def test_old_and_new_numbers() -> None:
    numbers = numbering(1, 4, depth=6)
    assert numbers.new == {0: 0, 2: 1, 3: 2, 5: 3}
    assert numbers.of(Region((0, 1, 5), 6)) == Region((0, 3), 4)
    assert numbers.neighbors == Region((0, 1, 2, 3), 4)
    assert numbering(0, depth=6).neighbors == Region((0,), 5)
    assert numbering(5, depth=6).neighbors == Region((4,), 5)
    with pytest.raises(UserError, match="4 of 4 layers cannot be cut"):
        numbering(0, 1, 2, 3)


def test_every_field_of_a_config_with_one_value_per_layer() -> None:
    settings = {
        "n_layer": 6, "layer_types": list("abcdef"), "no_rope_layers": (1, 1, 1, 0, 1, 0), "moe_layers": [1, 3, 5],
        "kv_source_layers": [0, 0, 2, 2, 2, 5], "first_k_dense_replace": 2, "max_window_layers": 9,
        "hybrid_override_pattern": "M-M*-E", "eos_token_id": [1, 2, 3, 4, 5, 6], "hidden_size": 6,
        "mrope_section": [1, 1, 2], "torch_dtype": "float6",
    }  # fmt: skip
    assert numbering(1, 4, depth=6).renumber(settings, "n_layer") == {
        "n_layer": 4, "layer_types": list("acdf"), "no_rope_layers": [1, 1, 0, 0], "moe_layers": [2, 3],
        "kv_source_layers": [0, 1, 1, 3], "first_k_dense_replace": 1, "max_window_layers": 7,
        "hybrid_override_pattern": "MM*E",
    }  # fmt: skip


# Bypass and cut.


def test_a_bypass_is_the_identity_and_ends() -> None:
    vlm, prompts = Vlm.of(pico_more("llava_llama")), pico_prompts("llava_llama")
    before = observe(vlm, prompts)
    with bypass(vlm, range(vlm.depth)), torch.no_grad():
        ids = prompts["text"]["input_ids"]
        states = vlm.model.model.language_model(ids).last_hidden_state
        embedded = vlm.model.model.language_model.norm(vlm.model.get_input_embeddings()(ids))
        assert torch.equal(states, embedded)
    after = observe(vlm, prompts)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layers", [[-1], [4], Region((1,), 30)])
def test_layers_of_another_model_are_neither_bypassed_nor_dropped(layers: Any) -> None:
    vlm = Vlm.of(pico_more("llava_llama"))
    with pytest.raises(UserError, match=r"does not exist|30 decoder layers, this model has 4"):
        bypass(vlm, layers)
    with pytest.raises(UserError, match=r"does not exist|30 decoder layers, this model has 4"):
        drop_layers(vlm, layers)
    assert vlm.depth == 4


def test_a_verification_reads_no_more_records_than_it_uses(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, records, read = striate.load(model), striate.read(data), []
    own = RecordLocation.record
    monkeypatch.setattr(RecordLocation, "record", lambda place: read.append(place.number) or own(place))
    drop_layers(vlm, [1], verify=records)
    assert read == [1]  # of eight, all with an image


def test_what_a_cut_changes_in_the_model() -> None:
    vlm = Vlm.of(pico_more("llava_gemma2", depth=6))
    kept = [vlm.layers[layer] for layer in (1, 2, 4)]
    kinds = list(vlm.model.config.text_config.layer_types)
    cut(vlm, numbering(0, 3, 5, depth=6))
    assert list(vlm.layers) == kept
    assert [layer.self_attn.layer_idx for layer in vlm.layers] == [0, 1, 2]
    assert vlm.model.config.text_config.num_hidden_layers == 3
    assert vlm.model.config.text_config.layer_types == [kinds[layer] for layer in (1, 2, 4)]


# Surgery on disk.


def surgery(source: Path, *layers: int) -> Surgery:
    vlm = load(source, device="cpu")
    return Surgery.of(vlm, source, numbering(*layers, depth=vlm.depth))


def test_all_files_but_weights_and_config_are_copied(model: Path, tmp_path: Path) -> None:
    before = content(model)
    surgery(model, 1, 2).write(model, tmp_path / "cut")
    assert content(model) == before
    after = content(tmp_path / "cut")
    assert before.keys() - after.keys() == {"old_weights.bin"}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"config.json", "model.safetensors"}
    assert AutoProcessor.from_pretrained(tmp_path / "cut").chat_template


def renamed(weights: dict[str, torch.Tensor], stem: str, numbers: Numbering) -> dict[str, torch.Tensor]:
    """By another way than the library's."""
    found = {}
    for name, tensor in weights.items():
        number, _, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem):
            found[name] = tensor
        elif int(number) in numbers.new:
            found[f"{stem}{numbers.new[int(number)]}.{rest}"] = tensor
    return found


@pytest.mark.parametrize("name", ["llava_llama", "llava_qwen2"])  # the second has a tied head
@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_tensors_are_the_same_to_the_bit(name: str, size: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "cut"
    pico_more(name).to(torch.bfloat16).save_pretrained(source, max_shard_size=size)
    operation = surgery(source, 0, 2)
    operation.write(source, target)
    shards = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in (source, target)]
    assert set(shards[1]) <= set(shards[0])
    assert (len(shards[0]) > 1) == (size == "20KB")
    weights = [{k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()} for folder in
               (source, target)]  # fmt: skip
    expected = renamed(weights[0], operation.stem, operation.numbers)
    assert weights[1].keys() == expected.keys()
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in expected.items())
    assert {tensor.dtype for tensor in weights[1].values()} == {torch.bfloat16}
    if len(shards[0]) > 1:
        index = json.loads((target / INDEX).read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        loaded = AutoModelForImageTextToText.from_pretrained(target, dtype="auto")
        assert index["metadata"]["total_parameters"] == loaded.num_parameters()


def test_a_sharded_checkpoint_is_proved_and_cut(tmp_path: Path) -> None:
    pico_more("llava_qwen2").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    prompts = pico_prompts("llava_qwen2")
    cut_checkpoint(tmp_path / "source", tmp_path / "cut", numbering(0, 2), prompts=prompts, options=OPTIONS)
    assert load(tmp_path / "cut").depth == 2


def test_a_checkpoint_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}  # its blocks have 64 numbers in 32 rows
    monkeypatch.setattr(pico_module, "_TEXT", {**pico_module._TEXT, **wide, "head_dim": 16})
    monkeypatch.setitem(pico_module.FAMILIES["llava"], "vision_config", {**pico_module._SIGLIP, **wide})
    source, packed = pico_llava(tmp_path / "source"), tmp_path / "packed"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    whole = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config, device_map="cpu")
    whole.save_pretrained(packed)
    AutoProcessor.from_pretrained(source).save_pretrained(packed)
    smaller = load(pruned(packed, tmp_path / "run").path).model
    kept = smaller.model.language_model.layers[1].mlp.up_proj.weight
    before = whole.model.language_model.layers[2].mlp.up_proj.weight
    assert kept.dtype == torch.uint8
    assert torch.equal(kept, before)


def test_packed_weights_keep_their_companions(model: Path, tmp_path: Path) -> None:
    # As bitsandbytes writes them: odd shapes, bytes, and names of modules in the config.
    source = tmp_path / "source"
    shutil.copytree(model, source)
    weights = load_file(source / WEIGHTS)
    stem = surgery(model, 1).stem
    packed = f"{stem}3.mlp.up_proj.weight"
    weights |= {packed: torch.zeros(7, 1, dtype=torch.uint8), f"{packed}.absmax": torch.rand(3),
                f"{packed}.quant_state.bitsandbytes__nf4": torch.arange(5, dtype=torch.uint8)}  # fmt: skip
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    skipped = ["lm_head", f"{stem}1.mlp", f"{LAYERS}2.mlp", "model.vision_tower.encoder.layers.2.mlp"]
    config["quantization_config"] = {"llm_int8_skip_modules": skipped, "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    surgery(model, 1).write(source, tmp_path / "cut")
    found = load_file(tmp_path / "cut" / WEIGHTS)
    moved = {key: key.replace("layers.3", "layers.2") for key in weights if key.startswith(packed)}
    assert len(moved) == 3
    assert all(torch.equal(found[new], weights[old]) for old, new in moved.items())
    with safe_open(tmp_path / "cut" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    quantized = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]
    assert quantized["llm_int8_skip_modules"] == ["lm_head", f"{LAYERS}1.mlp", skipped[3]]


def test_layers_above_the_last_stay_above_it(model: Path) -> None:
    operation = surgery(model, 1, 2)
    assert operation.rename(f"{operation.stem}4.mlp") == f"{operation.stem}2.mlp"  # multi-token prediction
    assert operation.rename("model.vision_tower.encoder.layers.1.mlp") == "model.vision_tower.encoder.layers.1.mlp"


def test_a_config_with_all_fields_at_the_top(tmp_path: Path) -> None:
    # Qwen2-VL as it is on the hub: no text_config.
    source = tmp_path / "source"
    pico("qwen2_vl").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    (source / "config.json").write_text(json.dumps({**text, **config, "max_window_layers": 4}))
    vlm = load(source, device="cpu")
    assert vlm.depth == DEPTH
    edited = Surgery.of(vlm, source, numbering(0, 1)).edit({**text, **config, "max_window_layers": 4})
    assert (edited["num_hidden_layers"], edited["max_window_layers"]) == (2, 2)
    assert len(edited["layer_types"]) == 2
    assert "text_config" not in edited
    # As some are: both at the top and in a part of its own, which then counts.
    both = Surgery.of(vlm, source, numbering(0, 1)).edit({**config, "num_hidden_layers": 4, "text_config": text})
    assert both["num_hidden_layers"] == both["text_config"]["num_hidden_layers"] == 2
    assert "layer_types" not in both


def test_memory_does_not_grow_with_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 1 << 16)
    (tmp_path / "cut").mkdir()
    save_file({f"layers.{n}.w": torch.rand(1 << 20) for n in range(4)}, tmp_path / WEIGHTS)  # 4 MB each
    tracemalloc.start()
    try:
        weights.copy(tmp_path, tmp_path / "cut", lambda name: None if name == "layers.1.w" else name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 19
    assert len(load_file(tmp_path / "cut" / WEIGHTS)) == 3


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.rand(100)}, tmp_path / "short.safetensors")
    whole = (tmp_path / "short.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cannot read .*short\.safetensors: "):
        file_tensors(tmp_path / "short.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UserError, match=r"cannot read .*text\.safetensors: "):
        file_tensors(tmp_path / "text.safetensors")


# The proof.


def test_a_wrong_cut_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    vlm, prompts = Vlm.of(pico_more("llava_gemma2", depth=6, layer_types=kinds)), pico_prompts("llava_gemma2")

    def careless(vlm: Vlm, numbers: Numbering) -> None:
        """As the paper's released code does it."""
        for layer in reversed(numbers.removed.layers):
            del vlm.layers[layer]

    monkeypatch.setattr("striate.prune.proof.cut", careless)
    with pytest.raises(UserError, match=r"layers 0 cannot be cut from this llava model: .*; nothing was written"):
        verify_cut(vlm, numbering(0, depth=6), prompts)


@pytest.mark.parametrize("corrupt", ["weights", "config"])
def test_a_proof_that_fails_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrupt: str
) -> None:
    write = Surgery.write

    def corrupted(self: Surgery, source: Path, folder: Path) -> None:
        if corrupt == "config":
            self = replace(self, settings={"num_hidden_layers": 4})  # layer 3 would come back random
        write(self, source, folder)
        if corrupt == "weights":
            weights = load_file(folder / WEIGHTS)
            next(tensor for name, tensor in weights.items() if ".mlp." in name).view(-1)[0] += 1e-3
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    monkeypatch.setattr(Surgery, "write", corrupted)
    with pytest.raises(UserError, match=r"layers 1 cannot be cut: .*; nothing was written"):
        pruned(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("moment", ["weights._copy_bytes", "prune.surgery.copy", "prune.verify_saved"])
def test_an_error_midway_leaves_no_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"striate.{moment}", fail)
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if expected is UserError else None):
        pruned(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_model_that_loads(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A kill runs no code of ours: at the worst moment, all files are there but the last one, the config.
    target = tmp_path / "half"
    monkeypatch.setattr(Surgery, "edit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        surgery(model, 1).write(model, target)
    assert (target / WEIGHTS).is_file()
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load(target)


# The verb.


def test_a_pruned_run_is_an_ordinary_run(model: Path, data: Path, tmp_path: Path) -> None:
    run = pruned(model, tmp_path / "run", data=data)
    assert run.info["status"] == "finished"
    assert run.info["parent"] == str(model)
    assert run.region == Region((0, 2), 3)
    assert Region.load(run.checkpoint) == run.region
    saved = json.loads((run.checkpoint / "prune.json").read_text())
    assert saved["map"] == {"0": 0, "2": 1, "3": 2}
    assert saved == run.info["prune"]
    card = (run.checkpoint / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "\n---\n\n# Pico\n" in card
    assert "□✂□□" in card
    assert {item.name for item in run.path.iterdir()} == {"run.json", "region.json", "checkpoint"}
    vlm, whole = load(run.path, device="cpu"), load(model, device="cpu")
    before, after = (sum(p.numel() for p in one.model.parameters()) for one in (whole, vlm))
    assert saved["parameters"] == {"before": before, "after": after}
    assert vlm.depth == 3
    again = pruned(run.path, tmp_path / "again", region=None, layers=None, remove="1", by="random")
    assert again.region == Region((0, 1), 2)


def test_cuts_follow_the_score(model: Path, data: Path, tmp_path: Path) -> None:
    plan = prune(model, region="none", remove="2", data=data, dry_run=True, options=OPTIONS)
    values = plan.scores[0].values
    assert list(plan.order) == sorted(range(DEPTH), key=values.__getitem__)[:2]
    saved = tmp_path / "scores.json"
    scores = striate_scores([0.4, 0.1, 0.3, 0.2])
    saved.write_text(json.dumps(scores))
    by_saved = prune(
        model, region="1", remove="50%", by="taste", scores=saved, dry_run=True, options=OPTIONS
    )  # fmt: skip
    assert by_saved.order == (3, 2)


def striate_scores(values: list[float], table: list[list[float]] | None = None) -> dict[str, Any]:
    score = {"values": values, "direction": "high", **({"table": table} if table else {})}
    name = "angular_distance" if table else "taste"
    return {"model": "m", "depth": len(values), "samples": 1, "scores": {name: score}}


def test_greedy_bypass_takes_the_layer_that_is_missed_least(model: Path, data: Path) -> None:
    plan = prune(
        model, region="0", remove="2", by="bypass_perplexity", data=data, dry_run=True, options=OPTIONS
    )  # fmt: skip
    first, second = plan.order

    def perplexity(*layers: int) -> float:
        named = ",".join(map(str, layers))
        plan = prune(model, region="0", layers=named, data=data, dry_run=True, options=OPTIONS)
        assert plan.perplexity
        return plan.perplexity[1]

    assert first == min((1, 2, 3), key=perplexity)
    assert second == min({1, 2, 3} - {first}, key=lambda layer: perplexity(first, layer))


def test_until_stops_in_time(model: Path, data: Path) -> None:
    plans = {
        share: prune(model, region="3", remove=f"until:{share}%", by="bypass_perplexity", data=data, dry_run=True,
                     options=OPTIONS)
        for share in (2, 1000)
    }  # fmt: skip
    assert len(plans[1000].order) == 3
    assert len(plans[2].order) == 1  # a second layer would raise it by 2.3 %, a third lower it again
    for share, plan in plans.items():
        before, after = plan.perplexity
        assert after / before - 1 <= share / 100
    with pytest.raises(UserError, match=r"no layer can be cut: without layer \d perplexity rises by"):
        prune(model, region="3", remove="until:0%", data=data, dry_run=True, options=OPTIONS)


def test_blocks_are_runs_of_neighbors(model: Path, tmp_path: Path) -> None:
    distance = [0.3, 0.2, 0.1, 0.5, 0.1, 0.2, 0.3]
    table = [[sum(distance[start : start + length]) if start + length <= 7 else float("nan") for length in range(1, 8)]
             for start in range(7)]  # fmt: skip
    assert blocks(table, range(7), 1) == (2,)
    assert blocks(table, range(7), 3) == (0, 1, 2)  # 0.6, as (4, 5, 6): the first of equals
    assert blocks(table, (0, 1, 4, 5, 6), 3) == (4, 5, 6)  # one block goes before two
    assert blocks(table, (0, 2, 4, 5), 3) == (2, 4, 5)
    assert blocks(table, (0, 2, 4, 5), 4) == (0, 2, 4, 5)
    saved = tmp_path / "scores.json"
    table = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.3, 0.0], [0.1, 0.2, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]]
    saved.write_text(json.dumps(striate_scores([0.1] * 4, table=table)))
    plan = prune(model, region="0", remove="2", by="block", scores=saved, dry_run=True, options=OPTIONS)
    assert plan.order == (1, 2)


@pytest.mark.parametrize(("what", "trained"), [("region", "0,2"), ("neighbors", "0,1"), ("projector", "none")])
def test_healing_is_a_short_tune(model: Path, data: Path, tmp_path: Path, what: Any, trained: str) -> None:
    bare = load(pruned(model, tmp_path / "bare").path).model.state_dict()
    run = pruned(model, tmp_path / "run", heal=data, heal_layers=what)
    assert run.info["status"] == "finished"
    assert run.info["healed"]["region"] == trained
    assert len(run.history()) == run.info["training"]["steps"] == 2
    assert {item.name for item in run.path.iterdir()} == {"run.json", "region.json", "checkpoint", "log.jsonl"}
    assert run.region == Region.load(run.checkpoint) == Region((0, 2), 3)
    assert {"prune.json", "LICENSE"} <= {file.name for file in run.checkpoint.iterdir()}
    assert "(2 steps)" in (run.checkpoint / "README.md").read_text()
    found = load(run.path).model.state_dict()
    moved = {name for name in bare if not torch.equal(bare[name], found[name])}
    layers = {name.removeprefix(LAYERS).partition(".")[0] for name in moved if name.startswith(LAYERS)}
    assert layers == (set() if trained == "none" else set(trained.split(",")))
    assert any("projector" in name for name in moved)
    # The same as tuning the pruned run, which has all options of tune.
    tuned = tune(tmp_path / "bare", data=data, out=tmp_path / "tuned", region=trained, options=OPTIONS)
    for name, tensor in load(tuned.path).model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


BAD = [
    ({"remove": "3", "layers": None, "by": "random"}, "only 2 layers can be cut: of 4, 2 are in the region 0,3"),
    ({"remove": "2"}, "either --remove .* or --layers"),
    ({"layers": None}, "either --remove .* or --layers"),
    ({"remove": "some", "layers": None, "by": "random"}, r"--remove some is not a number of layers; accepted: 4 "),
    ({"remove": "0", "layers": None, "by": "random"}, "--remove 0 is not a number of layers"),
    ({"layers": "1,3"}, "--layers 1,3: 3 in the region 0,3, which is never cut"),
    ({"layers": "7"}, "layer 7 does not exist"),
    ({"region": "none", "layers": "all"}, "4 of 4 layers cannot be cut"),
    ({"region": None}, r"has no region\.json: name the layers to keep"),
    ({"layers": None, "remove": "1"}, "angular_distance is measured on records: give them with --data"),
    ({"layers": None, "remove": "1", "by": "angular"}, "no score 'angular'; nearest: angular_distance"),
    ({"layers": None, "remove": "until:1%", "by": "random"}, "measures perplexity on records"),
    ({"out": None}, "--out is required"),
    ({"heal": Path("nowhere.json")}, "nowhere.json: no such file"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    before = content(model)
    with pytest.raises(UserError, match=message) as caught:
        pruned(model, **{"out": tmp_path / "run", **settings})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert content(model) == before


def test_models_that_cannot_be_pruned(model: Path, tmp_path: Path) -> None:
    region = Region((0,), 32)
    region.save(tmp_path / "region.json")
    with pytest.raises(UserError, match="holds the region 0 of a model with 32 layers; this model's depth is 4"):
        pruned(model, tmp_path / "run", region=str(tmp_path / "region.json"))
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not merged: merge them into the model first .*merge_and_unload"):
        pruned(adapters, tmp_path / "run")
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(UserError, match="custom code, which striate never runs"):
        pruned(remote, tmp_path / "run")
    with pytest.raises(UserError, match="no model at 'no/such-model'"):
        pruned("no/such-model", tmp_path / "run")  # type: ignore[arg-type]
    taken = Run.create(tmp_path / "taken", verb="tune", options={})
    with pytest.raises(UserError, match="holds another run: tune"):
        pruned(model, taken.path)
    assert not (tmp_path / "run").exists()
    assert taken.info["verb"] == "tune"


def test_a_folder_that_is_there_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        cut_checkpoint(model, tmp_path, numbering(1), options=OPTIONS)
    assert content(tmp_path) == {"mine": b"precious"}


def test_a_full_disk_is_detected_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match=r"not enough disk space for the checkpoint in .* 0\.0 GB are free"):
        pruned(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_reads_well(model: Path) -> None:
    plan = prune(model, region="0,3", layers="1", dry_run=True, options=OPTIONS)
    lines = str(plan).splitlines()
    assert lines[0] == "cuts     1 (1 of 4 layers)"
    assert lines[3].strip() == "■✂·■"
    assert plan.__rich__() == str(plan)
    assert striate.Region.parse("0,2", 3) == plan.region


def test_the_command_line_shows_plan_and_protection(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", str(model), "--region", "0,3", "--layers", "1", "--device", "cpu"]
    assert main([*words, "--dry-run"]) == 0
    assert "■✂·■" in capsys.readouterr().out
    assert main([*words, "--remove", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_tells_what_is_never_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vlm = Vlm.of(pico("qwen3_vl"))
    vlm.model.save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--region", "last:1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"never cut\s+0,1\s+DeepStack adds image features behind it", shown)

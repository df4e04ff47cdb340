"""What a region costs: counts equal those of real training steps, and the numbers that can be worked out by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pico import pico, pico_llava, pico_more
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForImageTextToText

from striate.errors import UserError
from striate.region import Region
from striate.routing import resolve, route
from striate.runs.cli import main
from striate.studies.cost import Counts, FakeModel, Machine, Setup, Step, cost, with_one_image
from striate.studies.cost.fake_model import fake_model_of
from striate.studies.cost.machine import GPUS, gpu_of, this_machine
from striate.studies.cost.section import Tally, Work
from striate.studies.cost.step import ROOM, Parallelism, fit, size
from striate.train.adapter import adapt
from striate.train.memory import activations
from striate.vlm import Vlm, select

ATEN = torch.ops.aten
# `FlopCounterMode` has no formula for the attention of CPUs; theirs does what that of GPUs does.
ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


def llava(text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """The config of a LLaVA of 8 decoder layers, larger than pico."""
    text = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000, **text}
    vision = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48, "patch_size": 8, **vision}
    return AutoConfig.for_model(
        "llava", text_config=text, vision_config=vision, image_token_index=6, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip


SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128}
SMALL = {
    "llama": llava({"model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "head_dim": 16}, SIGLIP),
    "qwen2": llava({"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512}, SIGLIP),
    "gemma2": llava({"model_type": "gemma2", "hidden_size": 96, "intermediate_size": 384, "head_dim": 24}, SIGLIP),
}
SETUP = Setup(rank=8, batch=4, micro_batch=2, image_tokens=36, text_tokens=20, answer_tokens=8)


def load_on_meta(config: Any) -> FakeModel:
    return fake_model_of(config, kept_as=torch.float32, dtype="float32")


class Real:
    """A model that really trains, as `tune` does, on records of the lengths of a setup."""

    def __init__(self, config: Any, region: str, setup: Setup) -> None:
        torch.manual_seed(0)
        self.vlm = Vlm.of(AutoModelForImageTextToText.from_config(config).train())
        chosen = Region.parse(region, self.vlm.depth)
        select(self.vlm, chosen, modules=setup.modules, projector=setup.projector)
        self.network: nn.Module = self.vlm.model
        if setup.method == "lora":
            self.network, _ = adapt(
                self.vlm, chosen, modules=setup.modules, projector=setup.projector, rank=setup.rank,
                alpha=2 * setup.rank, dropout=0.05,
            )  # fmt: skip
        if setup.checkpointing:
            self.vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.vlm.model.disable_input_require_grads()  # else the frozen tower gets a backward pass for nothing
        if found := resolve(setup.route, chosen):
            route(self.vlm, found)
        self.ids = torch.full((setup.micro_batch, setup.tokens), 10)
        self.ids[:, 1 : 1 + setup.image_tokens] = self.vlm.image_token_id
        size = config.vision_config.image_size
        self.pixels = torch.randn(setup.micro_batch, 3, size, size)
        self.positions = torch.zeros_like(self.ids, dtype=torch.bool)
        self.positions[:, -setup.answer_tokens :] = True
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)

    def forward(self) -> torch.Tensor:
        with self.vlm.head_at(self.positions):
            logits = self.network(
                input_ids=self.ids, pixel_values=self.pixels, attention_mask=torch.ones_like(self.ids), use_cache=False
            ).logits[0]
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none").sum()

    def step(self) -> None:
        for _ in range(2):
            self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flops(self) -> tuple[int, int]:
        """Forward, and backward."""
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            loss = self.forward()
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops() - forward


def counted(config: Any, region: str, **changes: Any) -> tuple[Step, Setup]:
    setup = Setup(**{**vars(SETUP), **changes})
    fake_model = load_on_meta(config)
    return Counts(fake_model, setup).step(Region.parse(region, fake_model.vlm.depth)), setup


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads wait for each other on a busy machine; nothing here is large enough to need two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ARMS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "all", {}),
    ("llama", "last:25%", {"projector": False}),
    ("llama", "uniform:25%", {"method": "lora"}),
    ("llama", "5", {"method": "lora", "projector": False}),
    ("llama", "uniform:25%", {"checkpointing": True}),
    ("qwen2", "uniform:25%", {}),
    ("qwen2", "none", {}),
    ("gemma2", "middle:50%", {"projector": False}),
    ("gemma2", "all", {"method": "lora", "micro_batch": 1}),
    ("llama", "uniform:25%", {"modules": "gate_up"}),
    ("qwen2", "last:25%", {"modules": "o", "projector": False}),
    ("llama", "uniform:25%", {"modules": "attention", "method": "lora"}),
    ("llama", "3,4", {"route": "same"}),
    ("llama", "all", {"route": "first:50%"}),
    ("qwen2", "all", {"route": "3,5", "checkpointing": True}),
    ("qwen2", "uniform:25%", {"route": "first:1", "method": "lora"}),
    ("gemma2", "last:25%", {"route": "same", "projector": False}),
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("model", "region", "changes"), ARMS)
def test_flops_are_those_of_a_real_step(model: str, region: str, changes: dict[str, Any]) -> None:
    step, setup = counted(SMALL[model], region, **changes)
    real = Real(SMALL[model], region, setup)
    assert step.trainable == sum(p.numel() for p in real.parameters)
    if step.route:
        real.forward()  # the first pass of a route tries which work is not needed
    forward, backward = real.flops()
    assert step.forward.flops == forward
    assert step.backward.flops == backward


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "region", "changes"),
    [
        ("llama", "all", {}),
        ("llama", "all", {"checkpointing": True}),
        ("llama", "uniform:25%", {"method": "lora"}),
        ("qwen2", "uniform:25%", {}),
        ("qwen2", "uniform:25%", {"method": "lora"}),
        ("gemma2", "last:25%", {"projector": False}),
        ("llama", "all", {"modules": "gate_up"}),
        ("gemma2", "uniform:25%", {"method": "lora"}),
        ("llama", "uniform:25%", {"route": "same"}),
        ("qwen2", "all", {"route": "first:50%"}),
        ("llama", "all", {"route": "uniform:25%", "checkpointing": True}),
        ("gemma2", "uniform:25%", {"route": "same", "method": "lora"}),
    ],
)
def test_peak_memory_is_that_of_a_real_step(model: str, region: str, changes: dict[str, Any]) -> None:
    step, setup = counted(SMALL[model], region, micro_batch=8, batch=16, text_tokens=100, **changes)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        real = Real(SMALL[model], region, setup)
        real.step()
        real.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changed = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert step.memory.peak == pytest.approx(max(itertools.accumulate(changed)), rel=0.15)
    parts = step.memory
    assert parts.peak >= parts.weights + parts.gradients + parts.optimizer + parts.activations
    assert parts.peak <= sum(vars(parts).values()) - parts.peak


def test_a_linear_layer_by_hand() -> None:
    weight, given = torch.ones(6, 5, requires_grad=True), torch.ones(7, 5)
    with Tally() as tally:
        result = F.linear(given, weight)
        forward = tally.take()
        result.backward(torch.ones_like(result))
    assert forward.flops == 2 * 7 * 5 * 6
    assert forward.traffic == 4 * (7 * 5 + 5 * 6 + 7 * 6)  # the transposed weight is only another look at it
    assert tally.work.flops == 2 * 7 * 5 * 6  # the weight's gradient; the input needs none
    assert tally.peak >= tally.live >= 4 * (7 * 6 + 6 * 5)


def test_seconds_are_those_of_the_slower_of_arithmetic_and_memory() -> None:
    work = Work(Counter({(100, 10): 2, (0, 50): 1}))
    assert work.seconds(rate=10, bandwidth=100) == 2 * 10 + 0.5
    assert work.seconds(rate=1000, bandwidth=10) == 2 * 1 + 5
    assert (work * 3 + work).flops == 4 * 200


def test_bytes_by_hand() -> None:
    step, _ = counted(SMALL["llama"], "all", batch=4, micro_batch=2)
    config = SMALL["llama"].text_config
    width, inner, kv = config.hidden_size, config.intermediate_size, 4 * 16
    layer = width * (2 * width + 2 * kv + 3 * inner) + 2 * width
    projector = 64 * width + width + width * width + width
    assert step.trainable == 8 * layer + projector
    assert step.memory.gradients == 4 * step.trainable
    assert step.memory.optimizer == 8 * step.trainable
    assert step.memory.weights == 4 * step.parameters
    assert step.optimizer.traffic == step.trainable * (40 + 12)  # one step, and gradients added once


def test_kept_bytes_are_those_that_autograd_saves() -> None:
    setup = Setup(**{**vars(SETUP), "projector": False})
    fake_model = load_on_meta(SMALL["llama"])
    section = Counts(fake_model, setup).layer(3, "full", True)
    real = Real(SMALL["llama"], "3-4", setup)
    # Autograd saves what the layer is given; the section has its result instead, of the same size.
    assert section.kept == activations(real.vlm, real.forward).layers[4]


def test_a_frozen_projector_ends_the_backward_pass_at_the_first_trained_layer() -> None:
    low, _ = counted(SMALL["llama"], "0,1", projector=False)
    high, _ = counted(SMALL["llama"], "6,7", projector=False)
    bridged, _ = counted(SMALL["llama"], "6,7", projector=True)
    assert low.forward.flops == high.forward.flops
    assert high.backward.flops < 0.5 * low.backward.flops < 0.5 * bridged.backward.flops
    assert high.memory.activations < 0.5 * bridged.memory.activations


def test_fit_takes_the_largest_region_that_fits() -> None:
    fake_model, machine = load_on_meta(SMALL["llama"]), Machine("m", 1e12, 1e11)
    ample = fit(fake_model, SETUP, "last:2", 1e9, machine)
    assert ample.region.layers == tuple(range(8))
    assert ample.setup.micro_batch == SETUP.batch
    assert not ample.setup.checkpointing
    least = Counts(fake_model, Setup(**{**vars(SETUP), "micro_batch": 1, "checkpointing": True}))
    room = 0.8 * least.step(Region.parse("all", 8)).memory.peak
    tight = fit(fake_model, SETUP, "last:2", room / ROOM, machine)
    assert tight.memory.peak <= room
    assert 0 < len(tight.region) < 8
    assert max(tight.region) == 7
    with pytest.raises(UserError, match=r"too small: one layer of 8, with a micro-batch of 1, takes .* GB; --method"):
        fit(fake_model, SETUP, "last:2", 1e6, machine)


@pytest.mark.parametrize(("text", "value"), [("24GB", 24e9), ("24", 24e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12)])
def test_sizes(text: str, value: float) -> None:
    assert size(text) == value


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # A first try that is left out, and seven: of products that take 4 s in the median, of copies that take 2 s.
    taken = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 90.0, 2.0, 1.0, 2.0, 2.0, 9.0, 2.0, 2.0])
    looks = iter([look for seconds in taken for look in (0.0, seconds)])
    monkeypatch.setattr("striate.studies.cost.machine.time.perf_counter", lambda: next(looks))
    machine = this_machine("float32")
    assert machine.rate == 2 * 1024**3 / 4
    assert machine.bandwidth == 2 * 4 * 2**23 / 2  # read and written
    assert next(looks, None) is None


def test_gpus_are_those_of_their_data_sheets() -> None:
    assert gpu_of("H100") == Machine("h100", 989.4e12, 3350e9, 80e9, efficiency=0.6)
    assert gpu_of("rtx-4090").reached == (0.6 * 165.2e12, 0.6 * 1008e9)
    # A row in which two numbers are exchanged, or a unit: FLOPs a byte, and bytes of a size that is sold.
    assert {name for name, one in GPUS.items() if not 70 < one.rate / one.bandwidth < 430} == set()
    assert {one.memory / 1e9 for one in GPUS.values()} <= {24, 40, 48, 80, 141, 180, 192}


FAMILIES = ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "mistral3", "paligemma"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    fake_model = load_on_meta(pico(family).config)
    setup = Setup(batch=2, micro_batch=2, image_tokens=fake_model.tokens_per_image or 4)
    counts, config = Counts(fake_model, setup), fake_model.vlm.model.config.get_text_config()
    heads, rows = config.num_attention_heads, setup.micro_batch * setup.tokens
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * heads * width * setup.tokens * rows  # queries with keys, weights with values
    for index, layer in enumerate(fake_model.vlm.layers):
        weights = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
        section = counts.layer(index, "full", True)
        assert section.forward.flops == 2 * rows * weights + attention
        assert section.backward.flops == 4 * rows * weights + attention * 5 // 2  # the scores once more
    step = counts.step(Region.parse("uniform:50%", fake_model.vlm.depth))
    parts = [counts.vision, *(counts.layer(i, "full" if i in (0, 2) else None, True) for i in range(4)), counts.head]
    assert step.forward.flops == sum(part.forward.flops for part in parts)
    assert step.backward.flops == sum(part.backward.flops for part in parts)
    if fake_model.tokens_per_image is None:
        with pytest.raises(UserError, match="--image-tokens"):
            with_one_image(fake_model, setup)


def test_layers_that_run_only_with_an_image_are_refused() -> None:
    with pytest.raises(UserError, match="layer 1 runs only with an image"):
        Counts(load_on_meta(pico_more("mllama").config), SETUP).step(Region.parse("all", 4))


def test_the_verb_needs_no_more_than_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(SMALL["llama"].to_dict(), default=str))
    lines = ["cost", str(file), "--gpu", "h100", "--batch", "2", "--plot", str(tmp_path / "cost.svg")]
    assert main(lines) == 0
    said = capsys.readouterr().out
    for word in ("trained parameters", "TFLOP/s", "memory: peak", "records per second", "36 image"):
        assert word in said
    assert max(len(line.rstrip()) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    assert {found.suffix for found in tmp_path.glob("cost.*")} == {".svg", ".png", ".pdf"}


WRONG = [
    ({"gpu": "h1000"}, "no GPU 'h1000' in the table; known are a10, a100-40gb"),
    ({"fit": "much"}, "--fit 'much': a size of memory"),
    ({"fit": "0GB"}, "--fit '0GB': a size of memory"),
    ({"batch": 0}, "--batch 0: at least 1"),
    ({"answer_tokens": 0}, "--answer-tokens 0: at least 1"),
    ({"image_tokens": -1}, "--image-tokens -1: at least 0"),
    ({"region": "last:9"}, "'last:9' asks for 9 layers"),
    ({"region": "none", "projector": "freeze"}, "nothing would train"),
    ({"model": ["nobody/nothing"]}, "no model at 'nobody/nothing'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_bad_input_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    asked = {"model": [str(pico_llava(tmp_path / "llava"))], "gpu": "h100", **change}
    with pytest.raises(UserError, match=message) as refused:
        cost(**asked)
    assert "\n" not in str(refused.value)


def test_the_multiply_adds_of_a_route_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SMALL["llama"].save_pretrained(tmp_path)
    words = ["--region", "3,5", "--route", "same", "--image-tokens", "36", "--text-tokens", "20"]
    words += ["--answer-tokens", "8", "--gpu", "h100"]
    assert main(["cost", str(tmp_path), *words]) == 0
    keys, every = 2 * 128 * 64, 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352  # matrices of a layer: k and v; all
    whole, unrouted = 64 * every + 2 * 64 * 64 * 128, 28 * every + 36 * keys + 2 * 28 * 64 * 128
    lines = capsys.readouterr().out.splitlines()
    assert "image tokens through 0,3,5 of them" in lines[2]
    row = next(line for line in lines if "multiply-adds, per record" in line)
    assert row.split()[-3:-1] == [f"{3 * whole + 5 * unrouted:,}", f"{8 * whole:,}"]


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a llama model, which is not an image-text-to-text model"):
        cost([str(tmp_path)], gpu="h100")


def on(devices: int, region: str = "3,5", **changes: Any) -> Step:
    """A step of 4 records, 2 a pass, on some devices."""
    return Counts(load_on_meta(SMALL["llama"]), replace(SETUP, devices=devices, **changes)).step(
        Region.parse(region, 8)
    )


def test_what_devices_send_by_hand() -> None:
    whole, trained = on(1).memory.weights, on(1).trainable
    assert Parallelism().sent(on(1)) == 0
    assert Parallelism().sent(on(2)) == 4 * trained  # 2 x 1/2 of the gradients
    assert Parallelism().sent(on(4)) == pytest.approx(1.5 * 4 * trained)
    # Sharded, one pass each: half of the weights twice, half of the gradients once.
    assert Parallelism(shard=True).sent(on(2)) == pytest.approx(0.5 * (2 * whole + 4 * trained))
    frozen = on(2, projector=False)
    back = 5 / 8  # of the layers, those from the first trained one on
    sent = 0.5 * (frozen.memory.weights * (1 + back) + 4 * frozen.trainable)
    assert Parallelism(shard=True).sent(frozen) == pytest.approx(sent)


def test_several_devices_take_as_long_as_the_slower_of_computing_and_sending() -> None:
    alone = Parallelism().seconds(on(1), 1e12, 1e15)
    assert alone == pytest.approx(on(1).seconds(1e12, 1e15))
    assert Parallelism(link=1e15).seconds(on(2), 1e12, 1e15) == pytest.approx(alone / 2, rel=0.01)
    assert Parallelism(link=1e3).seconds(on(2), 1e12, 1e15) == pytest.approx(4 * on(2).trainable / 1e3)


def test_sharding_leaves_a_device_its_part_and_two_layers() -> None:
    fake_model, way = load_on_meta(SMALL["llama"]), Parallelism(shard=True)
    one, two, many = (way.memory(on(devices), fake_model) for devices in (1, 2, 10**6))
    assert one == pytest.approx(on(1).memory.peak)
    assert one > two > many
    layers = [sum(p.numel() for p in layer.parameters()) for layer in fake_model.vlm.layers]
    rest = sum(p.numel() for p in fake_model.vlm.model.parameters()) - sum(layers)
    share = (rest + 2 * layers[0]) / (rest + sum(layers))
    held = on(1).memory.peak - on(1).memory.weights - 12 * on(1).trainable
    assert many == pytest.approx(held + share * on(1).memory.weights, rel=1e-3)

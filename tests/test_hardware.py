"""What GPUs do otherwise than CPUs, as far as a CPU can show it: research/gpu_review.md lists the findings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pico import pico_llava
from test_train_fast_paths import BOTH, losses_and_gradients, two_records
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tracing import family
from training import OPTIONS, batch_of, saved_as, tune, weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import striate
from striate.data import Batch, Examples, collate, read
from striate.distributed import Rank
from striate.evaluation import answers
from striate.prune import proof
from striate.scores.gradient import Gradient
from striate.studies.cost.machine import measured_sizes
from striate.train import loss, packing
from striate.train.adapter import adapt
from striate.train.loop import Loop
from striate.train.loss import FastPaths, answer_losses, verify_fast_paths
from striate.train.memory import activations
from striate.train.options import check_launch
from striate.train.packing import ModelInputs, record_by_record
from striate.train.saved import StateWriter
from striate.train.watch import Log, checksum
from striate.vlm import Vlm, select

fit = import_module("striate.train.fit")
BF16 = replace(OPTIONS, dtype="bfloat16")


@pytest.fixture
def cuda_autocast(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Autocast as on CUDA: norms take and return float32 (AT_FORALL_FP32 in autocast_mode.h). Returns which ran."""
    ran: set[str] = set()

    def in_float32(name: str) -> Callable[..., torch.Tensor]:
        real = getattr(F, name)

        def norm(*arguments: Any, **settings: Any) -> torch.Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return real(*arguments, **settings)
            ran.add(name)
            arguments = tuple(one.float() if isinstance(one, torch.Tensor) else one for one in arguments)
            settings = {key: one.float() if isinstance(one, torch.Tensor) else one for key, one in settings.items()}
            return real(*arguments, **settings)

        return norm

    for name in ("layer_norm", "rms_norm"):
        monkeypatch.setattr(F, name, in_float32(name))
    return ran


@pytest.mark.parametrize(
    ("text", "dtype", "method"),  # phi: the decoder ends in nn.LayerNorm
    [("llama", torch.float16, "lora"), ("phi", torch.bfloat16, "lora"), ("phi", torch.float16, "full")],
)
def test_half_precision_trains_under_the_autocast_of_a_gpu(
    data: Path, tmp_path: Path, cuda_autocast: set[str], text: str, dtype: torch.dtype, method: str
) -> None:
    source = saved_as(pico_llava(tmp_path / "float32", model_type=text), tmp_path / "half", dtype)
    run = tune(source, data, tmp_path / "run", replace(BF16, steps=6, checkpointing="all"), method=method)
    assert "layer_norm" in cuda_autocast
    found = [entry["loss"] for entry in run.history()]
    assert found[-1] < found[0]
    before, after = weights(source), weights(run.path)
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {dtype}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".layers.")[-1][0] for name in moved if "language" in name} == {"1", "3"}
    assert {name.split(".")[1] for name in moved} == {"language_model", "multi_modal_projector"}


def test_shards_need_a_torch_that_takes_frozen_weights_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, shard=True)
    check_launch(options, Rank(0, 2))
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(striate.UserError, match=r"--shard needs torch >= 2.8, this is 2.7.1"):
        check_launch(options, Rank(0, 2))


def test_several_processes_are_not_put_on_one_gpu() -> None:
    options = replace(OPTIONS, device="cuda:1")
    check_launch(options, Rank())
    with pytest.raises(striate.UserError, match=r"--device cuda:1: each of several processes takes its own"):
        check_launch(options, Rank(0, 2))


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no room for 1 GB")


def test_memory_that_runs_out_in_a_probe_says_nothing_about_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, probe = two_records("llava_llama")
    monkeypatch.setattr(loss, "record_by_record", full)
    with pytest.raises(torch.OutOfMemoryError):
        verify_fast_paths(vlm, probe, packing="auto", sharded=False, autocast=nullcontext)


@pytest.mark.parametrize(("holder", "name"), [(fit, "_probe"), (Loop, "_clip"), (StateWriter, "_copy")])
def test_memory_that_runs_out_outside_of_a_pass_is_one_line(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str
) -> None:
    monkeypatch.setattr(holder, name, full)
    with pytest.raises(striate.UserError, match=r"out of memory \(no room for 1 GB\): set a smaller --micro-batch"):
        tune(model, data, tmp_path / "run", OPTIONS)


def test_the_probe_takes_the_shortest_records_with_images(model: Path, data: Path) -> None:
    vlm = striate.load(model, device="cpu")
    examples = Examples(read(data).records, vlm.processor)
    probe = fit._probe(examples, vlm, 8)
    assert [examples.lengths[int(name)] for name in probe.batch.ids] == sorted(examples.lengths)[:2]
    assert probe.one.ids == probe.batch.ids[:1]


def test_a_proof_in_float32_does_not_take_kernels_without_float32(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    package = import_module("striate.prune")
    for module in (package, proof):
        real = module.load

        def load(*arguments: Any, real: Any = real, attn: str | None = None, **settings: Any) -> Vlm:
            asked.append(attn)
            return real(*arguments, **settings)

        monkeypatch.setattr(module, "load", load)
    numbers = import_module("striate.prune.cutting").Numbering(striate.Region.parse("3", 4))
    package.cut_checkpoint(model, tmp_path / "cut", numbers, options=replace(OPTIONS, attn="flash_attention_2"))
    package.cut_checkpoint(model, tmp_path / "eager", numbers, options=replace(OPTIONS, attn="eager"))
    assert asked == [None, None, "eager", "eager"]


def test_gradients_below_the_smallest_float16_are_scored(model: Path, data: Path) -> None:
    half, single = (striate.load(model, device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    half.head.weight.data *= 2**-10  # and with it every gradient below
    single.model.load_state_dict(half.model.state_dict())
    batch, found = batch_of(half, data), []
    for vlm in (half, single):
        gradient = Gradient(vlm)
        gradient.add(batch)
        found.append(gradient.scores()[0].values)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_an_accelerator_is_measured_on_what_keeps_it_busy() -> None:
    side, floats, repeats = measured_sizes(torch.device("cuda"))
    assert repeats * 2 * side**3 / 1e15 > 5e-3  # seconds at 1000 TFLOP/s; a launch takes 5e-6
    assert floats * 4 > 10 * 60e6  # an H200 has a cache of 60 MB


def test_records_of_a_model_with_experts_may_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, probe = two_records("llava_llama")
    real, calls = loss.answer_losses, iter(range(100))

    def rounded(vlm: Vlm, model: Any, batch: Batch, **ways: Any) -> torch.Tensor:
        losses = real(vlm, model, batch, **ways)
        packed = ways.get("fast_paths", FastPaths()).packing
        return losses * (1 + 1e-6 * next(calls)) if packed else losses

    monkeypatch.setattr(loss, "answer_losses", rounded)
    for experts, packs in ((False, False), (True, True)):
        monkeypatch.setattr(loss, "_has_experts", lambda vlm, experts=experts: experts)
        found, _ = verify_fast_paths(vlm, probe, packing="auto", sharded=False, autocast=nullcontext)
        assert found.packing is packs


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "llama", "intermediate_size": 1024},
        {"model_type": "qwen2", "hidden_size": 64, "head_dim": 16, "tie_word_embeddings": True},
        {"model_type": "gemma2", "intermediate_size": 256, "sliding_window": 8},
    ],
)
def test_activations_are_predicted_from_two_sizes(
    data: Path, tmp_path: Path, text: dict[str, Any], method: str
) -> None:
    # In bfloat16 the copies of trained weights, which are wide here, are kept once, whatever the batch.
    vlm = striate.load(pico_llava(tmp_path / "model", **text), device="cpu")
    region = striate.Region.parse("1,3", vlm.depth)
    select(vlm, region)
    network: Any = vlm.model
    if method == "lora":
        network, _ = adapt(vlm, region, projector=True, rank=8, alpha=16, dropout=0.1)
    examples = Examples(read(data).records, vlm.processor)
    autocast = in_bfloat16
    predicted, *_ = fit._try_forward(vlm, network, fit._probe(examples, vlm, 8), FastPaths(), autocast)
    batch = collate([examples[index] for index in range(8)], pad_id=0)
    network.train()
    with autocast():
        kept = activations(vlm, lambda: answer_losses(vlm, network, batch))
    assert predicted.layers == pytest.approx(kept.layers, rel=0.15)
    assert predicted.total == pytest.approx(kept.total, rel=0.15)


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_masks_of_dropout_are_predicted(model: Path, data: Path) -> None:
    kept = []
    for dropout in (0.0, 0.5):
        vlm = striate.load(model, device="cpu")
        select(vlm, striate.Region.parse("1,3", vlm.depth))
        region = striate.Region.parse("1,3", vlm.depth)
        network, _ = adapt(vlm, region, projector=True, rank=4, alpha=8, dropout=dropout)
        probe = fit._probe(Examples(read(data).records, vlm.processor), vlm, 8)
        before = [module.training for module in network.modules()]
        kept.append(fit._try_forward(vlm, network, probe, FastPaths(), nullcontext)[0].layers)
        assert [module.training for module in network.modules()] == before
    assert [with_masks > without for without, with_masks in zip(*kept, strict=True)] == [False, True, False, True]


def test_adapters_take_their_inputs_as_they_are(model: Path, data: Path) -> None:
    vlm = striate.load(model, device="cpu", dtype="bfloat16")
    network, _ = adapt(vlm, striate.Region.parse("1", vlm.depth), projector=True, rank=4, alpha=8, dropout=0.5)
    network.train()
    seen: set[torch.dtype] = set()
    for name, module in network.named_modules():
        if name.endswith("lora_dropout.default"):
            module.register_forward_hook(lambda _, inputs, __: seen.add(inputs[0].dtype))
    with in_bfloat16():
        answer_losses(vlm, network, batch_of(vlm, data))
    assert seen == {torch.bfloat16}


def test_a_checksum_sees_any_change_and_takes_no_copy_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, real = [], torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda one, *a, **k: (largest.append(one.numel()), real(one, *a, **k))[1])
    weight = torch.randn(3 * 2**23, 2).bfloat16().T
    before = checksum(weight)
    weight[1, 7] += 1
    assert checksum(weight) != before
    assert max(largest) == 2**24


def test_packed_rows_do_not_run_in_cudnn() -> None:
    vlm, _ = family("llava")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with record_by_record(vlm):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def attention_of(lengths: tuple[int, ...], device: str) -> tuple[list[torch.Tensor], packing.Blocks]:
    """Queries of four heads, keys and values of two, of a packed row [1, H, T, D], and its masks."""
    generator = torch.Generator().manual_seed(0)
    row = [torch.randn(1, heads, sum(lengths), 8, generator=generator).to(device) for heads in (4, 2, 2)]
    blocks = packing.Blocks(lengths, (None,) * len(lengths), "sdpa", (1, 1, sum(lengths), sum(lengths)))
    return [part.requires_grad_() for part in row], blocks


def test_records_in_one_call_are_those_of_many() -> None:
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    found = []
    for together in (False, True):
        row, blocks = attention_of((5, 3, 4), "cpu")
        if together:
            out = packing._in_one_call(ALL_ATTENTION_FUNCTIONS["sdpa"], module, tuple(row), blocks.lengths)
        else:
            out, _ = packing._attend(module, *row, blocks)
        out.square().sum().backward()
        found.append([out, *(part.grad for part in row)])
    for many, one in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lengths", "calls"), [((5, 3, 4), 1), ((9, 1, 1), 3)])
def test_an_accelerator_attends_to_alike_records_in_one_call(
    lengths: tuple[int, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 * 5 ** 2 pairs are less than twice 5 ** 2 + 3 ** 2 + 4 ** 2, and 3 * 9 ** 2 are more than twice 83.
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(module: Any, query: torch.Tensor, *others: Any, **settings: Any) -> Any:
        seen.append(query.shape)
        return sdpa(module, query, *others, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counted)
    row, blocks = attention_of(lengths, "meta")
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    assert packing._attend(module, *row, blocks)[0].shape == (1, sum(lengths), 4, 8)
    assert len(seen) == calls


@pytest.mark.parametrize(("share", "warned"), [(0.7, True), (0.9, False)])
def test_a_machine_that_others_use_is_noticed(
    model: Path, data: Path, share: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.perf_counter
    monkeypatch.setattr(fit.time, "thread_time", lambda: share * clock())
    monkeypatch.setattr(fit, "MEASURABLE", 0.0)
    said: list[str] = []
    monkeypatch.setattr(Log, "begin", lambda self, done, total, notes: said.extend(notes))
    options = striate.TrainOptions(steps=1, batch=2, device="cpu")
    striate.tune(striate.load(model, device="cpu"), read(data), region="1", options=options)
    found = [text for text in said if text.startswith("other programs use this machine's cores")]
    assert bool(found) == warned
    assert all("had one for 70% of its time" in text for text in found)


def test_generation_compiles_nothing() -> None:
    assert answers.GREEDY["disable_compile"]
    assert proof.GREEDY["disable_compile"]


def test_flash_attention_takes_a_packed_row_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its kernels, which a CPU lacks, by their contract in transformers: rows of records from `cu_seq_lens_q` on.
    sdpa, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def flash(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        cu_seq_lens_q: torch.Tensor | None = None, **settings: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert mask is None or mask.dim() == 2
        calls.append(cu_seq_lens_q)
        if cu_seq_lens_q is None:  # padded at the right: causal is enough
            return sdpa(module, query, key, value, None, **settings)
        assert settings.pop("max_length_q") == settings.pop("max_length_k") == int(cu_seq_lens_q.diff().max())
        assert torch.equal(settings.pop("cu_seq_lens_k"), cu_seq_lens_q)
        rows = (one.split(cu_seq_lens_q.diff().tolist(), dim=2) for one in (query, key, value))
        parts = [sdpa(module, *parts, None, **settings)[0] for parts in zip(*rows, strict=True)]
        return torch.cat(parts, dim=1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    vlm, batch = family("llava")
    expected, gradients = losses_and_gradients(vlm, batch, FastPaths())
    vlm.model.config.text_config._attn_implementation = "flash_attention_2"
    found = verify_fast_paths(vlm, batch, packing="on", sharded=False, autocast=nullcontext)
    assert found == (BOTH, ())
    calls.clear()
    losses, others = losses_and_gradients(vlm, batch, BOTH)
    assert len(calls) == vlm.depth
    assert calls[0].dtype == torch.int32
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


class Waits(TorchFunctionMode):
    """Where striate's own lines read from tensors that a GPU would have to compute first, once `watching`."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique")
    PICKS = ("__getitem__", "__setitem__", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.found = False, list[str]()
        self.on_host: set[int] = set()  # addresses of what stays on the CPU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        picks = name in self.PICKS and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        reads = name in self.READS and args[0].data_ptr() not in self.on_host
        if self.watching and (reads or picks):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if "/striate/" in frame.f_code.co_filename:
                self.found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # From where a batch lies on the device to the end of the backward pass; transformers' own waits do not count.
    vlm, batch = family("llava")
    waits, to = Waits(), ModelInputs.to

    def move(self: ModelInputs, device: torch.device) -> ModelInputs:
        waits.watching = True
        waits.on_host.add(self.positions.data_ptr())
        return to(self, device)

    monkeypatch.setattr(ModelInputs, "to", move)
    with waits, record_by_record(vlm):
        answer_losses(vlm, vlm.model, batch, fast_paths=BOTH).mean().backward()
        assert waits.watching
        assert waits.found == []
        waits.watching = False
        monkeypatch.setattr(packing, "causal_mask_function", None)  # as with a mask that has to be read
        answer_losses(vlm, vlm.model, batch, fast_paths=BOTH)
    assert len(waits.found) == 1

"""One training, from the plan of what trains to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from striate.data import Batch, Example, Examples, Records, Skipped, collate
from striate.errors import UserError
from striate.processes import Rank
from striate.run import Run
from striate.train.callbacks import Audit, Freeze, Interrupt, RunLog
from striate.train.checkpointing import SHARE, Checkpointing
from striate.train.lockstep import Even, Together
from striate.train.loss import Shortcuts, Teacher, answer_losses
from striate.train.memory import MOMENT_BYTES, PeakMemory, activations, free_bytes
from striate.train.options import TrainOptions
from striate.train.packing import compiled, record_by_record
from striate.train.saved import KEPT, last_saved
from striate.train.sharding import shard, unshard
from striate.train.shortcuts import check_thinning, proven
from striate.train.thinning import Thinning
from striate.train.trainer import MOST_SKIPPED, Group, RegionTrainer
from striate.vlm import Vlm, default_device, multiplies_bfloat16


def fit(
    vlm: Vlm,
    network: nn.Module,
    run: Run,
    records: Records,
    groups: dict[str, Group],
    options: TrainOptions,
    *,
    progress: bool,
    teacher: Teacher | None = None,
    projector_share: float = 1.0,
) -> None:
    """Train `network` (the model, or its adapted form) in place, and note in the run what it took.

    `projector_share` is the share of the steps after which the projector is frozen.

    Raises:
        UserError: the step-1 audit failed, too many records are bad, memory does not suffice, an option cannot be had.
        KeyboardInterrupt: stopped and saved.
    """
    examples = Examples(
        records.records, vlm.processor, max_length=options.max_length, truncate_text=options.truncate_text
    )
    device = torch.device(options.device) if options.device else default_device()
    memory = PeakMemory(device)
    memory.start()
    began = time.monotonic()
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        arguments = _arguments(run, options, device)
        autocast = partial(torch.autocast, vlm.device.type, torch.bfloat16, enabled=arguments.bf16)
        probe = _probe(examples, vlm, arguments.per_device_train_batch_size)
        shortcuts, notes = proven(
            vlm, probe.batch.to(vlm.device), packing=options.packing, sharded=options.shard, autocast=autocast
        )
        thinning = Thinning(options.image_tokens, options.seed)
        rank = Rank(arguments.process_index, arguments.world_size)
        if 0 < projector_share < 1 and rank.of > 1:
            raise UserError("--projector as a share is for one process: others would wait for its gradients")
        if thinning.share < 1:
            check_thinning(vlm, probe.batch.to(vlm.device), shortcuts, autocast)
        if shortcuts.packing:
            for model in (vlm, *([teacher.vlm] if teacher else [])):
                stack.enter_context(record_by_record(model))
        checkpointing = _plan(vlm, network, probe, shortcuts, autocast, groups, options, device, rank)
        if options.shard:
            groups = _sharded(vlm, network, groups, arguments.device, rank)
        trained = {name: parameter for group in groups.values() for name, parameter in group.parameters.items()}
        if options.compile:
            stack.enter_context(compiled(vlm))
        bridge = list(groups["projector"].parameters.values()) if "projector" in groups else []
        pictured = any(examples.records.size(index).images for index in range(len(examples)))
        audit = Audit(
            network, trained,
            visual={name for part, group in groups.items() if part != "layers" for name in group.parameters},
            saw=lambda: not pictured or trainer.pictured,
        )  # fmt: skip
        interrupt, log = Interrupt(rank), RunLog(run, bar=progress and rank.first, notes=[*notes, str(checkpointing)])
        micro_batches = arguments.per_device_train_batch_size * rank.of
        pad_id = vlm.pad_token_id
        trainer = RegionTrainer(
            vlm=vlm, run=run, run_log=log, groups=groups,
            most_skipped=MOST_SKIPPED if options.on_bad_record == "skip" else 0.0,
            most_not_finite=options.skip_nonfinite,
            shortcuts=shortcuts, checkpointing=checkpointing, thinning=thinning, teacher=teacher, sharded=options.shard,
            model=network, args=arguments,
            train_dataset=Even(examples, step=micro_batches) if rank.of > 1 else examples,
            data_collator=Together.of(examples, pad_id=pad_id) if rank.of > 1 else partial(collate, pad_id=pad_id),
            callbacks=[audit, Freeze(bridge, projector_share), log, interrupt],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        stack.callback(log.bar.stop)
        stack.callback(interrupt.restore)
        trainer.train(resume_from_checkpoint=last_saved(run.state))
        if options.shard:
            unshard(network, rank)
    seconds = time.monotonic() - began
    told = {
        "method": "full" if network is vlm.model else "lora",
        "dtype": "bfloat16" if arguments.bf16 else "float32",
        "packing": shortcuts.packing,
        "recomputed_layers": list(checkpointing.layers),
        "peak_memory_gb": round(memory.gigabytes(), 4),
        "total_parameters": sum(p.numel() for p in network.parameters()),
    }
    run.update(training=told | _pace(trainer, seconds) | _sizes(groups))
    if interrupt.asked is not None:
        step, last = trainer.state.global_step, trainer.state.max_steps
        raise KeyboardInterrupt(f"stopped and saved at step {step} of {last}; the same command with --resume goes on")


def _pace(trainer: RegionTrainer, seconds: float) -> dict[str, float]:
    return {
        "seconds": round(seconds, 3),
        "data_wait": round(trainer.clock.share, 4),
        "steps": trainer.state.global_step,
        "samples": trainer.samples,
        "samples_per_second": round(trainer.samples / seconds, 3),
    }


def _sizes(groups: dict[str, Group]) -> dict[str, Any]:
    sizes = {part: sum(p.numel() for p in group.parameters.values()) for part, group in groups.items()}
    return {"trainable_parameters": sum(sizes.values()), "groups": sizes}


def in_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether the matrix products of `TrainOptions.dtype` are in bfloat16 on this device, else in float32."""
    return dtype == "bfloat16" or (dtype == "auto" and multiplies_bfloat16(device))


@dataclass(frozen=True)
class Probe:
    """Two records to try a training on, as a batch, and how much longer the largest micro-batch is about to be."""

    batch: Batch
    scale: float


def _probe(examples: Examples, vlm: Vlm, micro: int) -> Probe:
    """The first two readable records, those with images first.

    Raises:
        UserError: not one of the records can be read.
    """
    with_images_first = sorted(range(len(examples)), key=lambda index: not examples.records.size(index).images)
    read = ((index, examples[index]) for index in with_images_first)
    found = list(islice(((index, example) for index, example in read if isinstance(example, Example)), 2))
    if not found:
        last = examples[with_images_first[-1]]
        assert isinstance(last, Skipped)
        raise UserError(f"no record is left to train on; the last one, {last.source}: {last.reason}")
    (first, one), (second, other) = found[0], found[-1]
    lengths = examples.lengths
    largest = sum(sorted(lengths)[-micro:])
    return Probe(collate([one, other], pad_id=vlm.pad_token_id), largest / max(1, lengths[first] + lengths[second]))


def _plan(
    vlm: Vlm,
    network: nn.Module,
    probe: Probe,
    shortcuts: Shortcuts,
    autocast: Callable[[], AbstractContextManager[None]],
    groups: dict[str, Group],
    options: TrainOptions,
    device: torch.device,
    rank: Rank,
) -> Checkpointing:
    """Which layers to compute again: by what two records keep, and the size of the largest micro-batch."""
    batch = probe.batch.to(vlm.device)
    with autocast():
        kept = activations(vlm, lambda: answer_losses(vlm, network, batch, shortcuts=shortcuts))
    hidden = vlm.model.config.get_text_config(decoder=True).hidden_size
    width = torch.finfo(vlm.model.dtype).bits // 8
    tokens = int(batch.inputs["attention_mask"].sum())
    trained = sum(p.numel() for group in groups.values() for p in group.parameters.values())
    to_come = (4 + MOMENT_BYTES[options.optimizer]) * trained  # gradient and moments
    if options.shard:  # the weights are still to come, and of all each process has its part
        to_come = (to_come + sum(p.numel() * p.element_size() for p in network.parameters())) // rank.of
    checkpointing = Checkpointing(
        vlm,
        kept=kept.scaled(probe.scale),
        free=SHARE * free_bytes(device) - to_come,
        inputs=probe.scale * tokens * hidden * width,
        fixed=options.checkpointing != "auto",
    )
    checkpointing.choose(options.checkpointing)
    if options.shard:  # to compute a layer again is to gather it again, which takes all processes
        checkpointing.at_least(max(rank.gathered(len(checkpointing.layers))))
    return checkpointing


def _sharded(
    vlm: Vlm, network: nn.Module, groups: dict[str, Group], device: torch.device, rank: Rank
) -> dict[str, Group]:
    """What trains, after the model was spread over the processes: it is made of other parameters then."""
    now = shard(vlm, network, device, rank)
    return {
        part: replace(group, parameters={name: now[name] for name in group.parameters})
        for part, group in groups.items()
    }


def need_bitsandbytes(option: str) -> None:
    """Raises: UserError: the option's package is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{option} needs a package that is not installed: pip install bitsandbytes")


def _num_workers(options: TrainOptions, device: torch.device, world: int) -> int:
    if options.workers is not None:
        return options.workers
    return 0 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) // world - 1))


def _arguments(run: Run, options: TrainOptions, device: torch.device) -> TrainingArguments:
    if options.optimizer == "adamw_8bit":
        need_bitsandbytes("--optimizer adamw_8bit")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = options.batch // world
    if options.shard and world == 1:
        raise UserError("--shard spreads the model over processes, and there is one: start several with torchrun")
    if options.shard and (options.optimizer != "adamw" or options.frozen_layers != "as_saved"):
        raise UserError("--shard cannot be had with --optimizer adamw_8bit or --frozen-layers nf4")
    launched_with = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if launched_with or {"fsdp", "deepspeed"} & {name for name, value in options.trainer.items() if value}:
        raise UserError("a model is spread by --shard, not by settings of FSDP or DeepSpeed: leave them out")
    micro = min(options.micro_batch, share)
    if not micro or options.batch % (micro * world):
        raise UserError(f"batch {options.batch} is no multiple of micro_batch {micro} x {world} devices")
    settings: dict[str, Any] = {
        "output_dir": str(run.state),
        "num_train_epochs": options.epochs,
        "max_steps": options.steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": options.schedule,
        "weight_decay": options.weight_decay,
        **({"optim": "adamw_bnb_8bit"} if options.optimizer == "adamw_8bit" else {}),
        "bf16": in_bfloat16(options.dtype, device),
        "use_cpu": device.type == "cpu",
        "seed": options.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": options.save_steps,
        "save_total_limit": KEPT,
        "ddp_find_unused_parameters": False,  # `Together` lets every process use all of them
        "full_determinism": options.deterministic,
        "report_to": [options.report_to],
        "dataloader_num_workers": _num_workers(options, device, world),
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    try:
        arguments = TrainingArguments(**{**settings, **options.trainer})
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: {error}; see transformers.TrainingArguments for its fields") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun; DataParallel cannot split a Batch
    return arguments

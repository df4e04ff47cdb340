"""The training options that both stages share."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Literal, get_type_hints

import torch

from striate.distributed import Rank
from striate.errors import UserError, check_choices, check_seed, flag, nearest, need

# Learning rate schedules, with transformers' name of each; all start with a linear warm-up.
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "inverse_sqrt": "inverse_sqrt",
}
SHARD_NEEDS = (2, 8)  # before, a unit of FSDP2 must not hold frozen weights of another dtype than the trained ones
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "clearml", "swanlab", "dvclive")


@dataclass(frozen=True)
class TrainOptions:
    """Training options. The defaults of `tune` are the paper's, the defaults of `align` those of LLaVA's stage 1."""

    epochs: float = 1.0
    """passes over the data"""
    steps: int | None = None
    """optimizer steps, instead of epochs"""
    batch: int = 128
    """records per optimizer step, over all devices"""
    micro_batch: int = 16
    """most records per forward pass on one device; smaller needs less memory and changes nothing else"""
    learning_rate: float | None = None
    """peak learning rate; default: 2e-5 for full fine-tuning, 2e-4 for LoRA, 1e-3 for align"""
    projector_learning_rate: float | None = None
    """peak learning rate of the projector; default: 2e-5 in tune, the learning rate in align"""
    warmup: float = 0.03
    """share of the steps with a linear warm-up of the learning rate, in [0, 1)"""
    schedule: str = "cosine"
    """learning rate schedule after the warm-up: cosine, linear, constant or inverse_sqrt"""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' AdamW with 8-bit moments: 10 bytes per trained parameter instead of 16"""
    weight_decay: float = 0.0
    """weight decay, not applied to norms and biases"""
    max_grad_norm: float = 1.0
    """clip gradients to this norm; 0: no clipping"""
    max_length: int = 2048
    """most tokens per record, image tokens included; longer records are skipped and listed"""
    truncate_text: bool = False
    """truncate the text of longer records at its end instead (never an image)"""
    on_bad_record: Literal["skip", "stop"] = "skip"
    """list a bad record in skipped.jsonl and continue (up to 1 % of the data), or stop"""
    packing: Literal["auto", "on", "off"] = "auto"
    """pack records into one row instead of padding them to one length; auto: where tests on the model pass"""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """activation checkpointing of decoder layers; auto: of as few layers as memory allows"""
    frozen_layers: Literal["as_saved", "nf4"] = "as_saved"
    """dtype of frozen decoder layers during training: that of the checkpoint, or NF4 (4 bits, bitsandbytes); the saved
    checkpoint has them unchanged"""
    skip_nonfinite: int = 0
    """most steps with a NaN or Inf loss or gradient to skip before the run stops; each is listed"""
    shard: bool = False
    """shard all weights over the processes that torchrun started (FSDP2), for models that do not fit one device"""
    save_steps: int = 500
    """steps between saved states, for --resume"""
    workers: int | None = None
    """processes that read and encode records ahead; default: none on a CPU, up to 8 per GPU"""
    seed: int = 0
    """random seed of fresh weights, dropout and data order"""
    deterministic: bool = False
    """use only operations with bit-identical results on every run; slower on a GPU"""
    device: str | None = None
    """device to train on, such as cpu or cuda:0; default: the GPU if there is one"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of the GEMMs; auto: bfloat16 where the device supports it natively, else float32"""
    attn: str | None = None
    """attention implementation: sdpa, eager, flash_attention_2; default: the one transformers chooses"""
    report_to: str = "none"
    """an installed tracker to send the losses to: tensorboard, wandb, mlflow, comet_ml, ..."""

    def __post_init__(self) -> None:
        """Raises: UserError: an invalid value."""
        check_seed(self.seed)
        check_choices(get_type_hints(type(self)), vars(self))
        if self.schedule not in SCHEDULES:
            raise UserError(f"--schedule {nearest(self.schedule, SCHEDULES)}")
        for names, expected, valid in (
            ("epochs steps batch micro_batch max_length save_steps", "more than 0", lambda x: x > 0),
            ("learning_rate projector_learning_rate weight_decay max_grad_norm", "at least 0", lambda x: x >= 0),
            ("skip_nonfinite workers", "at least 0", lambda x: x >= 0),
            ("warmup", "at least 0 and less than 1", lambda x: 0 <= x < 1),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (valid(value) and math.isfinite(value)):
                    raise UserError(f"{flag(name)} {value}: {expected} was expected")
        object.__setattr__(self, "seed", int(self.seed))  # `random.Random` takes no integer of NumPy


TUNE = TrainOptions()
ALIGN = TrainOptions(batch=256)


def check_launch(options: TrainOptions, rank: Rank) -> None:
    """Raise `UserError` for options that these processes or this installation do not support, before any work."""
    if options.optimizer == "adamw_8bit":
        need("bitsandbytes", "--optimizer adamw_8bit")
    if options.frozen_layers == "nf4":
        need("bitsandbytes", "--frozen-layers nf4")
    if options.report_to != "none":
        if options.report_to not in TRACKERS:
            raise UserError(f"--report-to {nearest(options.report_to, ('none', *TRACKERS))}")
        need(options.report_to, f"--report-to {options.report_to}")
    if options.shard and rank.world_size == 1:
        raise UserError(
            "--shard needs several processes, and there is one: start them with torchrun", see="several-processes"
        )
    if options.shard and (options.optimizer != "adamw" or options.frozen_layers != "as_saved"):
        raise UserError(
            "--shard does not support --optimizer adamw_8bit or --frozen-layers nf4: leave one out",
            see="several-processes",
        )
    if options.shard and version_of(torch.__version__) < SHARD_NEEDS:
        raise UserError(
            f"--shard needs torch >= {'.'.join(map(str, SHARD_NEEDS))}, this is {torch.__version__}",
            see="several-processes",
        )
    if rank.world_size > 1 and options.device and ":" in options.device:
        raise UserError(
            f"--device {options.device}: each of several processes takes its own; leave the number out",
            see="several-processes",
        )
    if any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise UserError(
            "FSDP and DeepSpeed settings of accelerate are not supported: remove them and use --shard",
            see="several-processes",
        )
    micro_batch(options, rank)


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version such as 2.13.0+cpu, without the patch."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def micro_batch(options: TrainOptions, rank: Rank) -> int:
    """Records per forward pass on one device.

    Raises:
        UserError: the batch is not a multiple of the micro-batch times the number of devices.
    """
    micro = min(options.micro_batch, options.batch // rank.world_size)
    if not micro or options.batch % (micro * rank.world_size):
        raise UserError(
            f"--batch {options.batch} is not a multiple of --micro-batch {micro or options.micro_batch} x "
            f"{rank.world_size} device{'s' * (rank.world_size > 1)}",
            see="several-processes",
        )
    return micro


def total_steps(records: int, *, steps: int | None, epochs: float, batch: int) -> int:
    """Optimizer steps of a training run."""
    return max(1, math.ceil(epochs * math.ceil(records / batch))) if steps is None else steps


def num_workers(options: TrainOptions, device: torch.device) -> int:
    """Processes per training process that encode records ahead."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return 0 if device.type == "cpu" else max(1, min(8, cores // on_this_host - 1))

"""How to train: the options that both stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Defaults of `tune` are the paper's, those of `align` LLaVA's first stage."""

    epochs: float = 1.0
    """passes over the data"""
    steps: int | None = None
    """optimiser steps, instead of epochs"""
    batch: int = 128
    """records an optimiser step, over all devices"""
    micro_batch: int = 16
    """most records a forward pass on one device; smaller needs less memory and changes nothing else"""
    learning_rate: float | None = None
    """peak; default: 2e-5 for full tuning, 2e-4 for LoRA, 1e-3 for align"""
    projector_learning_rate: float | None = None
    """peak, for the projector; default: 2e-5 in tune, the learning rate in align"""
    warmup: float = 0.03
    """share of the steps over which the learning rate rises"""
    schedule: str = "cosine"
    """how it falls afterwards: any scheduler of transformers"""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' with moments in 8 bits: 10 bytes a trained parameter instead of 16"""
    weight_decay: float = 0.0
    """AdamW's, not on norms and biases"""
    max_length: int = 2048
    """tokens a record, image tokens included; longer ones are dropped and listed"""
    truncate_text: bool = False
    """cut the text of longer records at its end instead (never an image)"""
    on_bad_record: Literal["skip", "stop"] = "skip"
    """list it in skipped.jsonl and go on (up to 1 % of the data), or stop"""
    packing: Literal["auto", "on", "off"] = "auto"
    """records side by side in one row instead of padded to one length; auto: where the model passes the test of it"""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """decoder layers whose activations are computed again in the backward pass; auto: as many as memory asks for"""
    frozen_layers: Literal["as_saved", "nf4"] = "as_saved"
    """how decoder layers that do not train are held: as the model was saved, or in 4 bits (bitsandbytes) while others
    train; the checkpoint gets them as they were"""
    image_tokens: float = 1.0
    """share of an image's tokens, drawn at random, that most early steps show the decoder; below 1 other results"""
    compile: bool = False
    """torch.compile for every decoder layer: a minute or more before the first step, less time for each"""
    skip_nonfinite: int = 0
    """steps with a loss or gradients that are not finite to pass over before the run stops; each is listed"""
    shard: bool = False
    """spread all weights over the processes that torchrun started (FSDP2), for models that do not fit one device"""
    save_steps: int = 500
    """steps between saved states, for --resume"""
    workers: int | None = None
    """processes that read and encode records ahead; default: none on a CPU, whose cores train, else up to 8"""
    seed: int = 0
    """of fresh weights, dropout and data order"""
    deterministic: bool = False
    """only operations that give the same bytes on every run; slower on a GPU, a CPU has them anyway"""
    device: str | None = None
    """cpu to stay off a GPU"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the matrix products; auto: bfloat16 where the device has units for it, else float32"""
    attn: str | None = None
    """attention implementation of transformers: sdpa, eager, flash_attention_2; default: its choice"""
    report_to: str = "none"
    """tensorboard, wandb, ... as in transformers"""
    trainer: dict[str, Any] = field(default_factory=dict)
    """any field of transformers.TrainingArguments; wins over the options above"""


TUNE = TrainOptions()
ALIGN = TrainOptions(batch=256)

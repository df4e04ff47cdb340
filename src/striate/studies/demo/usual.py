"""The usual recipe, which the demo compares with: peft's LoRA on all layers in the plain `Trainer`, as LLaVA's scripts
have it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from striate.data import read
from striate.region import FILE, Region
from striate.runs.run import Run
from striate.runs.stage import RunLog
from striate.train import TrainOptions, in_bfloat16, lora_config
from striate.train.collator import Collator
from striate.train.memory import PeakMemory
from striate.vlm import load

RANK, ALPHA, RATE = 128, 256, 1e-3


class Steps(TrainerCallback):
    """Writes every step of a `Trainer` into a run's log."""

    def __init__(self, log: RunLog, batch: int) -> None:
        self.log, self.batch = log, batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.log.begin(0, state.max_steps, ())
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write a line."""
        if logs and "loss" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            values = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
            self.log.step({"step": state.global_step, **values, "records": self.batch, "seconds": seconds})


def tune_usually(model: Path, *, data: Path, images: Path, out: Path, options: TrainOptions) -> Run:
    """Tune adapters of rank 128 on all layers, and the projector; the run has what one of `striate tune` has.

    Of `options` it takes the steps, the batch, the seed, and attention; the learning rate is one for adapters.
    """
    asked = {"region": "all", "method": "lora", "trainer": "transformers.Trainer", "rank": RANK, "alpha": ALPHA}
    used = {"steps": options.steps, "batch": options.batch, "attn": options.attn, "learning_rate": RATE}
    run = Run.create(
        out, verb="tune", options={"model": str(model), "data": str(data), **asked, **used}, seed=options.seed,
        parent=str(model),
    )  # fmt: skip
    with run.recording():
        vlm = load(model, device="cpu", attn=options.attn)
        region, records = Region.parse("all", vlm.depth), read(data, images=images)
        run.write_region(region)
        network = get_peft_model(vlm.model, lora_config(vlm, region, rank=RANK, alpha=ALPHA))
        settings = TrainingArguments(
            str(run.path / "trainer"), max_steps=options.steps or -1, per_device_train_batch_size=options.batch,
            learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=options.warmup, seed=options.seed,
            bf16=in_bfloat16(options.dtype, torch.device("cpu")), use_cpu=True, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        steps = Steps(RunLog(run, bar=False), options.batch)
        trainer = Trainer(
            network, settings, train_dataset=records, data_collator=Collator(vlm, max_length=options.max_length),
            callbacks=[steps],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        trainer.train()
        seconds, seen = run.history()[-1]["seconds"], trainer.state.max_steps * options.batch
        training = {
            "method": "lora", "steps": trainer.state.max_steps, "samples": seen, "records": len(records),
            "seconds": seconds, "samples_per_second": round(seen / seconds, 3),
            "peak_memory_gb": round(memory.gigabytes(), 4),
            "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        }  # fmt: skip
        network.merge_and_unload()
        run.update(training=training | {"total_parameters": sum(p.numel() for p in vlm.model.parameters())})
        vlm.model.save_pretrained(run.checkpoint)
        vlm.processor.save_pretrained(run.checkpoint)
        region.save(run.checkpoint / FILE)
    return run

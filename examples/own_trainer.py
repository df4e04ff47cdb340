"""Region training inside a trainer of your own: TRL's SFTTrainer with striate's LoRA configuration.

    pip install striate trl datasets
    python examples/own_trainer.py MODEL DATA.json OUT

striate says which modules to adapt, by exact name; everything else is TRL's. DATA is a LLaVA-style JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from trl import SFTConfig, SFTTrainer

import striate
from striate.data import read


def train(
    model: str | Path, data: str | Path, out: str | Path, *, region: str = "uniform:25%", steps: int = -1
) -> None:
    """Tune LoRA adapters on a region and save them, with the projector, as a peft adapter folder."""
    vlm = striate.load(model, dtype="float32")
    chosen = striate.Region.parse(region, vlm.depth)
    trainer = SFTTrainer(
        model=vlm.model,
        processing_class=vlm.processor,
        train_dataset=conversations(data),
        peft_config=striate.lora_config(vlm, chosen, rank=16, alpha=32),
        args=SFTConfig(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-4, max_length=None,
            report_to="none", save_strategy="no", bf16=False, assistant_only_loss=False,
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))


def conversations(data: str | Path) -> Dataset:
    """Records as TRL takes them: messages, and the images that they name."""
    rows = [
        {"messages": list(record.messages), "images": [str(image) for image in record.images]} for record in read(data)
    ]
    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    return Dataset.from_list(rows, features=Features({"messages": List(message), "images": List(Image())}))


if __name__ == "__main__":
    train(*sys.argv[1:4])

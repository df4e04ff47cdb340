"""The demo's tower: a small SigLIP that predicts what every patch of an image shows."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from lessons import label_patches, random_text
from schedule import cosine, save_rounded
from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from striate.studies.demo import scene as rendering
from striate.studies.demo.scene import GROUNDS, PLACES, WORDS, Scene

log = logging.getLogger("tower")
LABELS = {
    "kind": 1 + len(WORDS),
    "character": 1 + len(rendering.CHARACTERS),
    "ground": len(GROUNDS),
    "place": len(PLACES),
}


def tower_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=5,
        image_size=rendering.SIDE,
        patch_size=rendering.PATCH,
        vision_use_head=False,
    )


def scene_batch(rng: Random, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (B, 3, 96, 96) in -1..1, as the image processor makes them, and patch labels (B, 36) by name.

    Signs are random characters, so that the tower learns letters and no words.
    """
    texts = tuple(random_text(rng) for _ in range(size))
    scenes = [rendering.sample_scene(rng, "train", signs=texts) for _ in range(size)]
    return pixels_of(scenes), labels_of(scenes)


def pixels_of(scenes: list[Scene]) -> Tensor:
    array = np.stack([np.asarray(rendering.draw(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    labels = [label_patches(scene) for scene in scenes]
    return {name: torch.from_numpy(np.stack([getattr(one, name) for one in labels])) for name in LABELS}


def patch_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum over the label sets of the mean cross-entropy; blank patches, which most are, count a fifth."""
    total = torch.zeros(())
    for name, target in labels.items():
        weight = torch.ones(LABELS[name])
        if name in ("kind", "character"):
            weight[0] = 0.2
        total = total + nn.functional.cross_entropy(logits[name].float().flatten(0, -2), target.flatten(), weight)
    return total


def train_tower(folder: Path, *, seed: int, steps: int = 1200, batch: int = 64, peak: float = 2e-3) -> None:
    """Dense supervision: every patch tells its kind, character, ground and place."""
    torch.manual_seed(seed)
    rng, tower = Random(f"tower {seed}"), SiglipVisionModel(tower_config())
    tower.set_attn_implementation("eager")  # on a CPU twice as fast to train as SDPA
    heads = nn.ModuleDict({name: nn.Linear(tower.config.hidden_size, size) for name, size in LABELS.items()})
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine(step, steps)
        pixels, labels = scene_batch(rng, batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels).last_hidden_state
            logits = {name: head(features) for name, head in heads.items()}
        loss = patch_loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = {name: accuracy(logits[name], labels[name]) for name in LABELS}
            log.info("tower %d/%d loss %.3f %s %.0f s", step, steps, loss.item(), right, time.time() - start)
        if step % 400 == 399 or step == steps - 1:
            save_tower(tower, folder / "tower")


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of right patches among those that show something (label > 0)."""
    shown = target > 0
    return round((logits.argmax(-1) == target)[shown].float().mean().item(), 3)


def save_tower(tower: SiglipVisionModel, folder: Path) -> None:
    save_rounded(tower, folder)
    side = {"height": rendering.SIDE, "width": rendering.SIDE}
    SiglipImageProcessorPil(size=side).save_pretrained(folder)

"""The demo's projector: what a patch shows, in the word embeddings of the language model."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from random import Random

import torch
from reading import word_ids
from safetensors.torch import save_file
from schedule import cosine
from torch import Tensor, nn
from tower import LABELS, accuracy, patch_loss, scene_batch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionModel

from striate.studies.demo.scene import CHARACTERS, GROUNDS, PLACES, WORDS

log = logging.getLogger("projector")


class Projector(nn.Module):
    """`LlavaMultiModalProjector`, with its weights' names: two linear layers and a GELU."""

    def __init__(self, vision: int, text: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision, text)
        self.linear_2 = nn.Linear(text, text)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


def align_projector(folder: Path, *, seed: int, steps: int = 4000, batch: int = 2048, peak: float = 3e-3) -> None:
    """Regress each patch on the sum of the embeddings of the words for what it shows; classify it by them.

    This is not the captioning of LLaVA's first stage, which needs more data than a demo has; it makes the
    same thing, a projector whose output lies where the language model's words lie.
    """
    torch.manual_seed(seed)
    words, start = word_embeddings(folder / "backbone"), time.time()
    features, labels = feature_bank(folder / "tower", Random(f"projector {seed}"), 6144)
    projector = Projector(features.shape[1], words["kind"].shape[1])
    whiten(projector.linear_1, features)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=peak, weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine(step, steps)
        picked = torch.randint(len(features), (batch,))
        projected, shown = projector(features[picked]), {name: labels[name][picked] for name in LABELS}
        loss = alignment_loss(projected, shown, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == steps - 1:
            found = {name: accuracy(nearest(projected, words[name]), shown[name]) for name in LABELS}
            log.info("projector %d/%d loss %.3f %s %.0f s", step, steps, loss.item(), found, time.time() - start)
    (folder / "projector").mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16) for name, value in projector.state_dict().items()}
    save_file(state, folder / "projector" / "projector.safetensors")


@torch.no_grad()
def feature_bank(folder: Path, rng: Random, scenes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Patch features (N, D) as Llava takes them, of the last layer before its norm, and labels (N,)."""
    tower = SiglipVisionModel.from_pretrained(folder, dtype=torch.bfloat16)
    features, labels = [], []
    for _ in range(scenes // 64):
        pixels, shown = scene_batch(rng, 64)
        features.append(tower(pixels.bfloat16(), output_hidden_states=True).hidden_states[-1].float().flatten(0, 1))
        labels.append(shown)
    return torch.cat(features), {name: torch.cat([one[name].flatten() for one in labels]) for name in LABELS}


@torch.no_grad()
def whiten(linear: nn.Linear, features: Tensor) -> None:
    """Start a layer on whitened features: a few of a tower's channels are so large that they hide others."""
    mean, covariance = features.mean(0), features.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    linear.weight.copy_(torch.randn_like(linear.weight) / len(values) ** 0.5 @ (vectors / (values + 1e-4).sqrt()).T)
    linear.bias.copy_(-linear.weight @ mean)


def word_embeddings(folder: Path) -> dict[str, Tensor]:
    """For each label set, the summed input embeddings (label, D) of every label's words; zero for nothing."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    table = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight.detach()

    def embed(text: str) -> Tensor:
        return table[[token for word in text.split() for token in word_ids(word, tokenizer)]].sum(0)

    nothing = torch.zeros(1, table.shape[1])
    characters = table[tokenizer.convert_tokens_to_ids(list(CHARACTERS))]
    return {
        "kind": torch.cat([nothing, torch.stack([embed(word) for word in WORDS])]),
        "character": torch.cat([nothing, characters]),
        "ground": torch.stack([embed(ground) for ground in GROUNDS]),
        "place": torch.stack([embed(place) for place in PLACES]),
    }


def alignment_loss(projected: Tensor, labels: dict[str, Tensor], words: dict[str, Tensor]) -> Tensor:
    """Squared error to the sum of the words, in units of its variance, plus cross-entropy per label set."""
    target = sum(words[name][labels[name]] for name in LABELS)
    error = (projected - target).square().mean() / target.var()
    return error + 0.1 * patch_loss({name: nearest(projected, words[name]) for name in LABELS}, labels)


def nearest(projected: Tensor, words: Tensor) -> Tensor:
    """Logits (N, label): how much more of a word than of its set's average word a projected patch holds."""
    centered = words - words[words.abs().sum(1) > 0].mean(0) * (words.abs().sum(1, keepdim=True) > 0)
    return projected @ (centered / words.norm(dim=1).max().square()).T * 10

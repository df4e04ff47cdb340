"""Make the demo's pretrained parts from nothing: a tower that sees, a language model, a projector between.

`python scripts/make_demo_models.py` makes all three, in order; `--only projector` makes one of them, from the others
as they are on disk. It takes about 18 minutes on two CPU cores with bf16 matrix units. It needs the extra `demo`, a
C++ compiler (for `torch.compile`) and torch >= 2.9 (for `torch.optim.Muon`).
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import re
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from striate.demo import prose
from striate.demo import scene as pictures
from striate.demo.lexicon import GROUNDS, PLACES, WORDS
from striate.demo.questions import converse
from striate.demo.scene import Scene
from striate.demo.world import VISUAL_TASKS, sample_question

log = logging.getLogger("make_demo_models")
MODELS = Path(__file__).parent.parent / "src" / "striate" / "demo" / "models"
LABELS = {
    "kind": 1 + len(WORDS),
    "character": 1 + len(pictures.CHARACTERS),
    "ground": len(GROUNDS),
    "place": len(PLACES),
}
LENGTH = 128  # tokens, of a row of text
IGNORED = -100  # label of a token that the loss leaves out


def cosine(step: int, steps: int, *, warmup: int = 50) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def tower_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=5,
        image_size=pictures.SIDE,
        patch_size=pictures.PATCH,
        vision_use_head=False,
    )


def scene_batch(rng: Random, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (B, 3, 96, 96) in -1..1, as the image processor makes them, and patch labels (B, 36) by name.

    Signs are random characters, so that the tower learns letters and no words.
    """
    texts = tuple(pictures.random_text(rng) for _ in range(size))
    scenes = [pictures.sample_scene(rng, "train", signs=texts) for _ in range(size)]
    return pixels_of(scenes), labels_of(scenes)


def pixels_of(scenes: list[Scene]) -> Tensor:
    array = np.stack([np.asarray(pictures.draw(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    labels = [pictures.label_patches(scene) for scene in scenes]
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
            save_tower(tower, folder)


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of right patches among those that show something (label > 0)."""
    shown = target > 0
    return round((logits.argmax(-1) == target)[shown].float().mean().item(), 3)


def save_tower(tower: SiglipVisionModel, folder: Path) -> None:
    save_rounded(tower, folder)
    side = {"height": pictures.SIDE, "width": pictures.SIDE}
    SiglipImageProcessorPil(size=side).save_pretrained(folder)


def save_rounded(model: PreTrainedModel, folder: Path) -> None:
    """Save a copy in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKS = ("<user>", "<assistant>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the world; other words, such as a sign's or a number's, are spelled."""
    rng, words = Random("vocabulary"), set()
    for _ in range(20_000):
        words |= {word for text, _ in document(rng, "train", signs=("1",)) for word in text.split()}
    words = sorted(word for word in words if not re.search(r"\d\d|<", word)) + list("0123456789")
    pieces = [
        *SPECIAL.values(),
        *MARKS,
        "\u2581",
        *pictures.CHARACTERS,
        *(f"\u2581{word}" for word in dict.fromkeys(words)),
    ]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
        **SPECIAL,
    )
    fast.add_special_tokens({"additional_special_tokens": list(MARKS[:2])}, replace_extra_special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


Document = list[tuple[str, bool]]  # pieces of text; True where the loss looks


def document(rng: Random, split: str, *, signs: tuple[str, ...] = (), echo: float = 0.05) -> Document:
    """One text of the text world: mostly a scene in words with questions; else facts, sums or a story.

    The share `echo` is words to say after: nothing in a scene is looked up before that is learnt.
    """
    signs = signs or (pictures.random_text(rng),)
    if rng.random() < echo:
        words = " ".join(rng.choices((*WORDS, *GROUNDS, *signs), k=rng.randint(4, 16)))
        return dialogue([(f"say {words} .", words)])
    chance = rng.random()
    if chance < 0.10:
        return [("<s>", False), (prose.story(rng, split), True), ("</s>", True)]
    if chance < 0.60:
        turns = scene_turns(rng, split, signs)
    elif chance < 0.85:
        turns = [prose.fact(rng) for _ in range(4)]
    else:
        turns = [prose.arithmetic(rng, split) for _ in range(3)]
    return dialogue(turns)


def scene_turns(rng: Random, split: str, signs: tuple[str, ...]) -> list[tuple[str, str]]:
    """Questions and answers about a scene; the first question comes after the scene in words."""
    asked = None
    while not asked:
        scene = pictures.sample_scene(rng, split, signs=signs)
        if rng.random() < 0.4:  # with less to tell apart, looking up is learnt sooner
            scene = replace(scene, things=tuple(word if rng.random() < 0.5 else None for word in scene.things))
        asked = [question for _, question in converse(scene, rng, turns=5, train=False)]
    first, *others = [(question.text, question.answer) for question in asked]
    return [(f"{prose.describe(scene, rng)} {first[0]}", first[1]), *others]


def dialogue(turns: list[tuple[str, str]]) -> Document:
    """What the chat template makes of questions and answers; only the answers and their ends are learnt."""
    pieces: Document = [("<s>", False)]
    for question, answer in turns:
        pieces += [
            ("<user>", False),
            (question, False),
            ("<assistant>", False),
            (answer, True),
            ("</s>", True),
        ]
    return pieces


def encode(text: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels of a document."""
    ids, labels = [], []
    for piece, learnt in text:
        tokens = [token for word in piece.split() for token in word_ids(word, tokenizer)]
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return ids, labels


@cache
def word_ids(word: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(word, add_special_tokens=False)["input_ids"]


@dataclass
class TextBatch:
    """Rows of whole documents; no token sees another document, and positions start anew in each."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    weights: Tensor  # (B, T), of the loss
    positions: Tensor  # (B, T)
    owner: Tensor  # (B, T), number of the document; 0 where there is none

    @property
    def mask(self) -> Tensor:
        """What is added to the attention logits (B, 1, T, T)."""
        seen = (self.owner[:, None, :, None] == self.owner[:, None, None, :]).tril()
        return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e4)


def text_batch(rng: Random, tokenizer: PreTrainedTokenizerFast, *, rows: int, echo: float) -> TextBatch:
    """Random training documents; the loss sees answers and stories in full, other text by a fifth."""
    ids = torch.full((rows, LENGTH), tokenizer.pad_token_id)
    batch = TextBatch(ids, torch.full_like(ids, IGNORED), torch.zeros(ids.shape), torch.zeros_like(ids), ids * 0)
    for row in range(rows):
        filled = 0
        for number in range(1, 9):  # documents that no longer fit are dropped
            tokens, labels = (torch.tensor(some) for some in encode(document(rng, "train", echo=echo), tokenizer))
            if (end := filled + len(tokens)) > LENGTH:
                continue
            span = (row, slice(filled, end))
            batch.ids[span], batch.labels[span], batch.owner[span] = tokens, tokens, number
            batch.labels[row, filled] = IGNORED
            batch.weights[span] = torch.where(labels == IGNORED, 0.2, 1.0)
            batch.positions[span] = torch.arange(len(tokens))
            filled = end
    return batch


def backbone_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def text_loss(model: LlamaForCausalLM, decoder: nn.Module, batch: TextBatch) -> Tensor:
    """Weighted mean cross-entropy of the next token; `decoder` is the model's own, perhaps compiled."""
    with torch.autocast("cpu", torch.bfloat16):
        states = decoder(batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        learnt = batch.labels[:, 1:] != IGNORED
        logits = model.lm_head(states.last_hidden_state[:, :-1][learnt]).float()
    losses = nn.functional.cross_entropy(logits, batch.labels[:, 1:][learnt], reduction="none")
    weights = batch.weights[:, 1:][learnt]
    return (losses * weights).sum() / weights.sum()


def train_backbone(folder: Path, *, seed: int, steps: int = 2400, rows: int = 16) -> None:
    """A Llama that has read the text world: it knows facts and can read, and looks some things up in scenes."""
    torch.manual_seed(seed)
    rng, tokenizer = Random(f"backbone {seed}"), build_tokenizer()
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM(backbone_config(tokenizer))
    initialise(model)
    model.set_attn_implementation("eager")  # on a CPU faster to train than SDPA
    decoder, start = torch.compile(model.model, dynamic=False), time.time()
    optimizers = backbone_optimizers(model)
    for step in range(steps):
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * cosine(step, steps)
            optimizer.zero_grad()
        batch = text_batch(rng, tokenizer, rows=rows, echo=1.0 if step < 150 else 0.05)
        loss = text_loss(model, decoder, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 100 == 0:
            log.info("backbone %d/%d loss %.3f %.0f s", step, steps, loss.item(), time.time() - start)
        if step % 400 == 399 or step == steps - 1:
            log.info("backbone validation %s", text_quality(model, tokenizer))
            save_rounded(model, folder)


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Layers that start as the identity, with unit-gain inputs: the tokens are seen through all of them at once."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif "embed_tokens" in name:
            weight.normal_(0, 0.3)
        elif "lm_head" in name:
            weight.normal_(0, 0.01)
        elif weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)


def backbone_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for the rest, with their peak learning rates.

    With AdamW alone this small model needs thousands of steps before it can copy a word; with Muon a hundred.
    """
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    owned = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in owned]
    return [
        (torch.optim.Muon(layers, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), 0.01),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 4e-3),
    ]


@torch.no_grad()
def text_quality(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, number: int = 100) -> dict[str, float]:
    """Percent of right answers (every token the likeliest) by validation task; stories: perplexity."""
    rng, documents = Random("quality"), {}
    for task in VISUAL_TASKS:
        asked = [sample_question(rng, task, "validation") for _ in range(number)]
        documents[task] = [dialogue([(f"{prose.describe(scene, rng)} {q}", a)]) for scene, q, a in asked]
    documents["facts"] = [dialogue([prose.fact(rng)]) for _ in range(number)]
    documents["arithmetic"] = [dialogue([prose.arithmetic(rng, "validation")]) for _ in range(number)]
    quality = {task: 100 * exact_share(model, tokenizer, some) for task, some in documents.items()}
    stories = [[("<s>", False), (prose.story(rng, "validation"), True)] for _ in range(50)]
    ids, labels = padded(tokenizer, stories)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    perplexity = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED).exp().item()
    return {task: round(value, 1) for task, value in quality.items()} | {"stories": round(perplexity, 2)}


def exact_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> float:
    ids, labels = padded(tokenizer, documents)
    right = (model(ids).logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return right.all(1).float().mean().item()


def padded(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> tuple[Tensor, Tensor]:
    """Ids and labels of documents, one a row."""
    rows = [encode(one, tokenizer) for one in documents]
    ids = [torch.tensor(tokens) for tokens, _ in rows]
    labels = [torch.tensor(targets) for _, targets in rows]
    return (
        nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


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
    characters = table[tokenizer.convert_tokens_to_ids(list(pictures.CHARACTERS))]
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
    centred = words - words[words.abs().sum(1) > 0].mean(0) * (words.abs().sum(1, keepdim=True) > 0)
    return projected @ (centred / words.norm(dim=1).max().square()).T * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tower", "backbone", "projector"], help="make one part")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(2)
    if options.only in (None, "tower"):
        train_tower(options.out / "tower", seed=options.seed)
    if options.only in (None, "backbone"):
        train_backbone(options.out / "backbone", seed=options.seed)
    if options.only in (None, "projector"):
        align_projector(options.out, seed=options.seed)


if __name__ == "__main__":
    main()

"""The demo's language model: a small Llama, wired for looking things up and then taught to read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from lessons import describe
from reading import IGNORED, LESSONS, Document, Lesson, TextBatch, build_tokenizer, dialogue, encode, text_batch
from schedule import cosine, save_rounded
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from striate.studies.demo.world import VISUAL_TASKS, arithmetic, fact, sample_question, story

log = logging.getLogger("backbone")
EMBEDDED = 0.3  # standard deviation of the word embeddings at the start


def backbone_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        max_position_embeddings=512,
        attention_bias=True,  # a head that looks a fixed number of tokens back needs one
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_backbone(folder: Path, *, seed: int, rows: int = 32) -> None:
    """A Llama that has read the text world: it knows facts and sums, and looks up scenes described in words."""
    torch.manual_seed(seed)
    rng, tokenizer = Random(f"backbone {seed}"), build_tokenizer()
    tokenizer.save_pretrained(folder / "backbone")
    model = LlamaForCausalLM(backbone_config(tokenizer))
    initialize(model)
    wire(model)
    model.set_attn_implementation("eager")  # on a CPU faster to train than SDPA
    decoder, start = torch.compile(model.model, dynamic=False), time.time()
    optimizers, steps = backbone_optimizers(model), sum(lesson.steps for lesson in LESSONS)
    for step, lesson in enumerate(schooling()):
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * cosine(step, steps)
            optimizer.zero_grad()
        loss = text_loss(model, decoder, text_batch(rng, tokenizer, lesson, rows=rows))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            log.info("backbone %d/%d loss %.3f %.0f s", step, steps, loss.item(), time.time() - start)
            log.info("backbone validation %s", text_quality(model, tokenizer))
    save_rounded(model, folder / "backbone")


def schooling() -> Iterator[Lesson]:
    """The lesson of every step."""
    for lesson in LESSONS:
        yield from [lesson] * lesson.steps


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Layers that start as the identity, with unit-gain inputs: the tokens are seen through all of them at once."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
            weight.zero_()
        elif "embed_tokens" in name:
            weight.normal_(0, EMBEDDED)
        elif weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
    # What the last state holds of a word speaks for the word from the start.
    model.lm_head.weight.copy_(model.model.embed_tokens.weight * (0.02 / EMBEDDED))


@torch.no_grad()
def wire(model: LlamaForCausalLM) -> None:
    """Heads that start near what looking up needs (after Trockman and Kolter 2023, arXiv 2305.09828).

    The heads of the first layer look 1, 2 and 3 tokens back and write what they find into random directions; those of
    the other layers look at tokens that resemble this one, but are not next to it, and pass them on. Left to
    itself, a model this small did not find that in 2,400 steps; from here, lists are looked up after 150.
    """
    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    theta = 10_000.0 ** (-torch.arange(size // 2) / (size // 2))  # radians a token, of the rotary dimensions
    fast = theta > 0.1  # those that distinguish neighbors
    for index, layer in enumerate(model.model.layers):
        heads, basis = layer.self_attn, torch.linalg.qr(torch.randn(width, width))[0]
        for head in range(config.num_attention_heads):
            rows = slice(head * size, (head + 1) * size)
            if index == 0:
                query, key = look_back(head + 1, theta, fast)
                heads.q_proj.weight[rows] *= 0.3
                heads.k_proj.weight[rows] *= 0.3
                heads.o_proj.weight[:, rows] = torch.randn(width, size) * 0.15 * size**-0.5
            else:
                query, key = look_far(fast)
                alike = 2 * torch.randn(size, width)
                alike[fast.repeat(2)] = 0
                for projection in (heads.q_proj, heads.k_proj):
                    projection.weight[rows] = (alike + 0.1 * torch.randn(size, width)) * width**-0.5
                heads.v_proj.weight[rows] = basis[:, rows].T
                heads.o_proj.weight[:, rows] = basis[:, rows] * EMBEDDED * 0.3
            heads.q_proj.bias[rows], heads.k_proj.bias[rows] = query, key


def look_back(tokens: int, theta: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key biases (head size) whose product after rotation is largest so many `tokens` back."""
    angle, strength = -tokens * theta, 4.5 * fast
    return torch.cat([strength * angle.cos(), strength * angle.sin()]), torch.cat([strength, torch.zeros_like(theta)])


def look_far(fast: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key biases (head size) whose product after rotation is smallest at the token itself."""
    key = torch.cat([4.0 * fast, torch.zeros(len(fast))])
    return -key, key


def text_loss(model: LlamaForCausalLM, decoder: nn.Module, batch: TextBatch) -> Tensor:
    """Weighted mean cross-entropy of the next token; `decoder` is the model's own, perhaps compiled."""
    with torch.autocast("cpu", torch.bfloat16):
        states = decoder(batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        learned = batch.weights[:, 1:] > 0
        logits = model.lm_head(states.last_hidden_state[:, :-1][learned]).float()
    losses = nn.functional.cross_entropy(logits, batch.ids[:, 1:][learned], reduction="none")
    weights = batch.weights[:, 1:][learned]
    return (losses * weights).sum() / weights.sum()


def backbone_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for the rest, with their peak learning rates.

    With AdamW alone this small model needs thousands of steps before it can copy a word; with Muon a hundred.
    """
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    owned = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in owned]
    return [
        (torch.optim.Muon(layers, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), 0.003),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 2e-3),
    ]


@torch.no_grad()
def text_quality(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, number: int = 100) -> dict[str, float]:
    """Percent of right answers (every token the likeliest) by validation task; stories: perplexity."""
    rng, documents = Random("quality"), {}
    for task in VISUAL_TASKS:
        asked = [sample_question(rng, task, "validation") for _ in range(number)]
        documents[task] = [dialogue([(f"{describe(scene, rng)} {q}", a)]) for scene, q, a in asked]
    documents["facts"] = [dialogue([fact(rng)]) for _ in range(number)]
    documents["arithmetic"] = [dialogue([arithmetic(rng, "validation")]) for _ in range(number)]
    quality = {task: 100 * exact_share(model, tokenizer, some) for task, some in documents.items()}
    stories = [[("<s>", False), (story(rng, "validation"), True)] for _ in range(50)]
    ids, labels = pad(tokenizer, stories)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    perplexity = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED).exp().item()
    return {task: round(value, 1) for task, value in quality.items()} | {"stories": round(perplexity, 2)}


def exact_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> float:
    ids, labels = pad(tokenizer, documents)
    right = (model(ids).logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return right.all(1).float().mean().item()


def pad(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> tuple[Tensor, Tensor]:
    """Ids and labels of documents, one per row."""
    rows = [encode(one, tokenizer) for one in documents]
    ids = [torch.tensor(tokens) for tokens, _ in rows]
    labels = [torch.tensor(targets) for _, targets in rows]
    return (
        nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )

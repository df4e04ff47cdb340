"""Scores of what goes through the layers, all from one forward pass: how far hidden states turn, where attention goes.

Every score is a function of tensors. `States` feeds them: it watches the layers and keeps a few numbers a sample.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import ExitStack

import torch
from torch import Tensor

from striate.data import IGNORED, Batch
from striate.errors import UserError
from striate.score.replay import at_rest
from striate.score.table import Metric, Score
from striate.trace import Attention, forward, watch_attention, watch_layers
from striate.vlm import Vlm

CACHED = 1 << 18
"""Numbers of a hidden state taken at a time on a CPU: 1 MB."""

_WANG = "Wang et al. 2025 (arXiv 2412.12785)"

_ANY, _SIGHT = ("records",), ("records", "images")

METRICS = {
    metric.name: metric
    for metric in (
        Metric("block_influence", needs=_ANY, range="0..2", source="Men et al. 2024 (arXiv 2403.03853), BI"),
        Metric("multimodal_block_influence", needs=_SIGHT, range="0..2", source=f"{_WANG}, multimodal BI"),
        Metric("angular_distance", needs=_ANY, range="0..1", source="Gromov et al. 2024 (arXiv 2403.17887), eq. 7"),
        Metric("image_attention", needs=_SIGHT, range="0..1", source=f"{_WANG}, figure 5"),
    )
}


def cosine(entering: Tensor, leaving: Tensor) -> Tensor:
    """Cosine of the angle by which each token's hidden state turns: <a, b> / sqrt(<a, a> <b, b>).

    `entering` and `leaving` [..., D] -> [...], float64, in [-1, 1]; exactly 1 where they are the same, 0 where either
    is all zeros, NaN where either is not finite. Sums run in float32 at least, whatever the model's type.
    """
    dim = entering.shape[-1]
    # A processor is twice as fast on pieces that stay in its cache; a GPU is not.
    size = max(1, CACHED // dim) if entering.device.type == "cpu" else max(1, entering.numel())
    pairs = zip(entering.reshape(-1, dim).split(size), leaving.reshape(-1, dim).split(size), strict=True)
    return torch.cat([_cosine(*pair) for pair in pairs]).view(entering.shape[:-1])


def _cosine(entering: Tensor, leaving: Tensor) -> Tensor:
    a, b = (states if states.dtype == torch.float64 else states.float() for states in (entering, leaving))
    dot, aa, bb = (torch.linalg.vecdot(*pair).double() for pair in ((a, b), (a, a), (b, b)))
    return (dot / (aa * bb).sqrt().clamp(min=torch.finfo(torch.float32).tiny)).clamp(-1, 1)


def block_influence(cosines: Tensor, tokens: Tensor) -> Tensor:
    """1 - mean over tokens t of cos(h(l, t), h(l+1, t)): how far a layer turns hidden states.

    `cosines` [..., B, T] as `cosine` makes them of the states that enter and leave the layer, `tokens` [B, T] true at
    those that count -> [..., B], in [0, 2], NaN for samples without any. High: important. The score is the mean over
    samples of this, so that a long sample counts no more than a short one.

    Men et al. 2024, ShortGPT (arXiv 2403.03853), the definition of BI.
    """
    return 1 - mean(cosines, tokens)


def multimodal_block_influence(cosines: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """1 - (mean cosine of the image tokens + mean cosine of the text tokens) / 2.

    Block influence in which the two modalities weigh the same, however many tokens they have. `cosines` [..., B, T],
    `image` and `text` [B, T] true at their tokens -> [..., B], in [0, 2], NaN for samples without the one or the
    other. High: important.

    Wang et al. 2025 (arXiv 2412.12785), "multimodal BI".
    """
    return 1 - (mean(cosines, image) + mean(cosines, text)) / 2


def angular_distance(states: Tensor) -> Tensor:
    """(1/pi) arccos cos(h(l, T), h(l+n, T)) for every block of n layers from layer l on, T the sample's last token.

    `states` [B, L+1, D]: what enters layers 0 to L-1 at the last token, and what leaves the last layer, before the
    final norm -> [B, L, L], entry [start][length - 1], in [0, 1], NaN where a block would end beyond the last layer.
    High: important; the block of n layers to drop starts where column n - 1 is lowest.

    Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887), equation 7.
    """
    exact = states.double()  # near 1 arccos magnifies rounding: 1e-7 in the cosine is 4e-4 in the angle
    products = exact @ exact.transpose(1, 2)  # B L+1 L+1
    squares = products.diagonal(dim1=1, dim2=2)
    norms = (squares[:, :, None] * squares[:, None, :]).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    angles = (products / norms).clamp(-1, 1).arccos() / math.pi
    depth = states.shape[1] - 1
    ends = torch.arange(depth, device=states.device)[:, None] + torch.arange(1, depth + 1, device=states.device)
    blocks = angles[:, :-1].gather(2, ends.clamp(max=depth).expand(len(angles), -1, -1))
    return blocks.masked_fill(ends > depth, math.nan)


def image_attention(given: Tensor, tokens: Tensor, image: Tensor) -> Tensor:
    """Mean over query tokens of the share of their attention that falls on image tokens, itself a mean over heads.

    `given` [..., B, T]: that share, as in `Attention`; `tokens` [B, T] true at the query tokens that count, `image`
    [B, T] at image tokens -> [..., B], in [0, 1], NaN for samples without the one or the other. Text before the image
    counts, with the 0 it has in a causal model. High: important.

    Wang et al. 2025 (arXiv 2412.12785), figure 5 (no released code).
    """
    return mean(given, tokens).masked_fill(~image.any(dim=1), math.nan)


def mean(values: Tensor, tokens: Tensor) -> Tensor:
    """Mean of `values` [..., B, T] at the `tokens` [B, T] that are true -> [..., B], float64, NaN where none is."""
    return values.double().where(tokens, 0).sum(dim=-1) / tokens.sum(dim=-1)


def token_kinds(batch: Batch) -> dict[str, Tensor]:
    """Masks [B, T] of the kinds of token: image, prompt, answer, and text = prompt and answer. Padding is of none."""
    attended = batch.inputs["attention_mask"].bool()
    image = batch.image_mask & attended
    answer = (batch.labels != IGNORED) & attended & ~image
    text = attended & ~image
    return {"image": image, "prompt": text & ~answer, "answer": answer, "text": text}


class States:
    """The scores of `METRICS` that are named, batch by batch, one forward pass each.

    At any time, `scores` are those of the batches until then. Kept are a few numbers a sample and layer.
    """

    def __init__(self, vlm: Vlm, names: Collection[str]) -> None:
        self.vlm = vlm
        self.metrics = [METRICS[name] for name in names]
        self.kept: list[tuple[Samples, Tensor, int]] = []  # by batch; the blocks summed over its samples, their number

    def add(self, batch: Batch) -> None:
        """Measure one batch, which is on the model's device.

        Raises:
            UserError: NaN or infinity in the hidden states, with the first layer that has it; a model whose
                attention cannot be watched, when that is asked for.
        """
        if not len(batch):
            return
        attention = any(metric.name == "image_attention" for metric in self.metrics)
        with at_rest(self.vlm.model):
            seen = _watched(self.vlm, batch, attention=attention)
        blocks = angular_distance(seen.ends).cpu()  # B L L
        self.kept.append((_by_sample(seen, blocks), blocks.sum(dim=0), len(batch)))

    def scores(self) -> list[Score]:
        """The scores of the batches so far."""
        return [self._score(metric) for metric in self.metrics]

    def _score(self, metric: Metric) -> Score:
        none = torch.empty(0, self.vlm.depth)
        found = [samples[metric.name] for samples, _, _ in self.kept] or [{"all": none}]
        parts = {part: torch.cat([one[part] for one in found]) for part in found[0]}
        table = None
        if metric.name == "angular_distance" and self.kept:
            _, blocks, numbers = zip(*self.kept, strict=True)
            table = tuple(tuple(row) for row in (torch.stack(blocks).sum(dim=0) / sum(numbers)).tolist())
        return Score.of_samples(metric, parts.pop("all"), parts=parts, table=table)


Samples = dict[str, dict[str, Tensor]]  # score -> kind of token, or "all" -> [B, L]


class _Seen:
    """What the watch of one batch leaves: a number a token and layer, and the hidden states of the last tokens.

    A layer that does not run (mllama's cross-attention without an image) turns nothing; one without self-attention
    has no attention to give.
    """

    def __init__(self, depth: int, batch: Batch) -> None:
        self.kinds = token_kinds(batch)
        self.attended = self.kinds["image"] | self.kinds["text"]  # B T
        shape, device = (depth, *self.attended.shape), self.attended.device
        self.cosines = torch.ones(shape, dtype=torch.float64, device=device)
        self.given = torch.full(shape, math.nan, device=device)
        self.embedded = self.ends = torch.empty(0, device=device)
        self.looked = False
        last = (self.attended * torch.arange(shape[2], device=device)).argmax(dim=1)
        self._last = torch.arange(len(last), device=device), last

    def layer(self, layer: int, entering: Tensor, leaving: Tensor) -> None:
        self.cosines[layer] = cosine(entering, leaving)
        if layer == 0:
            self.embedded = cosine(entering, entering)  # B T
            self.ends = entering.new_full((len(entering), len(self.cosines) + 1, entering.shape[-1]), math.nan)
        self.ends[:, layer], self.ends[:, layer + 1] = entering[self._last], leaving[self._last]

    def attention(self, layer: int, attention: Attention) -> None:
        self.looked = True
        self.given[layer] = attention.given

    def broken(self) -> Tensor:
        """Whether the embeddings, and what each layer gives out, have NaN or infinity [L+1]."""
        states = torch.cat([self.embedded[None], self.cosines])
        return (states.isnan() & self.attended).any(dim=-1).any(dim=-1)


def _watched(vlm: Vlm, batch: Batch, *, attention: bool) -> _Seen:
    seen = _Seen(vlm.depth, batch)
    kind = vlm.model.config.model_type
    with ExitStack() as watch:
        watch.enter_context(watch_layers(vlm, seen.layer))
        if attention:
            tokens = {"queries": seen.kinds["text"], "keys": seen.kinds["image"]}
            watch.enter_context(watch_attention(vlm, seen.attention, **tokens))
        forward(vlm, batch)
    if attention and not seen.looked:
        raise UserError(f"{kind} models do not show their attention to transformers: leave image_attention out")
    if broken := seen.broken().nonzero().flatten().tolist():
        place = f"layer {broken[0] - 1} gives out" if broken[0] else "the embeddings give the first layer"
        raise UserError(
            f"{place} NaN or infinite hidden states: the {kind} model's weights are broken, or its numbers do not fit "
            f"into {vlm.model.dtype} (try float32)"
        )
    return seen


def _by_sample(seen: _Seen, blocks: Tensor) -> Samples:
    kinds = seen.kinds
    turned = {kind: block_influence(seen.cosines, tokens) for kind, tokens in kinds.items()}  # L B
    looked = {kind: image_attention(seen.given, kinds[kind], kinds["image"]) for kind in ("text", "prompt", "answer")}
    both = multimodal_block_influence(seen.cosines, kinds["image"], kinds["text"])
    by_layer = {
        "block_influence": {"all": block_influence(seen.cosines, seen.attended), **turned},
        "multimodal_block_influence": {
            "all": both,
            "image": turned["image"].where(~both.isnan(), math.nan),
            "text": turned["text"].where(~both.isnan(), math.nan),
        },
        "angular_distance": {"all": blocks[:, :, 0].T},
        "image_attention": {"all": looked["text"], "prompt": looked["prompt"], "answer": looked["answer"]},
    }
    return {name: {part: values.T.cpu() for part, values in parts.items()} for name, parts in by_layer.items()}

"""Scores of hidden states and attention, all from one forward pass: distance of input and output, image attention.

Every score is a function of tensors. `States` computes their arguments from the watched layers of a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from striate.data import IGNORED, Batch
from striate.errors import UserError
from striate.scores.table import Metric, Score
from striate.trace import Attention, forward, watch_attention, watch_layers
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

CACHED = 1 << 18
"""Elements of the hidden states processed at a time on a CPU: 1 MB in float32."""

_WANG = "Wang et al. 2025 (arXiv 2412.12785)"

_TEXT, _VISUAL = ("records",), ("records", "images")

METRICS = {
    metric.name: metric
    for metric in (
        Metric("block_influence", needs=_TEXT, range="0..2", source="Men et al. 2024 (arXiv 2403.03853), BI"),
        Metric("multimodal_block_influence", needs=_VISUAL, range="0..2", source=f"{_WANG}, multimodal BI"),
        Metric("angular_distance", needs=_TEXT, range="0..1", source="Gromov et al. 2024 (arXiv 2403.17887), eq. 7"),
        Metric(
            "cka",
            needs=_TEXT,
            range="0..1",
            direction="low",
            source="linear CKA: Kornblith et al. 2019 (arXiv 1905.00414); as a score: Ogawa et al. 2026 (2602.05988)",
        ),
        Metric("image_attention", needs=_VISUAL, range="0..1", source=f"{_WANG}, figure 5"),
    )
}


def cosine(entering: Tensor, leaving: Tensor) -> Tensor:
    """Cosine similarity of each token's hidden state before and after a layer: <a, b> / sqrt(<a, a> <b, b>).

    `entering` and `leaving` [..., D] -> [...], float64, in [-1, 1]; exactly 1 where they are the same, 0 where either
    is all zeros, NaN where either is not finite. Sums run in float32 at least, whatever the model's type.
    """
    dim = entering.shape[-1]
    # A CPU is twice as fast on pieces that stay in its cache; a GPU is not.
    size = max(1, CACHED // dim) if entering.device.type == "cpu" else max(1, entering.numel())
    pairs = zip(entering.reshape(-1, dim).split(size), leaving.reshape(-1, dim).split(size), strict=True)
    return torch.cat([_cosine(*pair) for pair in pairs]).view(entering.shape[:-1])


def _cosine(entering: Tensor, leaving: Tensor) -> Tensor:
    a, b = (states if states.dtype == torch.float64 else states.float() for states in (entering, leaving))
    dot, aa, bb = (torch.linalg.vecdot(*pair).double() for pair in ((a, b), (a, a), (b, b)))
    return (dot / (aa * bb).sqrt().clamp(min=torch.finfo(torch.float32).tiny)).clamp(-1, 1)


def block_influence(cosines: Tensor, tokens: Tensor) -> Tensor:
    """1 - mean over tokens t of cos(h(l, t), h(l+1, t)): cosine distance between a layer's input and output.

    `cosines` [..., B, T] from `cosine` of the states that enter and leave the layer, `tokens` [B, T] true at the tokens
    that count -> [..., B], in [0, 2], NaN for samples without any. High: important. The score is the mean of this over
    samples, so that a long sample counts no more than a short one.

    Men et al. 2024, ShortGPT (arXiv 2403.03853), the definition of BI.
    """
    return 1 - mean(cosines, tokens)


def multimodal_block_influence(cosines: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """1 - (mean cosine of the image tokens + mean cosine of the text tokens) / 2.

    Block influence with the same weight for both modalities, whatever their numbers of tokens. `cosines` [..., B, T],
    `image` and `text` [B, T] true at their tokens -> [..., B], in [0, 2], NaN for samples that lack either. High:
    important.

    Wang et al. 2025 (arXiv 2412.12785), "multimodal BI".
    """
    return 1 - (mean(cosines, image) + mean(cosines, text)) / 2


def angular_distance(states: Tensor) -> Tensor:
    """(1/pi) arccos cos(h(l, T), h(l+n, T)) for every block of n layers from layer l on, T the sample's last token.

    `states` [B, L+1, D]: inputs of layers 0 to L-1 at the last token, and the output of the last layer, before the
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


def linear_cka(entering: Tensor, leaving: Tensor, tokens: Tensor) -> Tensor:
    """||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms: likeness of a layer's input X and output Y over its tokens.

    X and Y are [T, D] less their mean over tokens. `entering` and `leaving` [B, T, D], `tokens` [B, T] true at those
    that count -> [B], float64, in [0, 1], NaN where all tokens are alike. Low: important, the layer changes more than
    the scale and the axes of the states. Computed from the T x T matrices XX' and YY', one sample at a time.

    Kornblith et al. 2019 (arXiv 1905.00414), section 3. Ogawa et al. 2026 (arXiv 2602.05988) adapt layers of low CKA.
    """
    return torch.stack([_linear_cka(*sample) for sample in zip(entering, leaving, tokens, strict=True)])


def _linear_cka(entering: Tensor, leaving: Tensor, tokens: Tensor) -> Tensor:
    counts = tokens.unsqueeze(-1)
    grams = []
    for states in (entering, leaving):
        exact = states.double() if states.dtype == torch.float64 else states.float()
        known = exact.where(counts, 0)
        centered = (known - known.sum(dim=0) / counts.sum()).where(counts, 0)
        grams.append(centered @ centered.T)
    x, y = grams
    return (x * y).sum().double() / ((x * x).sum().double() * (y * y).sum().double()).sqrt()


def image_attention(attention: Tensor, tokens: Tensor, image: Tensor) -> Tensor:
    """Mean over query tokens of their attention on image tokens, itself a mean over heads.

    `attention` [..., B, T]: that attention, `Attention.by_query`; `tokens` [B, T] true at the query tokens that count,
    `image` [B, T] at image tokens -> [..., B], in [0, 1], NaN for samples that lack either. Text before the image
    counts, with its 0 in a causal model. High: important.

    Wang et al. 2025 (arXiv 2412.12785), figure 5 (no released code).
    """
    return mean(attention, tokens).masked_fill(~image.any(dim=1), math.nan)


def mean(values: Tensor, tokens: Tensor) -> Tensor:
    """Mean of `values` [..., B, T] at the `tokens` [B, T] that are true -> [..., B], float64, NaN where none is."""
    return values.double().where(tokens, 0).sum(dim=-1) / tokens.sum(dim=-1)


def token_kinds(batch: Batch) -> dict[str, Tensor]:
    """Masks [B, T] of the kinds of token: image, prompt, answer, and text = prompt and answer. Padding is in none."""
    attended = batch.inputs["attention_mask"].bool()
    image = batch.image_mask & attended
    answer = (batch.labels != IGNORED) & attended & ~image
    text = attended & ~image
    return {"image": image, "prompt": text & ~answer, "answer": answer, "text": text}


class States:
    """Measures the named scores of `METRICS`, one forward pass per batch; `scores` are those of the batches so far."""

    def __init__(self, vlm: Vlm, names: Collection[str]) -> None:
        self.vlm = vlm
        self.metrics = [METRICS[name] for name in names]
        self.results: list[tuple[SampleValues, Tensor, int]] = []  # per batch: values, sum of blocks, number of samples

    def add(self, batch: Batch) -> None:
        """Measure one batch, which is on the model's device.

        Raises:
            UserError: a hidden state is NaN or Inf (names the first such layer), or image attention is requested and
                the model does not return attention weights.
        """
        if not len(batch):
            return
        names = {metric.name for metric in self.metrics}
        with eval_mode(self.vlm.model):
            recording = _record(self.vlm, batch, attention="image_attention" in names, cka="cka" in names)
        blocks = angular_distance(recording.last_states).cpu()  # B L L
        self.results.append((_by_sample(recording, blocks), blocks.sum(dim=0), len(batch)))

    def scores(self, keep: Sequence[Tensor] | None = None) -> list[Score]:
        """The scores of the batches so far; `keep`, [B] per batch, is true at the samples that count (no `table`)."""
        return [self._score(metric, keep) for metric in self.metrics]

    def _score(self, metric: Metric, keep: Sequence[Tensor] | None) -> Score:
        none = torch.empty(0, self.vlm.depth)
        by_batch = [values[metric.name] for values, _, _ in self.results] or [{"all": none}]
        if keep is not None:
            by_batch = [
                {part: values[own] for part, values in one.items()} for one, own in zip(by_batch, keep, strict=True)
            ]
        parts = {part: torch.cat([one[part] for one in by_batch]) for part in by_batch[0]}
        table = None
        if metric.name == "angular_distance" and self.results and keep is None:
            _, blocks, numbers = zip(*self.results, strict=True)
            table = tuple(tuple(row) for row in (torch.stack(blocks).sum(dim=0) / sum(numbers)).tolist())
        return Score.of_samples(metric, parts.pop("all"), parts=parts, table=table)


SampleValues = dict[str, dict[str, Tensor]]  # score -> kind of token, or "all" -> [B, L]


class _Recording:
    """Values recorded in one forward pass: one per token and layer, and the hidden states of the last tokens.

    A layer that does not run (mllama's cross-attention without an image) has a cosine of 1; one without self-attention
    has NaN for attention. `cka` is filled on request alone: it takes T x T products.
    """

    def __init__(self, depth: int, batch: Batch, *, cka: bool) -> None:
        self.kinds = token_kinds(batch)
        self.attended = self.kinds["image"] | self.kinds["text"]  # B T
        shape, device = (depth, *self.attended.shape), self.attended.device
        self.cosines = torch.ones(shape, dtype=torch.float64, device=device)
        self.to_images = torch.full(shape, math.nan, device=device)
        self.cka = torch.ones(shape[:2], dtype=torch.float64, device=device) if cka else None  # L B
        self.embedded = self.last_states = torch.empty(0, device=device)
        self.has_attention = False
        last = (self.attended * torch.arange(shape[2], device=device)).argmax(dim=1)
        self._last = torch.arange(len(last), device=device), last

    def layer(self, layer: int, entering: Tensor, leaving: Tensor) -> None:
        self.cosines[layer] = cosine(entering, leaving)
        if self.cka is not None:
            self.cka[layer] = linear_cka(entering, leaving, self.attended)
        if layer == 0:
            self.embedded = cosine(entering, entering)  # B T
            self.last_states = entering.new_full((len(entering), len(self.cosines) + 1, entering.shape[-1]), math.nan)
        self.last_states[:, layer], self.last_states[:, layer + 1] = entering[self._last], leaving[self._last]

    def attention(self, layer: int, attention: Attention) -> None:
        self.has_attention = True
        self.to_images[layer] = attention.by_query

    def non_finite(self) -> Tensor:
        """Whether the embeddings and each layer's output have NaN or Inf [L+1]."""
        states = torch.cat([self.embedded[None], self.cosines])
        return (states.isnan() & self.attended).any(dim=-1).any(dim=-1)


def _record(vlm: Vlm, batch: Batch, *, attention: bool, cka: bool) -> _Recording:
    recording = _Recording(vlm.depth, batch, cka=cka)
    kind = vlm.model.config.model_type
    with ExitStack() as watch:
        watch.enter_context(watch_layers(vlm, recording.layer))
        if attention:
            tokens = {"queries": recording.kinds["text"], "keys": recording.kinds["image"]}
            watch.enter_context(watch_attention(vlm, recording.attention, **tokens))
        forward(vlm, batch)
    if attention and not recording.has_attention:
        raise UserError(f"{kind} models do not return attention weights to transformers: leave image_attention out")
    if bad := recording.non_finite().nonzero().flatten().tolist():
        place = f"the output of layer {bad[0] - 1}" if bad[0] else "the embeddings"
        raise UserError(
            f"NaN or Inf in {place}: the {kind} model's weights are corrupted, or its values exceed the range of "
            f"{vlm.model.dtype} (try float32)"
        )
    return recording


def _by_sample(recording: _Recording, blocks: Tensor) -> SampleValues:
    kinds, cosines = recording.kinds, recording.cosines
    influence = {kind: block_influence(cosines, tokens) for kind, tokens in kinds.items()}  # L B
    both = multimodal_block_influence(cosines, kinds["image"], kinds["text"])
    text, prompt, answer = (
        image_attention(recording.to_images, kinds[kind], kinds["image"]) for kind in ("text", "prompt", "answer")
    )
    by_layer = {
        "block_influence": {"all": block_influence(cosines, recording.attended), **influence},
        "multimodal_block_influence": {
            "all": both,
            "image": influence["image"].where(~both.isnan(), math.nan),
            "text": influence["text"].where(~both.isnan(), math.nan),
        },
        "angular_distance": {"all": blocks[:, :, 0].T},
        "image_attention": {"all": text, "prompt": prompt, "answer": answer},
    }
    if recording.cka is not None:
        by_layer["cka"] = {"all": recording.cka}
    return {name: {part: values.T.cpu() for part, values in parts.items()} for name, parts in by_layer.items()}

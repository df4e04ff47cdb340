"""Scores of weights: each decoder layer's change from the backbone by tuning, read from disk tensor by tensor."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from striate.errors import UserError
from striate.scores.table import Metric, Score
from striate.vlm.reading import model_folder
from striate.weights import StoredTensor, tensors

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "parameter_change",
            needs=("backbone",),
            range="0.. (sum over the layer's weight matrices)",
            source="Activating Distributed Visual Region within LLMs (arXiv 2412.12785): sum of ||W'-W|| / ||W||",
        ),
        Metric(
            "weight_angle",
            needs=("backbone",),
            range="0.. (sum over the layer's weight matrices, each 0..1)",
            source="released code of arXiv 2412.12785: sum of arccos(cos(W', W)) / pi",
        ),
    )
}

CHUNK = 1 << 22
"""Elements processed at a time in double precision: 32 MB."""

_LAYER = re.compile(r"(?P<list>(?:.*?\.)?(?:layers|h|blocks))\.(?P<layer>\d+)\.(?P<name>.+)")
# Lists of layers that are not the decoder's.
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|encoder|tower|qformer|perceiver|resampler|mtp")
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # in old checkpoints; they follow from the config


@dataclass(frozen=True)
class StoredLayers:
    """The decoder layers of a checkpoint on disk: one mapping per layer, from a tensor's name within it to the tensor.

    The checkpoint is a language model (`model.layers.3.mlp...`) or a vision-language model with any prefix
    (`language_model.model.layers.3...`, `model.language_model.layers.3...`); the tower's layers are ignored.
    """

    source: str
    layers: tuple[Mapping[str, StoredTensor], ...]

    @classmethod
    def open(cls, model: str | Path) -> StoredLayers:
        """Read names and shapes; the tensors are read on use.

        `model` is a model folder or a run folder.

        Raises:
            UserError: the folder does not exist, or has no safetensors, a corrupted file, or no decoder layers.
        """
        folder = Path(model_folder(model))
        lists: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
        if not folder.is_dir():
            raise UserError(f"{folder} is not a model folder: weights are compared on disk, so give a folder")
        for one in tensors(folder):
            match = _LAYER.match(one.name)
            if match and not _OTHER_SENSES.search(match["list"]) and not _BUFFERS.search(match["name"]):
                lists[match["list"]][int(match["layer"])][match["name"]] = one
        if not lists:
            raise UserError(f"{folder} has no decoder layers: expected tensors with names like ...layers.0....")
        layers = max(lists.values(), key=len)
        gap = next((layer for layer in range(len(layers)) if layer not in layers), None)
        if gap is not None:
            raise UserError(f"{folder} has weights of layer {max(layers)}, but none of layer {gap}")
        return cls(str(folder), tuple(layers[layer] for layer in range(len(layers))))

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def tensor(self, layer: int, name: str, shape: Sequence[int]) -> StoredTensor:
        """A layer's tensor.

        Raises:
            UserError: the tensor does not exist, or has another shape than `shape`.
        """
        one = self.layers[layer].get(name)
        if one is None:
            raise UserError(f"{self.source} has no {name} in layer {layer}: it is not this model's backbone")
        if one.shape != tuple(shape):
            raise UserError(
                f"{self.source}: {one.name} is {_format(one.shape)}, the model's is {_format(shape)}: "
                "it is not this model's backbone"
            )
        return one

    def check_depth(self, depth: int) -> None:
        """Refuse a backbone of another depth.

        Raises:
            UserError: the depths differ; names both.
        """
        if self.depth != depth:
            raise UserError(f"{self.source} has {self.depth} decoder layers, the model {depth}: not its backbone")


def parameter_change(tuned: Tensor, base: Tensor) -> float:
    """||W' - W|| / ||W||, Frobenius norms, of one weight `tuned` and its `base`, any shape. >= 0.

    Inf for a weight that was zero and has changed. Source: arXiv 2412.12785, parameter change ratio.
    """
    change, norm = _norm(lambda a, b: a - b, tuned, base), _norm(lambda a, b: b, tuned, base)
    return change / norm if norm else math.inf if change else 0.0


def weight_angle(tuned: Tensor, base: Tensor) -> float:
    """arccos(cos(W', W)) / pi of one weight `tuned` and its `base` as vectors, any shape. 0 (same direction) to 1.

    Computed as 2 atan2(|u - v|, |u + v|) of the unit vectors, which is the same angle and accurate for small angles,
    where arccos suffers from rounding. Source: the released code of arXiv 2412.12785.
    """
    norms = _norm(lambda a, b: a, tuned, base) or 1.0, _norm(lambda a, b: b, tuned, base) or 1.0
    apart = _norm(lambda a, b: a / norms[0] - b / norms[1], tuned, base)
    along = _norm(lambda a, b: a / norms[0] + b / norms[1], tuned, base)
    return 2 * math.atan2(apart, along) / math.pi


FORMULAS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "parameter_change": parameter_change,
    "weight_angle": weight_angle,
}


def weight_scores(model: str | Path, backbone: str | Path, *, names: Sequence[str] = tuple(METRICS)) -> list[Score]:
    """Scores of a tuned model's layers relative to its backbone.

    Both are model or run folders; two tensors are in memory at a time. A layer's value is the sum over its weight
    matrices: tensors with two axes or more, so no norms and biases; stacked experts and fused projections count as one
    tensor, as on disk. Scores of weights have no samples and no standard error.

    Raises:
        UserError: the two do not match; names the tensor. Another vocabulary size does not matter.
    """
    tuned, base = StoredLayers.open(model), StoredLayers.open(backbone)
    base.check_depth(tuned.depth)
    pairs = [list(_pairs(tuned, base, layer)) for layer in range(tuned.depth)]  # check all tensors before reading any
    sums = {name: [0.0] * tuned.depth for name in names}
    for layer, matrices in enumerate(pairs):
        for one, other in matrices:
            weights = one.read(), other.read()
            for name in names:
                sums[name][layer] += FORMULAS[name](*weights)
            del weights  # free them before the next two are read
    return [Score.of(METRICS[name], tuple(values)) for name, values in sums.items()]


def _pairs(tuned: StoredLayers, base: StoredLayers, layer: int) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    for name, one in sorted(tuned.layers[layer].items()):  # the rounding of a sum depends on the order, not on shards
        other = base.tensor(layer, name, one.shape)
        if len(one.shape) > 1:
            yield one, other


def _norm(combine: Callable[[Tensor, Tensor], Tensor], tuned: Tensor, base: Tensor) -> float:
    """Frobenius norm of a combination of two tensors, in double precision, a chunk at a time."""
    chunks = zip(tuned.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK), strict=True)
    return math.sqrt(sum(float(combine(a.double(), b.double()).square().sum()) for a, b in chunks))


def _format(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"

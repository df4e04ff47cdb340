"""Scores of weights, read from disk tensor by tensor: each decoder layer's change from the backbone by tuning, and the
signal in its matrices."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from striate.errors import UserError
from striate.scores.table import Metric, Score
from striate.vlm import Vlm
from striate.vlm.devices import default_device
from striate.vlm.modules import MODULES, role_of
from striate.vlm.reading import model_folder
from striate.weights import FLOATS, StoredTensor, tensors

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
        Metric(
            "snr",
            needs=(),
            in_all=False,  # minutes, for a large model
            range="0..1 (mean over the layer's weight matrices)",
            source="share of singular values above the Marchenko-Pastur edge of noise: Martin and Mahoney 2021 "
            "(arXiv 1810.01075); to choose layers by: Hartford et al. 2024 (Spectrum, arXiv 2406.06623)",
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
            UserError: the folder does not exist, or has no safetensors, a corrupted file, no decoder layers, or
                quantized ones (names the matrix).
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
        for one in (one for layer in layers.values() for one in layer.values()):
            _check_plain(one, folder)
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


def check_source(vlm: Vlm) -> None:
    """Refuse a model in memory that is not the checkpoint `vlm.source`, which scores of weights read.

    Raises:
        UserError: it was not loaded from a folder, or has been trained or pruned since.
    """
    advice = "save the model, and load it, to score its weights"
    if not vlm.source:
        raise UserError(f"scores of weights read a checkpoint, and this model was not loaded from one: {advice}")
    stored = StoredLayers.open(vlm.source)
    if stored.depth != vlm.depth:
        raise UserError(f"{vlm.source} has {stored.depth} decoder layers, the model in memory {vlm.depth}: {advice}")
    for index, layer in enumerate(vlm.layers):
        for name, tensor in layer.named_parameters():
            one = stored.layers[index].get(name)
            if one and one.shape == tensor.shape and not torch.equal(one.read().to(tensor), tensor):
                raise UserError(f"{name} of layer {index} is another one in {vlm.source} than in memory: {advice}")


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


def signal_share(weight: Tensor) -> float:
    """Share of a matrix' singular values above those of noise of the same size and root mean square, in [0, 1].

    For `weight` [m, n] with independent entries of root mean square s, the singular values end at s (sqrt(m) +
    sqrt(n)): the edge of the Marchenko-Pastur distribution. Experts [E, m, n] count as E matrices. High: important,
    more directions of the matrix are not noise.

    Martin and Mahoney 2021 (JMLR 22, arXiv 1810.01075), section 3.
    """
    matrices = weight.flatten(0, -3) if weight.dim() > 2 else weight.unsqueeze(0)
    shares = []
    for matrix in matrices:
        exact = matrix.to(default_device()).float()
        edge = exact.square().mean().sqrt() * sum(math.sqrt(side) for side in exact.shape)
        shares.append(float((torch.linalg.svdvals(exact) > edge).double().mean()))
    return sum(shares) / len(shares)


FORMULAS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "parameter_change": parameter_change,
    "weight_angle": weight_angle,
}


def weight_scores(model: str | Path, backbone: str | Path, *, names: Sequence[str] = tuple(FORMULAS)) -> list[Score]:
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


def signal_scores(model: str | Path) -> Score:
    """`signal_share` of a model's layers: the mean over a layer's matrices, and by module (`parts`).

    Of a model or run folder; one tensor is in memory at a time. Matrices without a role (routers) are left out; modules
    that a layer does not have are NaN there.

    Raises:
        UserError: a matrix has NaN or Inf (names it), or a layer has no matrix with a role.
    """
    by_role: dict[str, list[list[float]]] = {}
    depth = len(layers := StoredLayers.open(model).layers)
    for index, layer in enumerate(layers):
        for name, one in sorted(layer.items()):
            role = role_of(name)
            if role is None or len(one.shape) < 2:
                continue
            weight = one.read()
            if not weight.isfinite().all():
                raise UserError(f"{model}: {one.name} has NaN or Inf: snr needs its singular values")
            by_role.setdefault(role, [[] for _ in range(depth)])[index].append(signal_share(weight))
    parts = {
        word: _means(*(by_role[role] for role in sorted(roles & by_role.keys())))
        for word, roles in MODULES.items()
        if roles & by_role.keys()
    }
    values = _means(*by_role.values())
    if not by_role or any(map(math.isnan, values)):
        raise UserError(f"{model}: a decoder layer has no matrix of attention or MLP to take singular values of")
    return Score.of(METRICS["snr"], values, parts=parts)


def _means(*measured: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of each layer's values [L] over several lists [L][n]; NaN for a layer without any."""
    together = [[value for values in layer for value in values] for layer in zip(*measured, strict=True)]
    return tuple(sum(values) / len(values) if values else math.nan for values in together)


def _pairs(tuned: StoredLayers, base: StoredLayers, layer: int) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    for name, one in sorted(tuned.layers[layer].items()):  # the rounding of a sum depends on the order, not on shards
        other = base.tensor(layer, name, one.shape)
        if len(one.shape) > 1:
            yield one, other


def _norm(combine: Callable[[Tensor, Tensor], Tensor], tuned: Tensor, base: Tensor) -> float:
    """Frobenius norm of a combination of two tensors, in double precision, a chunk at a time."""
    chunks = zip(tuned.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK), strict=True)
    return math.sqrt(sum(float(combine(a.double(), b.double()).square().sum()) for a, b in chunks))


def _check_plain(one: StoredTensor, folder: Path) -> None:
    """Refuse a quantized matrix: its codes are not its values. Masks of old checkpoints, named as a bias, are none."""
    if len(one.shape) > 1 and one.code not in FLOATS and not one.name.endswith("bias"):
        raise UserError(
            f"{folder}: {one.name} is stored as {one.code}, quantized: give the checkpoint before quantization, or one "
            "that is dequantized"
        )


def _format(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"

"""Scores of weights: how far tuning moved each decoder layer from the backbone, read from disk tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from striate.checkpoint import check_folder
from striate.errors import UserError
from striate.run import model_folder
from striate.score.table import Metric, Score

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
"""Numbers at a time in double precision: 32 MB."""

INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"(?P<list>(?:.*?\.)?(?:layers|h|blocks))\.(?P<layer>\d+)\.(?P<name>.+)")
# Lists of layers that are not the decoder's.
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|encoder|tower|qformer|perceiver|resampler|mtp")
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints kept them; they follow from the config


@dataclass(frozen=True)
class Place:
    """Where a tensor is on disk: the file, its key there, and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


@dataclass(frozen=True)
class StoredLayers:
    """The decoder layers of a checkpoint on disk: one mapping a layer, from a tensor's name within it to its place.

    It may be of a plain language model (`model.layers.3.mlp...`) or of a vision-language model under any prefix
    (`language_model.model.layers.3...`, `model.language_model.layers.3...`); the tower's layers are left aside.
    """

    source: str
    layers: tuple[Mapping[str, Place], ...]

    @classmethod
    def open(cls, model: str | Path) -> StoredLayers:
        """Read the names and shapes, and no tensor yet.

        `model` is a model folder or a run folder.

        Raises:
            UserError: no such folder, no safetensors in it, a damaged file, or no decoder layers.
        """
        folder = Path(model_folder(model))
        lists: dict[str, dict[int, dict[str, Place]]] = defaultdict(lambda: defaultdict(dict))
        for place in _places(folder):
            match = _LAYER.match(place.key)
            if match and not _OTHER_SENSES.search(match["list"]) and not _BUFFERS.search(match["name"]):
                lists[match["list"]][int(match["layer"])][match["name"]] = place
        if not lists:
            raise UserError(f"{folder} holds no decoder layers: none of its tensors is called ...layers.0....")
        layers = max(lists.values(), key=len)
        gap = next((layer for layer in range(len(layers)) if layer not in layers), None)
        if gap is not None:
            raise UserError(f"{folder} has no weights of layer {gap}, but some of layer {max(layers)}")
        return cls(str(folder), tuple(layers[layer] for layer in range(len(layers))))

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def place(self, layer: int, name: str, shape: Sequence[int]) -> Place:
        """Where a layer's tensor is.

        Raises:
            UserError: there is none, or it has another shape than `shape`.
        """
        place = self.layers[layer].get(name)
        if place is None:
            raise UserError(f"{self.source} has no {name} in layer {layer}: it is not what this model was tuned from")
        if place.shape != tuple(shape):
            raise UserError(
                f"{self.source}: {place.key} is {_by(place.shape)}, the model's is {_by(shape)}: "
                "it is not what this model was tuned from"
            )
        return place

    def check_depth(self, depth: int) -> None:
        """Refuse a backbone of another depth.

        Raises:
            UserError: with both depths.
        """
        if self.depth != depth:
            raise UserError(f"{self.source} has {self.depth} decoder layers, the model {depth}: not its backbone")


def parameter_change(tuned: Tensor, base: Tensor) -> float:
    """||W' - W|| / ||W||, Frobenius norms, of one weight `tuned` and its `base`, any shape. >= 0.

    A weight that was zero and is so no more is infinitely far. Source: arXiv 2412.12785, parameter change ratio.
    """
    change, norm = _norm(lambda a, b: a - b, tuned, base), _norm(lambda a, b: b, tuned, base)
    return change / norm if norm else math.inf if change else 0.0


def weight_angle(tuned: Tensor, base: Tensor) -> float:
    """arccos(cos(W', W)) / pi of one weight `tuned` and its `base` as vectors, any shape. 0 (same direction) to 1.

    As 2 atan2(|u - v|, |u + v|) of the unit vectors, which is the same angle and exact for small ones too, where
    the cosine is lost in rounding. Source: the released code of arXiv 2412.12785.
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
    """Scores of a tuned model's layers against the weights it was tuned from.

    Both are folders on disk (or runs); two tensors are in memory at a time. A layer's value is the sum over its weight
    matrices: tensors with two axes or more, so no norms and biases; stacked experts and fused projections count
    as the one tensor that they are on disk. There is no standard error: weights have no samples.

    Raises:
        UserError: the two do not match; names the tensor. Another size of vocabulary does not matter.
    """
    tuned, base = StoredLayers.open(model), StoredLayers.open(backbone)
    base.check_depth(tuned.depth)
    pairs = [list(_pairs(tuned, base, layer)) for layer in range(tuned.depth)]  # all checked before anything is read
    sums = {name: [0.0] * tuned.depth for name in names}
    for layer, places in enumerate(pairs):
        for one, other in places:
            weights = one.read(), other.read()
            for name in names:
                sums[name][layer] += FORMULAS[name](*weights)
            del weights  # before the next two are read
    return [Score.of(METRICS[name], tuple(values)) for name, values in sums.items()]


def _pairs(tuned: StoredLayers, base: StoredLayers, layer: int) -> Iterator[tuple[Place, Place]]:
    for name, place in tuned.layers[layer].items():
        other = base.place(layer, name, place.shape)
        if len(place.shape) > 1:
            yield place, other


def _norm(combine: Callable[[Tensor, Tensor], Tensor], tuned: Tensor, base: Tensor) -> float:
    """Frobenius norm of a combination of two tensors, in double precision, a chunk at a time."""
    chunks = zip(tuned.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK), strict=True)
    return math.sqrt(sum(float(combine(a.double(), b.double()).square().sum()) for a, b in chunks))


def _places(folder: Path) -> Iterator[Place]:
    """Every tensor of a checkpoint, from the headers of its files."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no model folder: weights are compared with those on disk")
    check_folder(folder)
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                yield from [Place(file, key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from error


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        if index.is_file():
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, LookupError) as error:
        raise UserError(f"cannot read {index}: {error}") from error
    if files := sorted(folder.glob("*.safetensors")):
        return files
    raise UserError(f"{folder} has no model.safetensors: weights are read from safetensors only")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"

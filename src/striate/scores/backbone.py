"""The decoder layers of a tuned model's backbone, and running the model with some layers reverted to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from striate.errors import UserError
from striate.scores.weights import StoredLayers
from striate.vlm import Vlm
from striate.vlm.modes import Forward, override_forward


class Backbone:
    """The decoder layers of a tuned model before tuning: from a folder, or from the model itself without its adapters.

    `folder` holds the language model before visual training, or any checkpoint with the same decoder layers. A model
    with unmerged LoRA adapters needs no folder: adapters are disabled in a reverted layer. Only decoder layers are
    reverted; embeddings, final norm and head stay.

    Raises:
        UserError: the folder does not match the model (names the tensor), or neither a folder nor an adapter exists.
    """

    def __init__(self, vlm: Vlm, folder: str | Path | None = None) -> None:
        self.vlm, self.layers = vlm, list(vlm.layers)
        self.adapters = [_adapters(layer) for layer in self.layers]
        if any(self.adapters):
            return
        if folder is None:
            raise UserError("reverting layers needs a backbone (--backbone), or a model with unmerged adapters")
        self.stored = StoredLayers.open(folder)
        self.stored.check_depth(vlm.depth)
        for layer in range(vlm.depth):  # check every tensor before anything is measured
            self._readers(layer)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Context in which one layer has the backbone's weights; its own are restored bit for bit, also on errors."""
        with self._disable_adapters(index) if any(self.adapters) else self._swap(index):
            yield

    @contextmanager
    def revert(self, layers: Iterable[int]) -> Iterator[None]:
        """Context in which each of the layers has the backbone's weights while it runs.

        At most one layer's weights are in memory beside the model, however many layers are reverted.
        """
        with override_forward({self.layers[index]: self._reverting_forward(index) for index in layers}):
            yield

    def _reverting_forward(self, index: int) -> Forward:
        own = self.layers[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.layer(index):
                return own(*args, **kwargs)

        return forward

    @contextmanager
    def _swap(self, index: int) -> Iterator[None]:
        current = self.layers[index].state_dict(keep_vars=True)
        own = {name: tensor.data for name, tensor in current.items()}
        try:
            for name, read in self._readers(index).items():
                weight = read()
                if weight.shape != own[name].shape:  # only tensors that `transformers` merges can still differ
                    raise UserError(f"{self.stored.source}: {name} of layer {index} has another shape than the model's")
                current[name].data = weight.to(own[name].device, own[name].dtype)
            yield
        finally:
            for name, tensor in current.items():
                tensor.data = own[name]

    @contextmanager
    def _disable_adapters(self, index: int) -> Iterator[None]:
        adapters = [one for one in self.adapters[index] if not one.disable_adapters]
        # Enabling and disabling adapters also changes requires_grad.
        flags = [(p, p.requires_grad) for p in self.layers[index].parameters()]
        try:
            for adapter in adapters:
                adapter.enable_adapters(False)
            yield
        finally:
            for adapter in adapters:
                adapter.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _readers(self, index: int) -> dict[str, Callable[[], Tensor]]:
        """Functions that read the tensors of a layer, by the tensor's name within the layer."""
        readers: dict[str, Callable[[], Tensor]] = {}
        state = self.layers[index].state_dict()
        missing = [name for name in state if name not in self.stored.layers[index]]
        converted = self._converting_readers(index) if missing else {}
        for name, tensor in state.items():
            if name in missing and name in converted:
                readers[name] = converted[name]
            else:
                readers[name] = self.stored.tensor(index, name, tensor.shape).read
        return readers

    def _converting_readers(self, index: int) -> dict[str, Callable[[], Tensor]]:
        """Readers of tensors that `transformers` converts on loading: other names, stacked experts."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        prefix = f"{self.vlm.parts.layers}.{index}."
        renamings, converters = self._conversions
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        readers: dict[str, Callable[[], Tensor]] = {}
        parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(self.stored.layers[index], key=dot_natural_key):
            target, pattern = rename_source_key(prefix + name, renamings, converters)
            target = target.removeprefix(prefix)
            if pattern is None:
                readers[target] = self.stored.layers[index][name].read
            else:
                parts[target].append((name, pattern))
                readers[target] = partial(self._convert, index, target, by_pattern[pattern], parts[target])
        return readers

    def _convert(self, index: int, target: str, converter: Any, parts: list[tuple[str, str]]) -> Tensor:
        """Convert several tensors on disk into one in memory."""
        full = f"{self.vlm.parts.layers}.{index}.{target}"
        converter = deepcopy(converter)
        for name, pattern in parts:
            converter.add_tensor(full, name, pattern, self.stored.layers[index][name].read())
        converted = converter.convert(full, model=self.vlm.model, config=self.vlm.model.config)[full]
        return converted[0] if isinstance(converted, list) else converted

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(self.vlm.model)
        return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


def _adapters(layer: nn.Module) -> list[Any]:
    """The LoRA modules in a layer.

    Raises:
        UserError: they are merged into the weights, and disabling them would subtract them with rounding errors.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import

    adapters = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    if any(module.merged for module in adapters):
        raise UserError("the model's adapters are merged but still attached: call merge_and_unload(), or unmerge them")
    return adapters

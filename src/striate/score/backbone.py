"""What a tuned model's decoder layers were before, and putting them back for a moment."""

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
from striate.score.replay import Forward, replaced
from striate.score.weights import StoredLayers
from striate.vlm import Vlm


class Backbone:
    """What a tuned model's decoder layers were before: in a folder, or in the model itself under its adapters.

    `folder` holds the language model before visual training, or any checkpoint with the same decoder layers. A model
    with unmerged LoRA adapters needs none: in a layer that is reverted, they are switched off. Only decoder layers
    are put back; embeddings, final norm and head stay.

    Raises:
        UserError: the folder does not match the model (names the tensor), or there is neither folder nor adapter.
    """

    def __init__(self, vlm: Vlm, folder: str | Path | None = None) -> None:
        self.vlm, self.layers = vlm, list(vlm.layers)
        self.adapters = [_adapters(layer) for layer in self.layers]
        if any(self.adapters):
            return
        if folder is None:
            raise UserError("putting layers back needs a backbone (--backbone), or a model with unmerged adapters")
        self.stored = StoredLayers.open(folder)
        self.stored.check_depth(vlm.depth)
        for layer in range(vlm.depth):  # all of it before anything is measured
            self._recipes(layer)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Within it, one layer has the backbone's weights; its own come back bit for bit, whatever happens."""
        with self._without_adapters(index) if any(self.adapters) else self._swapped(index):
            yield

    @contextmanager
    def reverted(self, layers: Iterable[int]) -> Iterator[None]:
        """Within it, each of the layers has the backbone's weights while it runs.

        Never more than one layer's weights are in memory beside the model, however many layers are reverted.
        """
        with replaced({self.layers[index]: self._reverting(index) for index in layers}):
            yield

    def _reverting(self, index: int) -> Forward:
        own = self.layers[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.layer(index):
                return own(*args, **kwargs)

        return forward

    @contextmanager
    def _swapped(self, index: int) -> Iterator[None]:
        current = self.layers[index].state_dict(keep_vars=True)
        own = {name: tensor.data for name, tensor in current.items()}
        try:
            for name, read in self._recipes(index).items():
                found = read()
                if found.shape != own[name].shape:  # only what `transformers` put together can still differ
                    raise UserError(f"{self.stored.source}: {name} of layer {index} has another shape than the model's")
                current[name].data = found.to(own[name].device, own[name].dtype)
            yield
        finally:
            for name, tensor in current.items():
                tensor.data = own[name]

    @contextmanager
    def _without_adapters(self, index: int) -> Iterator[None]:
        adapters = [one for one in self.adapters[index] if not one.disable_adapters]
        # Switching adapters also changes what trains.
        trains = [(p, p.requires_grad) for p in self.layers[index].parameters()]
        try:
            for adapter in adapters:
                adapter.enable_adapters(False)
            yield
        finally:
            for adapter in adapters:
                adapter.enable_adapters(True)
            for parameter, flag in trains:
                parameter.requires_grad_(flag)

    def _recipes(self, index: int) -> dict[str, Callable[[], Tensor]]:
        """How to read each tensor of a layer, by its name within the layer."""
        recipes: dict[str, Callable[[], Tensor]] = {}
        state = self.layers[index].state_dict()
        missing = [name for name in state if name not in self.stored.layers[index]]
        converted = self._converted(index) if missing else {}
        for name, tensor in state.items():
            if name in missing and name in converted:
                recipes[name] = converted[name]
            else:
                recipes[name] = self.stored.place(index, name, tensor.shape).read
        return recipes

    def _converted(self, index: int) -> dict[str, Callable[[], Tensor]]:
        """Recipes for what `transformers` keeps in memory otherwise than on disk: other names, stacked experts."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        prefix = f"{self.vlm.parts.layers}.{index}."
        renamings, converters = self._conversions
        makers = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        recipes: dict[str, Callable[[], Tensor]] = {}
        parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(self.stored.layers[index], key=dot_natural_key):
            target, pattern = rename_source_key(prefix + name, renamings, converters)
            target = target.removeprefix(prefix)
            if pattern is None:
                recipes[target] = self.stored.layers[index][name].read
            else:
                parts[target].append((name, pattern))
                recipes[target] = partial(self._made, index, target, makers[pattern], parts[target])
        return recipes

    def _made(self, index: int, target: str, converter: Any, parts: list[tuple[str, str]]) -> Tensor:
        """One tensor in memory out of several on disk."""
        full = f"{self.vlm.parts.layers}.{index}.{target}"
        converter = deepcopy(converter)
        for name, pattern in parts:
            converter.add_tensor(full, name, pattern, self.stored.layers[index][name].read())
        given = converter.convert(full, model=self.vlm.model, config=self.vlm.model.config)[full]
        return given[0] if isinstance(given, list) else given

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(self.vlm.model)
        return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


def _adapters(layer: nn.Module) -> list[Any]:
    """The LoRA modules in a layer.

    Raises:
        UserError: they are merged into the weights, and switching them off would subtract them with rounding errors.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import

    found = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    if any(module.merged for module in found):
        raise UserError(
            "the model's adapters are merged but still there: finish with merge_and_unload(), or unmerge them"
        )
    return found

"""A model on fake tensors: its real parts run with shapes, types and operations, but without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from striate.errors import UserError, first_line
from striate.vlm import Vlm
from striate.vlm.reading import check_config, model_folder

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class FakeModel:
    """A model of fake tensors on the CPU. `mode` is their `FakeTensorMode`; `dtype` is that of the matmuls.

    `tokens_per_image` are the decoder's tokens for an image of the tower's own size; None if they depend on the image.
    """

    vlm: Vlm
    mode: FakeTensorMode
    dtype: Dtype
    tokens_per_image: int | None

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.vlm.model.config.get_text_config(decoder=True).hidden_size)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the parts run on fake tensors, in the types that training has them in."""
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            yield

    def features(self, images: int) -> torch.Tensor:
        """The image features [N, D] that the decoder gets; to be called within `running`."""
        model: Any = self.vlm.model
        features = model.get_image_features(
            pixel_values=torch.empty(images, 3, *_image_size(self.vlm), dtype=model.dtype)
        )
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        return features.flatten(end_dim=-2)


def fake_model(model: str | Path, *, dtype: Dtype = "bfloat16") -> FakeModel:
    """A model from its config alone: a folder, a run folder, a hub id, or a config file.

    Raises:
        UserError: no such model, not a vision-language model, or one whose parts cannot be found.
    """
    source = str(model_folder(model))
    config = check_config(source)
    kept_as: Any = torch.float32 if dtype == "float32" else config.dtype or torch.bfloat16
    return fake_model_of(config, kept_as=kept_as, dtype=dtype, source=source)


def fake_model_of(config: Any, *, kept_as: torch.dtype, dtype: Dtype, source: str = "") -> FakeModel:
    """A model of this config with its frozen weights `kept_as` a type, its matmuls in `dtype`."""
    mode = FakeTensorMode()
    try:
        with mode, no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=kept_as)
    except Exception as error:  # each family fails in its own way on an incomplete config
        raise UserError(f"no {config.model_type} model can be built from the config: {first_line(error)}") from error
    model.requires_grad_(False).train()
    bare = FakeModel(Vlm.of(model, source=source), mode, dtype, None)
    return FakeModel(bare.vlm, mode, dtype, _count_image_tokens(bare))


def _count_image_tokens(bare: FakeModel) -> int | None:
    # Towers that cut images of any size into patches read the size from the data, which fake tensors do not have.
    unknown = (DataDependentOutputException, DynamicOutputShapeException, TypeError, ValueError, AttributeError)
    try:
        with bare.running(), torch.no_grad():
            return len(bare.features(1))
    except (*unknown, RuntimeError, IndexError):
        return None


def _image_size(vlm: Vlm) -> tuple[int, int]:
    """Height and width, in pixels, of the tower's own images."""
    size = vlm.model.config.vision_config.image_size
    high, wide = (size, size) if isinstance(size, int) else size
    return int(high), int(wide)


def calls(fake_model: FakeModel, records: int, tokens: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What the decoder hands to each of its layers for a batch: hidden states [B, T, D], and everything else by name.

    The records are of one length, so that no attention mask is needed.

    Raises:
        UserError: layers do not run without an image (cross-attention).
    """
    seen: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}

    def note(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: dict[str, Any] = {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else dict(kwargs)
            seen[index] = (args[0] if args else named.pop("hidden_states"), named)

        return hook

    vlm = fake_model.vlm
    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(vlm.layers)]
    try:
        with fake_model.running(), torch.no_grad():
            holder(vlm)(inputs_embeds=torch.empty(records, tokens, fake_model.width, dtype=vlm.model.dtype),
                        use_cache=False)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) < vlm.depth:
        idle = min(set(range(vlm.depth)) - seen.keys())
        raise UserError(
            f"{vlm.model.config.model_type}: layer {idle} runs only with an image (cross-attention), "
            "so its cost cannot be counted from the config"
        )
    return [seen[index] for index in range(vlm.depth)]


def holder(vlm: Vlm) -> nn.Module:
    """The module that has the list of decoder layers, and runs them."""
    return vlm.model.get_submodule(vlm.parts.layers.rpartition(".")[0])

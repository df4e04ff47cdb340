"""A model without weights, whose real parts run on fake tensors: shapes, types and operations, but no numbers."""

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

from striate.errors import UserError
from striate.run import model_folder
from striate.vlm import Vlm, check_config, first_line

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Outline:
    """A model on the CPU in name only. `mode` is what its fake tensors belong to; `dtype` that of the products.

    `picture_tokens` are the decoder's tokens for one picture of the tower's own size; None where they depend on the
    picture.
    """

    vlm: Vlm
    mode: FakeTensorMode
    dtype: Dtype
    picture_tokens: int | None

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.vlm.model.config.get_text_config(decoder=True).hidden_size)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the parts run on fake tensors, in the types that training has them in."""
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            yield

    def features(self, pictures: int) -> torch.Tensor:
        """What the decoder gets to see of some pictures [N, D]; to be called while `running`."""
        model: Any = self.vlm.model
        found = model.get_image_features(
            pixel_values=torch.empty(pictures, 3, *_picture_size(self.vlm), dtype=model.dtype)
        )
        found = getattr(found, "pooler_output", found)
        found = found if isinstance(found, torch.Tensor) else torch.cat(list(found))
        return found.flatten(end_dim=-2)


def outline(model: str | Path, *, dtype: Dtype = "bfloat16") -> Outline:
    """A model from its config alone: a folder, a run folder, a hub id, or a config file.

    Raises:
        UserError: no such model, not a vision-language model, or one that cannot be taken apart.
    """
    source = str(model_folder(model))
    config = check_config(source)
    kept_as: Any = torch.float32 if dtype == "float32" else config.dtype or torch.bfloat16
    return outline_of(config, kept_as=kept_as, dtype=dtype, source=source)


def outline_of(config: Any, *, kept_as: torch.dtype, dtype: Dtype, source: str = "") -> Outline:
    """A model of this config with its frozen weights `kept_as` a type, its products in `dtype`."""
    mode = FakeTensorMode()
    try:
        with mode, no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=kept_as)
    except Exception as error:  # whatever a family trips over when its config lacks something
        raise UserError(f"the config makes no {config.model_type} model: {first_line(error)}") from error
    model.requires_grad_(False).train()
    bare = Outline(Vlm.of(model, source), mode, dtype, None)
    return Outline(bare.vlm, mode, dtype, _picture_tokens(bare))


def _picture_tokens(bare: Outline) -> int | None:
    # Towers that cut pictures of any size into patches read the size from the data, which fake tensors do not have.
    unknown = (DataDependentOutputException, DynamicOutputShapeException, TypeError, ValueError, AttributeError)
    try:
        with bare.running(), torch.no_grad():
            return len(bare.features(1))
    except (*unknown, RuntimeError, IndexError):
        return None


def _picture_size(vlm: Vlm) -> tuple[int, int]:
    """Height and width, in pixels, of the tower's own pictures."""
    size = vlm.model.config.vision_config.image_size
    high, wide = (size, size) if isinstance(size, int) else size
    return int(high), int(wide)


def calls(outline: Outline, records: int, tokens: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
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

    vlm = outline.vlm
    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(vlm.layers)]
    try:
        with outline.running(), torch.no_grad():
            holder(vlm)(inputs_embeds=torch.empty(records, tokens, outline.width, dtype=vlm.model.dtype),
                        use_cache=False)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) < vlm.depth:
        idle = min(set(range(vlm.depth)) - seen.keys())
        raise UserError(
            f"{vlm.model.config.model_type}: layer {idle} runs only with an image (cross-attention): "
            "its cost cannot be counted from the config"
        )
    return [seen[index] for index in range(vlm.depth)]


def holder(vlm: Vlm) -> nn.Module:
    """The module that has the list of decoder layers, and runs them."""
    return vlm.model.get_submodule(vlm.parts.layers.rpartition(".")[0])

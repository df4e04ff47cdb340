"""Route: image tokens pass only through the decoder layers that need them.

In a layer outside the route an image token keeps its hidden state; text tokens still attend to it there, through that
layer's own keys and values of the kept state. The layer runs its family's own code twice: on the kept tokens until
they give their keys and values, and on the text tokens to the end, which get both through the interface of the
key-value cache. So norms, position embeddings, sliding windows, experts and adapters need no code of their own here.
The cache afterwards is that of a plain forward pass, so that decoding runs unchanged.

No activation of a kept token is saved for the backward pass in such a layer: consecutive layers share one tensor of
kept states, and attention is recomputed from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from striate.data import Batch
from striate.errors import UserError, first_line
from striate.region import Layers, Region, auto_size
from striate.routing.layer import Unrouted, multiply_adds
from striate.routing.tokens import MASK, Pass, Tokens
from striate.vlm import Vlm
from striate.vlm import load as load_plain
from striate.vlm.modes import Forward, change_layers, eval_mode, freeze, replace_forward

ENTRY = "striate_route"
"""The entry of a model's config that holds the route of its checkpoint."""

FLEXIBLE = ("sdpa", "eager", "striate_record_by_record")
"""Attention implementations that take fewer queries than keys, with a mask that says which key each query sees."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit

__all__ = [
    "ENTRY",
    "Routed",
    "Tokens",
    "load",
    "multiply_adds",
    "open_route",
    "read_route",
    "resolve",
    "route",
    "running_route",
    "running_tokens",
    "unroute",
    "verify",
    "write_route",
]


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn: str | None = None,
    dequantize: bool = False,
) -> Vlm:
    """Load any LVLM, find its parts, and turn on the route of its checkpoint if it has one.

    Args:
        path: a model folder, a run folder (its checkpoint is loaded) or a hub id.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`.
        device: `cpu`, `cuda`, ...; default: a GPU when there is one.
        attn: attention implementation of `transformers` (`sdpa`, `eager`, `flash_attention_2`); default: its choice.
        dequantize: convert FP8 and bitsandbytes weights to the model's dtype, to train and save them unquantized.

    Raises:
        UserError: the model does not exist, is not a vision-language model, has parts that are not found, or is too
            large; `check_folder` rejects the folder; weights are missing, are quantized without an entry in
            config.json, or belong to layers beyond those of the config; its route does not fit.

    Remote code is never run; weights are read from safetensors only.
    """
    return open_route(load_plain(path, dtype=dtype, device=device, attn=attn, dequantize=dequantize))


def open_route(vlm: Vlm) -> Vlm:
    """The same model, with the route in its config turned on if it has one."""
    if read_route(vlm.model.config) is not None:
        route(vlm)
    return vlm


def route(model: Vlm | PreTrainedModel, region: Layers | None = None, *, image_token_id: int | None = None) -> Routed:
    """Let image tokens pass only through the layers of `region`, until the result is removed.

        route(model)                    # until removed, by the route in the config of its checkpoint
        with route(vlm, region): ...    # within the block

    A forward pass without image tokens, such as a decoding step, is the plain one; so is any when all layers are
    routed. Image tokens are those of `image_token_id` (by default the config's) in `input_ids`. The weights, the
    config and what `save_pretrained` writes stay as they are; `write_route` puts the route into the config.

    Raises:
        UserError: no route is given or in the config; a route that is empty or of another depth; a model that
            is routed already, names no image token, or attends in a way that cannot take fewer queries than keys.
    """
    vlm = model if isinstance(model, Vlm) else Vlm.of(model)
    config, kind = vlm.model.config, vlm.model.config.model_type
    asked = read_route(config) if region is None else region
    if asked is None:
        raise UserError(f"this {kind} model has no route: its config has no {ENTRY!r}; give a region")
    chosen = asked if isinstance(asked, Region) else Region.of(asked, vlm.depth)
    check_route(chosen, vlm.depth)
    token = vlm.image_token_id if image_token_id is None else image_token_id
    if token is None:
        raise UserError(f"the config of this {kind} model names no image token: give image_token_id")
    if running_route(vlm.model):
        raise UserError(f"this {kind} model is routed already: remove that route first")
    _check_attention(vlm)
    return Routed(vlm, chosen, token)


def read_route(config: PreTrainedConfig) -> Region | None:
    """The route in the config of a checkpoint; None where it has none.

    Raises:
        UserError: the entry is not a route.
    """
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    try:
        return Region.from_json(entry)
    except UserError as error:
        raise UserError(f"the config holds no route under {ENTRY!r}: {error}") from None


def write_route(config: PreTrainedConfig, region: Region | None) -> None:
    """Write a route to the config of a checkpoint, or remove it; a route of all layers is not written."""
    vars(config).pop(ENTRY, None)
    if region is not None and len(region) < region.depth:
        setattr(config, ENTRY, region.to_json())


def unroute(model: PreTrainedModel) -> None:
    """Make a routed model the plain one again."""
    if routed := running_route(model):
        routed.remove()


def running_route(model: PreTrainedModel) -> Routed | None:
    """The route that is turned on, None without one."""
    routed = vars(model).get("forward")
    return routed if isinstance(routed, Routed) else None


def running_tokens(model: PreTrainedModel) -> Tokens | None:
    """The tokens of the forward pass that runs, in the two parts of the route; None where there is one part."""
    routed = running_route(model)
    return None if routed is None else routed.running.tokens


def resolve(text: Layers | None, trained: Region) -> Region | None:
    """The route that `--route` asks for; None where image tokens pass through all layers.

    None, `none` or `all`: no route; `same`: the layers that train, and layer 0; else any form of a region.

    Raises:
        UserError: an unknown form, another depth, or an empty region.
    """
    if text is None or text == "none":
        return None
    if text == "same":
        return Region(tuple({0, *trained}), trained.depth, "same")
    if auto_size("--route", text, trained.depth):
        raise UserError(f"--route {text}: tune and align measure it; here, give a region such as uniform:25%")
    try:
        region = text if isinstance(text, Region) else Region.of(text, trained.depth)
    except UserError as error:
        raise UserError(
            f"--route {text}: {error}; or none, same (the layers that train, and layer 0), auto:25% (measured)"
        ) from None
    check_route(region, trained.depth)
    return region if len(region) < region.depth else None


def check_route(region: Region, depth: int) -> None:
    """Raise `UserError` for a route that is empty or of another depth."""
    if region.depth != depth:
        raise UserError(f"the route {region} is for {region.depth} decoder layers, this model has {depth}")
    if not region.layers:
        raise UserError("the route has no layer, so that no image would be read: name at least one, best with layer 0")


def verify(vlm: Vlm, region: Region, probe: Batch) -> None:
    """Prove on two records that a routed pass gives the answers' logits of the slow way: every layer on every token,
    and image tokens reverted after those outside the route.

    Raises:
        UserError: it does not, with the reason: the family exchanges more between tokens than keys and values.
    """
    kind, (answers, _) = vlm.model.config.model_type, probe.targets()
    token = int(probe.inputs["input_ids"][probe.image_mask][0]) if probe.image_mask.any() else vlm.image_token_id

    def logits() -> Tensor:
        with vlm.head_at(answers):
            output: Tensor = vlm.model(**probe.inputs, use_cache=False).logits
        return output

    try:
        with eval_mode(vlm.model), torch.no_grad():
            with change_layers((vlm.layers[layer] for layer in region.complement), freeze(probe.image_mask)):
                slow = logits()
            with route(vlm, region, image_token_id=token):
                off = float((logits() - slow).float().abs().max() / slow.float().abs().max())
    except UserError:
        raise
    except Exception as error:  # whatever a family trips over
        raise UserError(f"{kind} cannot be routed through {region}: {first_line(error)}") from error
    if not off <= TOLERANCE[slow.dtype]:
        raise UserError(f"{kind} cannot be routed through {region}: its logits are off by {off:.1%} of the largest")


def _check_attention(vlm: Vlm) -> None:
    name = vlm.model.config.get_text_config(decoder=True)._attn_implementation
    if name not in FLEXIBLE:
        raise UserError(
            f"a route needs attention that takes fewer queries than keys, and {name} does not: load the model with sdpa"
        )


class Routed:
    """A model whose image tokens pass only through the layers of `region`, until `remove` or the end of a `with`.

    It stands in the place of the model's forward pass, and finds the image tokens there.
    """

    def __init__(self, vlm: Vlm, region: Region, image_token_id: int) -> None:
        self.vlm, self.image_token_id = vlm, image_token_id
        self.running = Pass(vlm.model.config.get_text_config(decoder=True))
        self._own: Forward = vlm.model.forward
        self.__signature__ = inspect.signature(self._own)  # `generate` and the Trainer read it
        self._names = tuple(self.__signature__.parameters)
        self.turn_on(region)

    def turn_on(self, region: Region) -> None:
        """Route through these layers, from now on or again after `remove`."""
        self.region = region
        forwards: dict[nn.Module, Forward] = {self.vlm.model: self}
        for layer in region.complement:
            unrouted = Unrouted(self.running, layer, self.vlm.layers[layer], self.vlm.model.config.model_type)
            forwards.update(unrouted.forwards())
        self._before = replace_forward(forwards)

    def remove(self) -> None:
        """Make the model the plain one again."""
        replace_forward(self._before)
        self._before = {}

    def __enter__(self) -> Routed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        before, tokens = self.running.tokens, self._split(given)
        self.running.tokens = tokens
        try:
            return self._own(*args, **kwargs)
        finally:
            self.running.tokens = before
            if tokens:
                tokens.end()

    def _split(self, inputs: Mapping[str, Any]) -> Tokens | None:
        """Which tokens keep their states: image tokens, and padding in a batch that has any."""
        ids = inputs.get("input_ids")
        if ids is None:
            raise UserError("a routed model finds image tokens in input_ids: give them, not inputs_embeds alone")
        kept = ids == self.image_token_id  # B T
        if ids.shape[1] == 1 or len(self.region) == self.region.depth or not kept.any():
            return None
        _check_attention(self.vlm)
        there = inputs.get(MASK)
        if isinstance(there, Tensor) and there.dim() == 2 and there.shape[1] >= ids.shape[1]:
            kept = kept | (there[:, there.shape[1] - ids.shape[1] :] == 0)
        return Tokens(kept)

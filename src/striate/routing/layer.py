"""A decoder layer that image tokens pass by: its family's own code, run twice, each time on a part of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig

from striate.errors import UserError
from striate.region import Region
from striate.routing.tokens import MASK, Pass, Tokens
from striate.vlm import Vlm
from striate.vlm.modes import Forward, hidden_of, replace_hidden

CACHE = "past_key_values"
OUTPUTS = ("o_proj", "out_proj", "dense")  # what comes after attention


def attentions(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules in a layer that write to the key-value cache: they know its number."""
    for module in layer.modules():
        if module is not layer and isinstance(getattr(module, "layer_idx", None), int):
            yield module


class Unrouted:
    """A layer outside the route.

    Computed tokens run through it as ever. What it takes for the key-value cache is a `_Lent`, which adds the keys and
    values of kept tokens; those come from the layer's own code as well, which is left as soon as it has them.
    """

    def __init__(self, running: Pass, number: int, layer: nn.Module, kind: str) -> None:
        self.running, self.number, self.layer, self.kind = running, number, layer, kind
        self.own: Forward = layer.forward
        self.names = tuple(inspect.signature(self.own).parameters)
        self.norm: _Norm | None = None  # what kept tokens meet first, where it can be shared between layers
        self.one_head = True  # of the queries that kept tokens are given
        self.learned = False
        self.kept: Tensor | None = None  # tokens that are on their way to their keys and values
        self.unit: Tensor | None = None  # the same, normalized

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """What runs in the place of whose forward pass."""
        yield self.layer, self.forward
        for module in attentions(self.layer):
            yield module, partial(self._attend, module.forward)
            for name, linear in module.named_children():
                if name == "q_proj" and hasattr(linear, "out_features"):
                    size: Any = linear.out_features
                    yield linear, partial(self._query, linear.forward, (getattr(module, "head_dim", size), size))
        for module in self.layer.children():
            if [(name, p.dim()) for name, p in module.named_parameters()] == [("weight", 1)]:
                yield module, partial(self._normalize, module.forward, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass."""
        tokens = self.running.tokens
        if tokens is None:
            return self.own(*args, **kwargs)
        settings = dict(zip(self.names, args, strict=False)) | kwargs
        computed, kept = tokens.split(settings.pop(self.names[0]))
        again = getattr(self.layer, "gradient_checkpointing", False) and self.layer.training
        if again:
            settings[CACHE] = None
        if not self.learned:
            self._learn(kept, tokens.settings(settings, 1))
        unit = self.norm.unit(tokens, kept) if self.norm else None
        run = partial(self._run, tokens, settings, again, unit)
        func: Any = self.layer._gradient_checkpointing_func if again else None
        output = func(run, computed, kept) if again else run(computed, kept)
        return replace_hidden(output, tokens.join(tokens.changed(computed, hidden_of(output)), kept))

    def _run(
        self, tokens: Tokens, settings: dict[str, Any], again: bool, unit: Tensor | None, computed: Tensor, kept: Tensor
    ) -> Any:
        """The layer's own forward pass for the computed tokens. `again`: all of it runs again in the backward pass."""
        source = partial(self._keys_values, kept, unit, tokens.settings(settings, 1))
        lent = _Lent(source, tokens, settings.get(CACHE), self._blank(), again)
        output = self._plainly(computed, tokens.settings({MASK: None} | settings, 0) | {CACHE: lent})
        if not lent.used:
            raise self._refusal()
        return output

    def _plainly(self, states: Tensor, settings: dict[str, Any]) -> Any:
        """The layer's own forward pass; what of it runs again in the backward pass is decided here, not there."""
        flags = vars(self.layer)
        before = flags.get("gradient_checkpointing")
        if before:
            flags["gradient_checkpointing"] = False
        try:
            return self.own(states, **settings)
        finally:
            if before:
                flags["gradient_checkpointing"] = before

    def _keys_values(self, kept: Tensor, unit: Tensor | None, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of kept tokens: the layer's own forward pass, up to where it has them."""
        cache = settings.get(CACHE)
        self.kept, self.unit = kept, unit
        try:
            self._plainly(kept, settings | {CACHE: _Caught(self._blank() if cache is None else cache)})
        except _Caught as caught:
            caught.with_traceback(None)  # its frames refer to it: a cycle, which would keep their tensors
            if all(part.shape[-2] == kept.shape[1] for part in caught.pair):
                return caught.pair
        finally:
            self.kept = self.unit = None
        raise self._refusal()

    def _blank(self) -> DynamicCache:
        """What tells a layer that there is no token before these."""
        return DynamicCache(config=self.running.config)

    def _refusal(self) -> UserError:
        return UserError(
            f"layer {self.number} of this {self.kind} model does not attend to keys and values of each token: route it"
        )

    def _learn(self, kept: Tensor, settings: dict[str, Any]) -> None:
        """Find out by trying which work for kept tokens is not needed."""
        with torch.no_grad():
            try:
                self._keys_values(kept, None, settings)
            except UserError:
                raise
            except Exception:  # its code wants all heads, or whatever else makes it trip once more below
                self.one_head = False
        self.learned = True

    def _attend(self, own: Forward, *args: Any, **kwargs: Any) -> Any:
        lent = kwargs.get(CACHE)
        if isinstance(lent, _Lent) and not lent.again and torch.is_grad_enabled():
            # Else keys and values of all kept tokens would stay for the backward pass.
            return checkpoint(own, *args, use_reentrant=False, **kwargs)
        return own(*args, **kwargs)

    def _query(self, own: Forward, widths: tuple[int, int], states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """No query is asked of kept tokens: zeros will do, of one head where the family's code takes that."""
        if self.kept is None:
            given: Tensor = own(states, *args, **kwargs)
            return given
        return states.new_zeros(widths[0 if self.one_head else 1]).expand(*states.shape[:-1], -1)

    def _normalize(self, own: Forward, norm: nn.Module, states: Tensor) -> Tensor:
        if states is self.kept and not self.learned:
            self.norm = _Norm.of(norm, states)
        if states is self.kept and self.unit is not None and self.norm:
            return self.norm.scaled(self.unit)
        given: Tensor = own(states)
        return given


class _Norm:
    """A norm that scales what it has normalized by its weight, or by 1 + weight (Gemma).

    Layers in a row normalize the same kept tokens, each with a weight of its own: it is done once.
    """

    def __init__(self, norm: nn.Module, offset: int) -> None:
        self.norm, self.offset = norm, offset
        scalars = {name: value for name, value in vars(norm).items() if isinstance(value, float)}  # epsilon
        self.key = (type(norm), offset, str(scalars), str(norm.weight.dtype))

    @classmethod
    def of(cls, norm: nn.Module, states: Tensor) -> _Norm | None:
        """By trying it on the states; None where it does something else."""
        states, tolerance = states.clone(), 8 * torch.finfo(states.dtype).eps  # not the kept ones: no more to learn
        given = norm(states)
        for one in (cls(norm, 0), cls(norm, 1)):
            if torch.allclose(one.scaled(one._unit(states)), given, rtol=tolerance, atol=tolerance):
                return one
        return None

    def unit(self, tokens: Tokens, kept: Tensor) -> Tensor:
        """The kept tokens, normalized and not scaled."""
        return tokens.shared(kept, self.key, partial(self._unit, kept))

    def _unit(self, states: Tensor) -> Tensor:
        weight: Any = self.norm.weight
        neutral = torch.full_like(weight, 1 - self.offset)
        made: Tensor = functional_call(self.norm, {"weight": neutral}, (states,))
        return made

    def scaled(self, unit: Tensor) -> Tensor:
        """What the norm makes of the tokens that became `unit`."""
        weight: Any = self.norm.weight
        return weight * unit if not self.offset else (unit * (weight.float() + 1)).to(unit.dtype)


class _Lent:
    """In the place of the key-value cache, or of none: it adds the keys and values of kept tokens to those it gets."""

    def __init__(
        self, source: Callable[[], tuple[Tensor, Tensor]], tokens: Tokens, cache: Any, blank: Any, again: bool
    ) -> None:
        self.source, self.tokens, self.cache, self.blank, self.used = source, tokens, cache, blank, False
        self.again = again or cache is not None  # writing to a cache twice would be wrong

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, in their order, and of those before them."""
        self.used = True
        keys, values = (self.tokens.joined(*pair) for pair in zip((keys, values), self.source(), strict=True))
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.blank if self.cache is None else self.cache, name)


class _Caught(Exception):  # noqa: N818 - a way out, and no error
    """In the place of the cache, too: carries the keys and values that a layer writes to it out of the layer."""

    pair: tuple[Tensor, Tensor]

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Stop here."""
        self.pair = keys, values
        raise self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def multiply_adds(vlm: Vlm, region: Region, *, image: int, text: int) -> int:
    """Multiplications and additions of the decoder layers in the forward pass of one record of so many tokens.

    A routed layer does all its products for all T = image + text tokens, and attention 2 T^2 H d; any other does them
    for text tokens, those of keys and values for image tokens, and attention 2 text T H d. Head, tower and projector
    come on top. `vlm` may be without weights (`meta`).
    """
    total, length = 0, image + text
    for number, layer in enumerate(vlm.layers):
        queries = length if number in region else text
        every, keys, width = _products(layer, vlm.model.config.get_text_config(decoder=True))
        total += queries * every + (length - queries) * keys + 2 * queries * length * width
    return total


def _products(layer: nn.Module, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Of a token in a layer: the multiply-adds of all its matrices, those until it has keys and values, and the width
    H d of its queries."""
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    every = sum(
        weight.numel() if weight.dim() == 2 else weight.numel() // len(weight) * used
        for weight in layer.parameters()
        if weight.dim() > 1
    )
    attention = next(module for module in attentions(layer))
    linear = {name: module for name, module in attention.named_children() if isinstance(module, nn.Linear)}
    output = next(module for name, module in linear.items() if name in OUTPUTS)
    keys = sum(module.weight.numel() for name, module in linear.items() if name not in (*OUTPUTS, "q_proj"))
    return every, keys, output.in_features

"""The sections of a training step (images, decoder layers, head and loss), each counted by running it on fake tensors:
FLOPs, memory traffic and live memory, operation by operation."""

from __future__ import annotations

import copy
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from striate.routing.layer import Unrouted
from striate.routing.tokens import Pass, Tokens
from striate.studies.cost.fake_model import FakeModel, holder
from striate.vlm import linear_in
from striate.vlm.modes import hidden_of, replace_forward
from striate.vlm.modules import ALL, choose_names

_ATEN: Any = torch.ops.aten
# PyTorch has formulas for the attention of GPUs only; that of a CPU, with the same arithmetic, would pass for free.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""FLOPs of an operation from its arguments and result, as `FlopCounterMode` counts them; all others are free."""


@dataclass(frozen=True)
class Work:
    """Operations by their FLOPs and the bytes that they read and write, and how many there are of each kind."""

    operations: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        total = Counter(self.operations)
        total.update(other.operations)  # `+` would build both anew
        return Work(total)

    def __mul__(self, times: int) -> Work:
        return Work(Counter({operation: number * times for operation, number in self.operations.items()}))

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition being two."""
        return sum(flops * number for (flops, _), number in self.operations.items())

    @property
    def traffic(self) -> int:
        """Bytes read and written."""
        return sum(traffic * number for (_, traffic), number in self.operations.items())

    def seconds(self, rate: float, bandwidth: float) -> float:
        """How long it takes at `rate` FLOP/s and `bandwidth` bytes/s.

        Every operation takes as long as the slower of its arithmetic and its memory traffic: the roofline model
        (Williams, Waterman, Patterson 2009).
        """
        return sum(
            number * max(flops / rate, traffic / bandwidth) for (flops, traffic), number in self.operations.items()
        )


def total(works: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(works, Work())


class Tally(TorchDispatchMode):
    """Counts what runs within it; on fake tensors nothing is computed or allocated.

    `work` is what was done since the last `take`; `live` the bytes of tensors made within it that are still held,
    `peak` the most that were ever held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work, self.live, self.peak = Work(), 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def take(self) -> Work:
        """The work since the last time."""
        taken, self.work = self.work, Work()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        count = FORMULAS.get(func.overloadpacket)
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        if func._schema.is_mutable or not _is_view(inputs, outputs):
            self.work.operations[flops, sum(map(_size, inputs)) + sum(map(_size, outputs))] += 1
        self._hold(outputs, inputs)
        return result

    def _hold(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Count new storages, until they are freed; storages of inputs are not counted."""
        for tensor in inputs:
            self._known.add(tensor.untyped_storage())
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


def _is_view(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether nothing was written: the result is another look at what came in."""
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in given for tensor in outputs)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Trained = Literal["full", "lora"]


@dataclass(frozen=True)
class Passed:
    """Of a layer outside the route: the image tokens of a record, and whether it is the first or the last of such
    layers in a row."""

    image_tokens: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Section:
    """What one section of a training step does and holds, on one device.

    `kept` are the bytes that its forward pass leaves for the backward pass, its result among them; `rise` the most
    bytes held during the forward pass, `fall` during the backward pass, on top of what was there before it
    began. `trained` counts parameters.
    """

    forward: Work
    backward: Work = Work()
    kept: int = 0
    rise: int = 0
    fall: int = 0
    trained: int = 0


def measure(fake_model: FakeModel, forward: Callable[[], torch.Tensor], *, trained: int = 0) -> Section:
    """Run a section forward and, where its result has a gradient, backward."""
    with fake_model.mode, Tally() as tally:
        with fake_model.running():
            result = forward()
        there, rise, kept = tally.take(), tally.peak, tally.live
        if not result.requires_grad:
            return Section(there, rise=rise, trained=trained)
        tally.peak = tally.live
        result.backward(torch.empty_like(result))
        return Section(there, tally.take(), kept=kept, rise=rise, fall=tally.peak, trained=trained)


def layer_section(
    fake_model: FakeModel,
    layer: nn.Module,
    call: tuple[torch.Tensor, dict[str, Any]],
    *,
    trains: Trained | None,
    modules: str = ALL,
    rank: int,
    upstream: bool,
    recomputed: bool,
    passed: Passed | None = None,
) -> Section:
    """A decoder layer, its `modules` trained or all of it frozen; `upstream`: whether something below it needs a
    gradient; `passed`: it is outside the route."""
    given, others = call
    layer = _copy(fake_model, layer)
    with fake_model.mode:
        if trains == "full":
            named = dict(layer.named_parameters())
            _train(named[name] for name in choose_names(named, modules))
        hidden = torch.empty_like(given, requires_grad=upstream)
    if trains == "lora":
        _adapt(fake_model, layer, modules, rank)

    if passed:
        forward = _passed_by(fake_model, layer, hidden, others, passed, recomputed)
    else:
        run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if recomputed else layer

        def forward() -> torch.Tensor:
            return hidden_of(run(hidden, **others))

    return measure(fake_model, forward, trained=_num_trained(layer))


def _passed_by(
    fake_model: FakeModel, layer: nn.Module, hidden: torch.Tensor, others: dict[str, Any], passed: Passed,
    recomputed: bool,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    """The forward pass of a layer outside the route (`striate.routing`), for records of one length that begin with
    their image tokens.

    Such layers in a row hand on both parts of the tokens; only the first splits, and only the last joins them.
    """
    vlm, mode = fake_model.vlm, fake_model.mode
    kept = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    kept[:, : passed.image_tokens] = True
    tokens = Tokens(kept)
    tokens.convert(mode.from_tensor)
    running = Pass(vlm.model.config.get_text_config(decoder=True), tokens)
    unrouted = Unrouted(running, 0, layer, vlm.model.config.model_type)
    unrouted.learned = True  # by comparing values, which fake tensors do not have
    replace_forward(dict(unrouted.forwards()))
    if recomputed:
        vars(layer)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        vars(layer)["gradient_checkpointing"] = True
    if not passed.first:
        with mode:
            parts = [torch.empty_like(part, requires_grad=hidden.requires_grad) for part in tokens.split(hidden)]
            hidden = tokens.join(*parts)

    def run() -> torch.Tensor:
        states = hidden_of(layer(hidden, **others))
        if not passed.last:
            states, _ = tokens.split(states)
        tokens.end()
        return states

    return run


def _copy(fake_model: FakeModel, layer: nn.Module) -> nn.Module:
    """The layer with tensors of its own, of the same shapes and types: fake ones cannot be copied."""
    with fake_model.mode:
        fresh: dict[int, Any] = {id(buffer): torch.empty_like(buffer) for buffer in layer.buffers()}
        for parameter in layer.parameters():
            fresh[id(parameter)] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        return copy.deepcopy(layer, fresh)


def _adapt(fake_model: FakeModel, layer: nn.Module, modules: str, rank: int) -> None:
    """Put LoRA on the linear modules of one layer, as training does: the adapters in float32, dropout and all."""
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and not needed without adapters

    pattern = "|".join(map(re.escape, choose_names(linear_in(layer), modules)))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=pattern)
    inject_adapter_in_model(config, layer, low_cpu_mem_usage=True)  # on `meta`: peft cannot make fake tensors
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                with fake_model.mode:
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))


def _train(parameters: Iterable[nn.Parameter]) -> None:
    """In float32, as training keeps what it changes."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def head_section(fake_model: FakeModel, records: int, tokens: int, answer: int) -> Section:
    """Final norm, logits of the answers' tokens, and the loss, from the last layer's output."""
    vlm, inner = fake_model.vlm, holder(fake_model.vlm)
    name = vlm.parts.layers.rpartition(".")[2]
    layers = vlm.layers
    with fake_model.mode:
        hidden = torch.empty(records, tokens, fake_model.width, dtype=vlm.model.dtype, requires_grad=True)
        targets = torch.empty(records * answer, dtype=torch.long)

    def forward() -> torch.Tensor:
        states = inner(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits = vlm.head(states[:, -answer:].flatten(end_dim=1))
        return F.cross_entropy(logits, targets, reduction="none").sum()

    setattr(inner, name, nn.ModuleList())  # what is left of the decoder without its layers
    try:
        return measure(fake_model, forward)
    finally:
        setattr(inner, name, layers)


def vision_section(fake_model: FakeModel, images: int, patches: int, *, trains: bool, whole: bool) -> Section:
    """Tower and projector for `images` images. The tower is frozen; the projector, with `trains`, is in float32.

    Where a tower cannot run without a real image, every weight is taken to be multiplied with each of `patches`.
    `whole`: bare parameters beside the projector's modules train as well (LoRA leaves them).
    """
    vlm = fake_model.vlm
    bridge = [p for part in vlm.projector for p in _parameters(part, whole=whole)]
    with fake_model.mode:
        for parameter in bridge:
            parameter.data = parameter.data.to(torch.float32 if trains else vlm.model.dtype)
            parameter.requires_grad_(trains)
    trained = sum(parameter.numel() for parameter in bridge) if trains else 0
    if fake_model.tokens_per_image is not None:
        return measure(fake_model, partial(fake_model.features, images), trained=trained)
    tower = _matmuls([p for p in vlm.tower.parameters() if not p.requires_grad], patches)
    joint = _matmuls(bridge, patches)
    return Section(tower + joint, joint * 2 if trains else Work(), trained=trained)


def _matmuls(weights: list[nn.Parameter], rows: int) -> Work:
    """Every matrix, or kernel, times `rows` vectors: its own bytes are read, the vectors' stay near."""
    return Work(Counter((2 * p.numel() * rows, p.numel() * p.element_size()) for p in weights if p.dim() > 1))


def _parameters(part: nn.Module | nn.Parameter, *, whole: bool) -> list[nn.Parameter]:
    if isinstance(part, nn.Module):
        return list(part.parameters())
    return [part] if whole else []


def _num_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

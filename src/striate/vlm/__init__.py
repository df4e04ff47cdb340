"""Load any Hugging Face vision-language model (LVLM), find its parts, select what to train, and defer its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from striate.errors import UserError, first_line
from striate.region import Layers, Region
from striate.vlm.devices import align_memory, check_device, default_device
from striate.vlm.modes import override_forward
from striate.vlm.modules import ALL, check_present, choose_names, parse_modules
from striate.vlm.parts import Parts, find_parts
from striate.vlm.processors import check_match, image_token_id, load_processor
from striate.vlm.reading import check_config, check_size, model_folder, read_model
from striate.vlm.template import check_template, set_stop_tokens


@dataclass(frozen=True)
class Selection:
    """The trainable parameters, by exact name. `total` counts all parameters of the model, including frozen ones;
    `modules` are the matrices of the region's layers that train: all, or attention, mlp, gate_up, ..."""

    region: Region
    layers: tuple[str, ...]
    projector: tuple[str, ...]
    tower: tuple[str, ...]
    counts: dict[str, int]
    total: int
    modules: str = ALL

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all trainable parameters."""
        return self.layers + self.projector + self.tower

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(self.counts.values())


@dataclass
class DeferredHead:
    """The head of a model, applied after its forward pass, with what follows it in the family (soft-capping, scaling).

    `holder` is the module that contains `body` and head; `states` [N, D] are the last outputs of the body.
    """

    holder: nn.Module
    body: nn.Module
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    output: Any = None

    def with_states(self, states: torch.Tensor) -> Any:
        """The body's last output with its states replaced by these [1, N, D]."""
        return type(self.output)(**{**self.output, "last_hidden_state": states})

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of states [N, D]: the holder's own forward pass, with a body that returns these states."""
        inputs = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        output = self.with_states(states.unsqueeze(0))
        with override_forward({self.body: lambda *_, **__: output}):
            return self.holder(input_ids=inputs, use_cache=False).logits[0]


@dataclass(frozen=True)
class Vlm:
    """A vision-language model and its parts.

    `source` is the folder or hub id it was loaded from; the processor is loaded from there on first use. `notes` are
    warnings about how the model was loaded. Wrap a model that is already in memory with `Vlm.of(model)`.
    """

    model: PreTrainedModel
    parts: Parts
    source: str = ""
    notes: tuple[str, ...] = ()
    own_processor: Any = None
    """The processor of a model in memory, which has no `source` to load it from."""

    @classmethod
    def of(cls, model: PreTrainedModel, processor: Any = None, *, source: str = "") -> Vlm:
        """Find the parts of a model in memory.

        Raises:
            UserError: the model is an encoder-decoder, or has no tower or no list of decoder layers.
        """
        return cls(model, find_parts(model), source, own_processor=processor)

    @classmethod
    def on_meta(cls, config: PreTrainedConfig, source: str = "") -> Vlm:
        """A model of this config on the `meta` device: all modules, no weights.

        Raises:
            UserError: no model can be built from the config, or its parts are not found.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
        except Exception as error:  # each family raises its own errors for an incomplete config
            raise UserError(
                f"cannot build the {config.model_type} model from its config: {first_line(error)}"
            ) from error
        return cls.of(model, source=source)

    @cached_property
    def processor(self) -> Any:
        """The model's processor (`AutoProcessor`). Also adds its end tokens to the model's generation config.

        Raises:
            UserError: there is no processor, it does not match the model, or the generation prompt of its chat template
                is not how its conversations begin an answer.
        """
        processor = load_processor(self.source) if self.own_processor is None else self.own_processor
        self._check_image_token(processor)
        check_template(processor)
        check_match(self.model, processor, image_token_id(processor), self.source)
        set_stop_tokens(self.model.generation_config, processor)
        return processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The padding token of batches; the end token where the tokenizer has none. Padding is masked."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.get_submodule(self.parts.tower)

    @property
    def projector(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """The modules (and, in LLaVA-NeXT, the bare parameter) that map vision features to the decoder."""
        return tuple(_lookup(self.model, name) for name in self.parts.projector)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.model.get_submodule(self.parts.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def head(self) -> nn.Module:
        """The language-model head: hidden state to logits."""
        return self.model.get_submodule(self.parts.head)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def image_token_id(self) -> int | None:
        """The token in `input_ids` that is replaced by one image feature; None where the config has none."""
        return next((token for token in self._image_tokens().values() if token is not None), None)

    def region_parameters(self, region: Region, modules: str = ALL) -> tuple[str, ...]:
        """Exact names of the parameters in the region's decoder layers, in model order; `modules` leaves others out.

        Raises:
            UserError: the region is for another depth, or its layers have no such modules.
        """
        region = Region.of(region, self.depth)
        chosen, inside = parse_modules(modules), self._names_inside(region)
        if region.layers:
            check_present((own for names in inside.values() for own in names), chosen, self.model.config.model_type)
        return tuple(f"{prefix}.{name}" for prefix, names in inside.items() for name in choose_names(names, chosen))

    def linear_modules(self, region: Region, modules: str = ALL) -> tuple[str, ...]:
        """Exact names of the linear modules in the region's layers, to which LoRA is added.

        Raises:
            UserError: the region is for another depth.
        """
        region, chosen = Region.of(region, self.depth), parse_modules(modules)
        layers = {self._layer_name(layer): self.layers[layer] for layer in region}
        return tuple(
            f"{prefix}.{name}" for prefix, layer in layers.items() for name in choose_names(linear_in(layer), chosen)
        )

    def _names_inside(self, region: Region) -> dict[str, list[str]]:
        """The names of the parameters within each layer of a region, by the layer's own."""
        named = {self._layer_name(layer): self.layers[layer].named_parameters() for layer in region}
        return {prefix: [name for name, _ in parameters] for prefix, parameters in named.items()}

    def _layer_name(self, layer: int) -> str:
        return f"{self.parts.layers}.{layer}"

    @contextmanager
    def head_at(self, positions: torch.Tensor) -> Iterator[None]:
        """Context in which the model computes logits only at `positions`, with its own head.

        `positions` [B, T] bool; the model's logits become [1, N, vocabulary], for the N true entries in row-major
        order. The model applies soft-capping, scaling and tied weights itself; no B x T x vocabulary tensor exists.
        """

        def pick(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (picked(inputs[0]).unsqueeze(0), *inputs[1:])

        picked = _picker(positions)
        handle = self.head.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def defer_head(self, positions: torch.Tensor) -> Iterator[DeferredHead]:
        """Context in which the model skips its head and computes no logits.

        `positions` [B, T] bool. After the forward pass the `DeferredHead` holds the N states at its true entries, in
        row-major order, and computes the logits of any of them.

        Raises:
            UserError: the module with the head has no separate body, so the head cannot be skipped.
        """
        holder = self.model.get_submodule(self.parts.head.rpartition(".")[0])
        body = getattr(holder, "base_model", holder)
        if body is holder:
            raise UserError(
                f"{type(holder).__name__} has no body separate from its head, so the head cannot be skipped"
            )
        tail = DeferredHead(holder, body)
        picked = _picker(positions)

        def skip(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            hidden = output["last_hidden_state"]  # B T D
            tail.states, tail.output = picked(hidden), output
            return tail.with_states(hidden[:, :0])

        handle = body.register_forward_hook(skip)
        try:
            yield tail
        finally:
            handle.remove()

    def _image_tokens(self) -> dict[str, int | None]:
        """The config keys of the image token and its id; empty for families without such a token."""
        config = self.model.config
        names = (config.attribute_map.get(name, name) for name in ("image_token_id", "image_token_index"))
        return {name: getattr(config, name) for name in names if hasattr(config, name)}

    def _check_image_token(self, processor: Any) -> None:
        # Without the key in config.json, the config has the default of its family, which is another token here.
        named = self._image_tokens()
        if not named:
            return
        written = image_token_id(processor)
        if not {written, *processor.tokenizer.added_tokens_decoder} & set(named.values()):
            expected = "no image token" if self.image_token_id is None else f"image token {self.image_token_id}"
            raise UserError(
                f"{self.source}: the model expects {expected}, its processor writes {written} "
                f"({processor.image_token}): set {next(iter(named))} to {written} in config.json",
                see="processor-and-model-differ",
            )

    def names_below(self, *prefixes: str) -> tuple[str, ...]:
        """Names of the parameters inside these modules, or with exactly these names, in model order."""
        dotted = tuple(f"{prefix}." for prefix in prefixes)
        return tuple(name for name, _ in self.model.named_parameters() if name in prefixes or name.startswith(dotted))


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn: str | None = None,
    dequantize: bool = False,
    mapped: bool = False,
) -> Vlm:
    """Load any LVLM and find its parts; `striate.routing.load` does, and turns on the route of its checkpoint.

    With `mapped` the weights stay memory-mapped, on the CPU: they take memory only once they are changed.

    Raises:
        UserError: the model does not exist, is not a vision-language model, has parts that are not found, or is too
            large; `check_folder` rejects the folder; weights are missing, are quantized without an entry in
            config.json, or belong to layers beyond those of the config.
    """
    source = str(model_folder(path))
    place = check_device(device) if device else default_device()
    if place.type == "cuda":  # cuDNN's attention compiles a plan, in up to a second, for every length of a batch
        torch.backends.cuda.enable_cudnn_sdp(False)
    config = check_config(source)
    check_size(config, source, dtype, place)
    model: Any
    model, notes = read_model(source, config, dtype=dtype, attn=attn, dequantize=dequantize)
    return replace(Vlm.of(model if mapped else align_memory(model.to(place)), source=source), notes=notes)


def select(vlm: Vlm, region: Layers, *, modules: str = ALL, projector: bool = True, tower: bool = False) -> Selection:
    """Select the trainable parameters: the region's layers, optionally the projector and the tower; freeze all others.

    Sets `requires_grad` of every parameter. `region` is a region, a text form of one (uniform:25%) or layer numbers.
    `modules` are the matrices of its layers that train: all, or some of attention, mlp, gate_up, down, qkv, o,
    separated by commas.

    Raises:
        UserError: the region is for another depth, no layer of it has such modules, or no parameter is selected.
    """
    chosen = Region.of(region, vlm.depth)
    in_projector = vlm.names_below(*vlm.parts.projector)
    groups = {
        "layers": vlm.region_parameters(chosen, modules),
        "projector": in_projector if projector else (),
        # In Qwen and GLM the projector (merger) is inside the tower; only the option `projector` selects it.
        "tower": tuple(name for name in vlm.names_below(vlm.parts.tower) if name not in in_projector) if tower else (),
    }
    selected = {name for names in groups.values() for name in names}
    if not selected:
        raise UserError("nothing would train: select a region, the projector or the tower")
    sizes = {}
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(name in selected)
        sizes[name] = parameter.numel()
    counts = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
    return Selection(chosen, **groups, counts=counts, total=sum(sizes.values()), modules=parse_modules(modules))


def load_on_meta(path: str | Path) -> Vlm:
    """Build an LVLM on the `meta` device from its config alone, without weights, and find its parts.

    `path` is a model folder, a run folder or a hub id. A folder needs only config.json.

    Raises:
        UserError: the model does not exist, is not a vision-language model, or has parts that are not found.
    """
    source = str(model_folder(path))
    return Vlm.on_meta(check_config(source), source)


def linear_in(layer: nn.Module) -> tuple[str, ...]:
    """Names of the linear modules in a layer, in module order."""
    return tuple(name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and _is_map(module))


def _is_map(module: nn.Linear) -> bool:
    """Whether it returns one tensor: Llama 4's router is a subclass of `nn.Linear`, but returns scores and logits."""
    if not type(module).__module__.startswith("transformers.models."):  # torch's own class, or a quantized one
        return True
    with torch.no_grad():
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def _picker(positions: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from states [B, T, D] to those at the true entries of `positions` [B, T].

    Counting them waits for a GPU where the positions are on it; on the CPU it does not.
    """
    index = positions.flatten().nonzero()[:, 0]

    def picked(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:2] != positions.shape:
            raise ValueError(f"there are states at {tuple(hidden.shape[:2])}, not {tuple(positions.shape)} positions")
        return hidden.flatten(0, 1).index_select(0, index.to(hidden.device, non_blocking=True))

    return picked


def _lookup(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    holder, _, last = name.rpartition(".")
    return getattr(model.get_submodule(holder), last)

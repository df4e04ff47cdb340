"""Any Hugging Face vision-language model (LVLM): loaded, taken apart, told what trains, stopped short of its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from striate.checkpoint import check_folder
from striate.errors import UserError
from striate.region import Region
from striate.run import model_folder
from striate.vlm.parts import Parts, find_parts

# What configs call their number of layers, and more of them than any model has: each costs time even without weights.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1000


@dataclass(frozen=True)
class Plan:
    """What trains, by exact parameter name. `total` counts every parameter of the model, frozen ones included."""

    region: Region
    layers: tuple[str, ...]
    projector: tuple[str, ...]
    tower: tuple[str, ...]
    counts: dict[str, int]
    total: int

    @property
    def names(self) -> tuple[str, ...]:
        """All parameter names that train."""
        return self.layers + self.projector + self.tower

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(self.counts.values())


@dataclass
class Tail:
    """What a model does behind its body: the head, and whatever its family puts after it (soft caps, scales).

    `holder` is the module that holds `body` and head; `states` [N, D] left the body in the last forward pass.
    """

    holder: nn.Module
    body: nn.Module
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    output: Any = None

    def with_states(self, states: torch.Tensor) -> Any:
        """The body's last output with other states [1, N, D] in it."""
        return type(self.output)(**{**self.output, "last_hidden_state": states})

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of states [N, D]: the holder's own forward pass, in which the body gives these states."""
        inputs = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        output = self.with_states(states.unsqueeze(0))
        own = vars(self.body).get("forward")
        vars(self.body)["forward"] = lambda *_, **__: output
        try:
            return self.holder(input_ids=inputs, use_cache=False).logits[0]
        finally:
            del vars(self.body)["forward"]
            if own is not None:  # accelerate wraps it so
                vars(self.body)["forward"] = own


@dataclass(frozen=True)
class Vlm:
    """A vision-language model taken apart.

    `source` is the folder or hub id it came from; the processor is read from there when first asked for. Wrap a model
    that is already in memory with `Vlm.of(model)`.
    """

    model: PreTrainedModel
    parts: Parts
    source: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, source: str = "") -> Vlm:
        """Find the parts of a model in memory.

        Raises:
            UserError: the model is an encoder-decoder, has no tower or no list of decoder layers; says what was found.
        """
        return cls(model, find_parts(model), source)

    @classmethod
    def sketched(cls, config: PreTrainedConfig, source: str = "") -> Vlm:
        """A model of this config on the `meta` device: every module, and no weights.

        Raises:
            UserError: the config makes no model, or one that cannot be taken apart.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
        except Exception as error:  # whatever a family trips over when its config lacks something
            raise UserError(f"the config makes no {config.model_type} model: {first_line(error)}") from error
        return cls.of(model, source)

    @cached_property
    def processor(self) -> Any:
        """The model's processor (`AutoProcessor`).

        Raises:
            UserError: there is none, or it writes another image token than the model looks for.
        """
        processor = load_processor(self.source)
        self._check_image_token(processor)
        return processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The token that fills batches up; the end token where the tokenizer has none. It is masked either way."""
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
    def decoder(self) -> nn.Module:
        """The module that holds the decoder layers and runs them."""
        return self.model.get_submodule(self.parts.layers.rpartition(".")[0])

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
        """Where the model is."""
        return self.model.device

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for one image feature in `input_ids`; None where the config names none."""
        return next((token for token in self._image_tokens().values() if token is not None), None)

    def region_parameters(self, region: Region) -> tuple[str, ...]:
        """Exact names of the parameters in the region's decoder layers, in model order.

        Raises:
            UserError: the region was made for another depth.
        """
        if region.depth != self.depth:
            raise UserError(
                f"region {region} is for {region.depth} decoder layers, this model has {self.depth}: "
                "choose it again for this depth"
            )
        return self._below(*(f"{self.parts.layers}.{layer}" for layer in region))

    def train_only(self, region: Region, *, projector: bool = True, tower: bool = False) -> Plan:
        """Let gradients reach the region's layers, the projector and the tower as asked, and nothing else.

        Sets `requires_grad` on every parameter of the model.

        Raises:
            UserError: the region is for another depth, or nothing at all would train.
        """
        bridge = self._below(*self.parts.projector)
        groups = {
            "layers": self.region_parameters(region),
            "projector": bridge if projector else (),
            # In Qwen and GLM the projector (merger) lives inside the tower; it answers to `projector` alone.
            "tower": tuple(name for name in self._below(self.parts.tower) if name not in bridge) if tower else (),
        }
        chosen = {name for names in groups.values() for name in names}
        if not chosen:
            raise UserError("nothing would train: choose a region, the projector or the tower")
        sizes = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)
            sizes[name] = parameter.numel()
        counts = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
        return Plan(region, **groups, counts=counts, total=sum(sizes.values()))

    def linear_modules(self, region: Region) -> tuple[str, ...]:
        """Exact names of the linear modules in the region's layers, where LoRA goes."""
        if region.depth != self.depth:
            raise UserError(f"region {region} is for depth {region.depth}, this model has {self.depth} layers")
        layers = {f"{self.parts.layers}.{layer}": self.layers[layer] for layer in region}
        return tuple(f"{prefix}.{name}" for prefix, layer in layers.items() for name in linear_in(layer))

    @contextmanager
    def head_at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within it, the model computes logits at `positions` only, through its own head.

        `positions` [B, T] bool; the model's logits become [1, N, vocabulary], N = number of true entries in row-major
        order. Soft-capping, scaling and tied weights stay the model's business; no B x T x vocabulary tensor exists.
        """

        def pick(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = inputs[0]  # B T D
            if hidden.shape[:2] != positions.shape:
                raise ValueError(f"the head sees {tuple(hidden.shape[:2])} positions, not {tuple(positions.shape)}")
            return (hidden[positions].unsqueeze(0), *inputs[1:])

        handle = self.head.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def short_of_head(self, positions: torch.Tensor) -> Iterator[Tail]:
        """Within it, the model stops short of its head: it makes no logits.

        `positions` [B, T] bool. After the forward pass the `Tail` holds the N states at its true entries, in row-major
        order, and turns any of them into logits.

        Raises:
            UserError: the module that holds the head has no body of its own whose output could be held back.
        """
        holder = self.model.get_submodule(self.parts.head.rpartition(".")[0])
        body = getattr(holder, "base_model", holder)
        if body is holder:
            raise UserError(f"{type(holder).__name__} has no body apart from its head")
        tail = Tail(holder, body)

        def hold_back(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            hidden = output["last_hidden_state"]  # B T D
            tail.states, tail.output = hidden[positions], output
            return tail.with_states(hidden[:, :0])

        handle = body.register_forward_hook(hold_back)
        try:
            yield tail
        finally:
            handle.remove()

    def _image_tokens(self) -> dict[str, int | None]:
        """What the config calls the image token, with its id. Families that need no such token have no name for it."""
        config = self.model.config
        names = (config.attribute_map.get(name, name) for name in ("image_token_id", "image_token_index"))
        return {name: getattr(config, name) for name in names if hasattr(config, name)}

    def _check_image_token(self, processor: Any) -> None:
        # Where config.json does not name it, the config has the default of its family, which is a word or nothing here.
        named = self._image_tokens()
        if not named:
            return
        written = image_token_id(processor)
        if not {written, *processor.tokenizer.added_tokens_decoder} & set(named.values()):
            looks_for = "no image token" if self.image_token_id is None else f"image token {self.image_token_id}"
            raise UserError(
                f"{self.source}: the model looks for {looks_for}, its processor writes {written} "
                f"({processor.image_token}): set {next(iter(named))} to {written} in config.json"
            )

    def _below(self, *prefixes: str) -> tuple[str, ...]:
        dotted = tuple(f"{prefix}." for prefix in prefixes)
        return tuple(name for name, _ in self.model.named_parameters() if name in prefixes or name.startswith(dotted))


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn: str | None = None,
) -> Vlm:
    """Load any LVLM and find its parts.

    Args:
        path: a model folder, a run folder (its checkpoint is meant) or a hub id.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`.
        device: `cpu`, `cuda`, ...; default: a GPU when there is one.
        attn: attention implementation of `transformers` (`sdpa`, `eager`, `flash_attention_2`); default: its choice.

    Raises:
        UserError: no such model, not a vision-language model, one that cannot be taken apart, or too large a one; a
            folder that `check_folder` refuses.

    Remote code is never run; weights are read from safetensors only.
    """
    source = str(model_folder(path))
    check_size(check_config(source), source, dtype)
    place = torch.device(device) if device else default_device()
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attn, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        model, report = loaded
    except Exception as error:  # a config can make a family trip over anything
        raise UserError(f"cannot load the model in {source}: {first_line(error)}") from error
    if report["missing_keys"]:
        name, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise UserError(f"{source} lacks {count} weights of a {model.config.model_type} model, {name} among them")
    return Vlm.of(aligned(model.to(place)), source)


def sketch(path: str | Path) -> Vlm:
    """An LVLM's parts from its config alone: on the `meta` device, without weights.

    `path` is a model folder, a run folder or a hub id. A folder may hold no more than config.json.

    Raises:
        UserError: no such model, not a vision-language model, or one that cannot be taken apart.
    """
    source = str(model_folder(path))
    return Vlm.sketched(check_config(source), source)


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights where products of matrices like them, at multiples of 64 bytes.

    Read from a file they lie anywhere, and on some CPUs the same product of the same numbers comes out otherwise by a
    bit then: two loads of one model would not agree.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for products of bfloat16 matrices. A CPU without them takes ten times as long as in
    float32."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(known.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def check_config(source: str) -> PreTrainedConfig:
    """The config of a model; refuses early, before any weight is read, what is not a vision-language model.

    Raises:
        UserError: no config, or a config of another kind of model, or of more layers than any has; adapters that are
            not merged; a folder that `check_folder` refuses.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} is no model folder: it has no config.json")
    if (Path(source) / "adapter_config.json").is_file():
        raise UserError(f"{source} holds adapters beside a model: merge them into it, or take them away")
    check_folder(Path(source))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        odd = _odd_size(config.to_dict())
    except Exception as error:  # a file that anybody may have written
        raise UserError(
            f"no model at {source!r}: expected a model folder, a run folder or a hub id ({first_line(error)})"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{source} holds a {config.model_type} model, which is not an image-text-to-text model; "
            "give a vision-language model, or make one with `striate assemble`"
        )
    if odd:
        raise UserError(f"{source}: its config asks for {odd}, and no model has that")
    return config


def check_size(config: PreTrainedConfig, source: str, dtype: str | torch.dtype = "auto") -> None:
    """Refuse a model that this machine's memory could never hold, before anything is allocated for it.

    Raises:
        UserError: says how much it takes.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception:  # loading will say what is wrong; some families have nothing for this device
        return
    kept: Any = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    needed, there = kept.itemsize * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().total
    if needed > there:
        raise UserError(f"{source}: its weights take {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:.0f} GB")


def _odd_size(config: Any) -> str:
    """The first size in a config that no model has and that costs time before it fails; empty when there is none."""
    if not isinstance(config, dict):
        return ""
    for key, value in config.items():
        if isinstance(value, int) and (value > MOST_LAYERS if key in LAYERS else key == "hidden_size" and value < 1):
            return f"{key} {value:,}"
    return next(filter(None, map(_odd_size, config.values())), "")


def load_processor(source: str) -> Any:
    """The processor saved with a model.

    Raises:
        UserError: there is none, or it needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"the processor of {source} needs a package that is not installed: {first_line(error)} "
            "(several families need torchvision for their video half: pip install torchvision)"
        ) from error
    except Exception as error:  # files that anybody may have written
        raise UserError(f"cannot load a processor from {source or 'nowhere'}: {first_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{source} has no processor for images and text, only a {type(processor).__name__}")
    return processor


def image_token_id(processor: Any) -> int:
    """The id of the tokens that image features take the place of.

    Raises:
        UserError: the processor names none.
    """
    # The first id is the features' own; Pixtral and InternVL list those of borders behind it. Gemma 3's
    # `image_token_id` is the mark in the prompt, not what it grows into.
    if token := _IMAGE_TOKENS.get(type(processor).__name__):
        return int(processor.tokenizer.convert_tokens_to_ids(token))
    found = processor.image_token_ids[0]
    if found is None and getattr(processor, "image_token", None):  # Janus' names the token, and not its id
        found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if found is None:
        raise UserError(f"{type(processor).__name__} names no image token: striate cannot tell where images are")
    return int(found)


# Processors that do not say which it is: what they name is the end of a row (Fuyu) or the mark in the prompt.
_IMAGE_TOKENS = {"FuyuProcessor": "|SPEAKER|", "Llama4Processor": "<|patch|>", "Ovis2Processor": "<IMG_ATOM>"}


def linear_in(layer: nn.Module) -> tuple[str, ...]:
    """Names of the linear modules in a layer, in its order."""
    return tuple(name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and _is_map(module))


def _is_map(module: nn.Linear) -> bool:
    """Whether it gives what a linear module gives: Llama 4's router is one by class, and gives scores and logits."""
    if not type(module).__module__.startswith("transformers.models."):  # torch's, or one with quantised weights
        return True
    with torch.no_grad():
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def _lookup(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    holder, _, last = name.rpartition(".")
    return getattr(model.get_submodule(holder), last)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for use inside one of ours."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

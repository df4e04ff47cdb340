"""Cutting decoder layers out of a checkpoint on disk: weights are streamed, config and index edited.

No model is loaded and the source is not changed. All files except weights and config are copied unchanged: processor,
tokenizer, chat templates, generation config, model card.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from striate.errors import UserError
from striate.prune.cutting import Numbering, depth_name, route_after
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.routing import ENTRY
from striate.vlm import Vlm
from striate.weights import copy, tensors

CONFIG = "config.json"
MAP = "prune.json"
# Weights in any format, and their indices: copies would still have the removed layers.
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|ot)(\.index\.json)?")
FOLDERS = ("additional_chat_templates",)
# Files with layer numbers: the caller writes them with the new numbers.
STALE = (CONFIG, MAP, REGION_FILE)


@dataclass(frozen=True)
class Surgery:
    """How to cut layers out of one checkpoint.

    `stem` is the name of the layers' tensors on disk, up to the number ("language_model.model.layers."), `modules` the
    same in memory; `settings` are the changed settings of the decoder's config, `path` the keys that lead to it within
    config.json, `aliases` other names of its settings, `depth_name` its name for the depth; `route` is
    the new route, if there is one.
    """

    numbers: Numbering
    stem: str
    modules: str
    settings: Mapping[str, Any]
    path: tuple[str, ...]
    aliases: Mapping[str, str]
    depth_name: str
    route: Region | None

    @classmethod
    def of(cls, vlm: Vlm, source: Path, numbers: Numbering) -> Surgery:
        """Derive the surgery from the whole model and the names of tensors on disk.

        Raises:
            UserError: no tensors on disk match the decoder's layers, or no layer of the route is left.
        """
        text = vlm.model.config.get_text_config(decoder=True)
        name = depth_name(text)
        return cls(
            numbers=numbers,
            stem=_stem(vlm, source),
            modules=f"{vlm.parts.layers}.",
            settings=numbers.renumber(vars(text), name),
            path=_config_path(vlm.model.config, text),
            aliases=dict(text.attribute_map),
            depth_name=name,
            route=route_after(vlm.model.config, numbers),
        )

    def write(self, source: Path, folder: Path) -> None:
        """Write the checkpoint into a new folder.

        The config is written last, so that an incomplete checkpoint after an interrupt does not load.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True)
        copy(source, folder, self.rename)
        for file in sorted(source.iterdir()):
            if file.is_dir() and file.name in FOLDERS:
                shutil.copytree(file, folder / file.name)
            elif file.is_file() and file.name not in STALE and not WEIGHT_FILES.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
        config = self.edit(json.loads((source / CONFIG).read_bytes()))
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def rename(self, tensor: str) -> str | None:
        """A tensor's name with the new layer number; None when its layer is removed."""
        return self._rename(tensor, self.stem)

    def edit(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the decoder's settings for the new layer numbers, in every place that has them.

        They are in the decoder's own config, at the top level (older Qwen2-VL), or in both.
        """
        config = {key: value for key, value in config.items() if key != ENTRY}
        if self.route is not None and len(self.route) < self.numbers.depth:
            config[ENTRY] = self.route.to_json()
        if "quantization_config" in config:
            config["quantization_config"] = self._rename_modules(config["quantization_config"])
        nested = self._nested(config)
        if nested is not config:
            nested |= self._changes(nested)
        if nested is config or self._has_depth(config):
            changes = self._changes(config)
            # Settings of the decoder's own config are not added at the top level.
            config |= {key: value for key, value in changes.items() if nested is config or key in config}
        return config

    def _nested(self, config: dict[str, Any]) -> dict[str, Any]:
        """The decoder's own part of a config, with copies of the mappings on the way; the config itself without one."""
        nested = config
        for key in self.path:
            if not isinstance(nested.get(key), dict):
                return config
            nested[key] = dict(nested[key])
            nested = nested[key]
        return nested

    def _has_depth(self, settings: Mapping[str, Any]) -> bool:
        names = {self.depth_name, *(alias for alias, name in self.aliases.items() if name == self.depth_name)}
        return any(settings.get(name) == self.numbers.removed.depth for name in names)

    def _changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The changed settings, under the names that the config uses; those that it leaves out are added."""
        used = {name: alias for alias, name in self.aliases.items() if alias in config and name not in config}
        changes = {used.get(name, name): value for name, value in self.settings.items()}
        return self.numbers.renumber(config, self.depth_name) | changes

    def _rename_modules(self, value: Any) -> Any:
        """Rename the modules in a quantization config, such as those that are not quantized."""
        if isinstance(value, dict):
            items = {self._rename_module(key): self._rename_modules(one) for key, one in value.items()}
            return {key: one for key, one in items.items() if key is not None}
        if isinstance(value, list):
            entries = (self._rename_module(one) if isinstance(one, str) else self._rename_modules(one) for one in value)
            return [one for one in entries if one is not None]
        return value

    def _rename_module(self, name: str) -> str | None:
        stem = next((stem for stem in (self.stem, self.modules) if name.startswith(stem)), None)
        return name if stem is None else self._rename(name, stem)

    def _rename(self, name: str, stem: str) -> str | None:
        number, dot, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem) or not number.isdecimal():
            return name
        if int(number) in self.numbers.removed:
            return None
        # Layers above the decoder's last (multi-token prediction) stay above it.
        return f"{stem}{self.numbers.boundary(int(number))}{dot}{rest}"


def _config_path(config: PreTrainedConfig, text: PreTrainedConfig) -> tuple[str, ...]:
    """The keys that lead from a config to the decoder's."""
    if config is text:
        return ()
    for key, value in vars(config).items():
        if value is text:
            return (key,)
        if isinstance(value, PreTrainedConfig) and (rest := _config_path(value, text)):
            return (key, *rest)
    return ()


def _stem(vlm: Vlm, source: Path) -> str:
    """The name of the decoder's layers on disk: of all numbered lists, the one that matches most tensors of layer 0.

    `transformers` renames tensors on loading, so that names in memory and on disk differ.
    """
    layer = {name: tuple(tensor.shape) for name, tensor in vlm.layers[0].state_dict().items()}
    matches: dict[str, int] = defaultdict(int)
    for one in tensors(source):
        for match in re.finditer(r"(?:^|\.)0\.", one.name):
            # Tensors packed by a quantization have other shapes; norms keep theirs.
            matches[one.name[: match.end() - 2]] += layer.get(one.name[match.end() :]) == one.shape
    stem = max(matches, key=lambda one: matches[one], default="")
    if not matches[stem]:
        raise UserError(f"{source}: no tensor matches one of {vlm.parts.layers}.0, the first decoder layer")
    return stem

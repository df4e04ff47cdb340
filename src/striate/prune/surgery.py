"""A checkpoint without some of its decoder layers, made on disk: weights streamed, config and index edited.

Nothing is read into a model and nothing of the source is touched. All files but weights and config go along as they
are: processor, tokenizer, chat templates, generation config, card.
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
from striate.prune.bypass import depth_name
from striate.prune.numbering import Numbering
from striate.prune.stream import copy_weights, stored
from striate.region import FILE as REGION_FILE
from striate.vlm import Vlm

CONFIG = "config.json"
MAP = "prune.json"
# Weights in any format, and what belongs to them: copies of these would still have the layers that went.
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|ot)(\.index\.json)?")
FOLDERS = ("additional_chat_templates",)
# Files that say where a region is: the caller writes them in the new numbers.
STALE = (CONFIG, MAP, REGION_FILE)


@dataclass(frozen=True)
class Surgery:
    """How to cut layers out of one checkpoint.

    `stem` is what the layers' tensors are called on disk, up to the number ("language_model.model.layers."), `modules`
    the same in memory; `settings` what changes in the decoder's config, `place` the keys that lead to it within
    config.json, `aliases` other spellings of a setting.
    """

    numbers: Numbering
    stem: str
    modules: str
    settings: Mapping[str, Any]
    place: tuple[str, ...]
    aliases: Mapping[str, str]
    depth_name: str

    @classmethod
    def of(cls, vlm: Vlm, source: Path, numbers: Numbering) -> Surgery:
        """Find out from the model as it is, layers and all, and from the names on disk.

        Raises:
            UserError: no tensors on disk that look like the decoder's layers.
        """
        text = vlm.model.config.get_text_config(decoder=True)
        name = depth_name(text)
        return cls(
            numbers=numbers,
            stem=_stem(vlm, source),
            modules=f"{vlm.parts.layers}.",
            settings=numbers.renumbered(vars(text), name),
            place=_place(vlm.model.config, text),
            aliases=dict(text.attribute_map),
            depth_name=name,
        )

    def write(self, source: Path, folder: Path) -> None:
        """Write the checkpoint into a new folder.

        The config comes last: without it, what an interrupt leaves behind loads nowhere.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True)
        copy_weights(source, folder, self.rename)
        for file in sorted(source.iterdir()):
            if file.is_dir() and file.name in FOLDERS:
                shutil.copytree(file, folder / file.name)
            elif file.is_file() and file.name not in STALE and not WEIGHT_FILES.fullmatch(file.name):
                shutil.copyfile(file, folder / file.name)
        config = self.edited(json.loads((source / CONFIG).read_bytes()))
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def rename(self, tensor: str) -> str | None:
        """A tensor's name in the new numbers, None when its layer goes."""
        return self._rename(tensor, self.stem)

    def edited(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the decoder's settings in the new numbers, wherever they are spelt out.

        They are in the decoder's own config, at the top (older Qwen2-VL), or in both.
        """
        config = dict(config)
        if "quantization_config" in config:
            config["quantization_config"] = self._renamed(config["quantization_config"])
        nested = self._nested(config)
        if nested is not config:
            nested |= self._settings(nested)
        if nested is config or self._spelt(config):
            changes = self._settings(config)
            # What the decoder's own config says needs no second place.
            config |= {key: value for key, value in changes.items() if nested is config or key in config}
        return config

    def _nested(self, config: dict[str, Any]) -> dict[str, Any]:
        """The decoder's own part of a config, copied on the way there; all of it where it has none."""
        nested = config
        for key in self.place:
            if not isinstance(nested.get(key), dict):
                return config
            nested[key] = dict(nested[key])
            nested = nested[key]
        return nested

    def _spelt(self, settings: Mapping[str, Any]) -> bool:
        names = {self.depth_name, *(alias for alias, name in self.aliases.items() if name == self.depth_name)}
        return any(settings.get(name) == self.numbers.removed.depth for name in names)

    def _settings(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """The changes, in the spelling that is there: what it does not spell out is written down, defaults and all."""
        spelling = {name: alias for alias, name in self.aliases.items() if alias in written and name not in written}
        known = {spelling.get(name, name): value for name, value in self.settings.items()}
        return self.numbers.renumbered(written, self.depth_name) | known

    def _renamed(self, value: Any) -> Any:
        """Module names in a quantisation config, such as those that it leaves alone."""
        if isinstance(value, dict):
            items = {self._module(key): self._renamed(one) for key, one in value.items()}
            return {key: one for key, one in items.items() if key is not None}
        if isinstance(value, list):
            entries = (self._module(one) if isinstance(one, str) else self._renamed(one) for one in value)
            return [one for one in entries if one is not None]
        return value

    def _module(self, name: str) -> str | None:
        stem = next((stem for stem in (self.stem, self.modules) if name.startswith(stem)), None)
        return name if stem is None else self._rename(name, stem)

    def _rename(self, name: str, stem: str) -> str | None:
        number, dot, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem) or not number.isdecimal():
            return name
        if int(number) in self.numbers.removed:
            return None
        # Layers above the decoder's last (for multi-token prediction) stay above it.
        return f"{stem}{self.numbers.boundary(int(number))}{dot}{rest}"


def _place(config: PreTrainedConfig, text: PreTrainedConfig) -> tuple[str, ...]:
    """The keys that lead from a config to the decoder's."""
    if config is text:
        return ()
    for key, value in vars(config).items():
        if value is text:
            return (key,)
        if isinstance(value, PreTrainedConfig) and (rest := _place(value, text)):
            return (key, *rest)
    return ()


def _stem(vlm: Vlm, source: Path) -> str:
    """What the decoder's layers are called on disk: of all numbered lists, the one with the tensors of layer 0.

    `transformers` renames tensors as it loads them, so that the names in memory need not be on disk.
    """
    layer = {name: list(tensor.shape) for name, tensor in vlm.layers[0].state_dict().items()}
    found: dict[str, int] = defaultdict(int)
    for shard in stored(source):
        for name, about in shard.tensors.items():
            for match in re.finditer(r"(?:^|\.)0\.", name):
                # Packed by a quantisation, tensors have other shapes; the norms still have theirs.
                found[name[: match.end() - 2]] += layer.get(name[match.end() :]) == about["shape"]
    stem = max(found, key=lambda one: found[one], default="")
    if not found[stem]:
        raise UserError(f"{source}: no tensor there looks like one of {vlm.parts.layers}.0, the first decoder layer")
    return stem

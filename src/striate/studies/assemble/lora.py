"""LoRA deltas merged into the weights they belong to, one by one: W + scale * B A (Hu et al. 2021, sec. 4.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from striate.errors import UserError
from striate.weights import StoredTensor, file_tensors

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Options of peft beyond plain LoRA, with the values for which the delta is scale * B A.
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
         "modules_to_save": None}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """The pairs (A [r, in], B [out, r]) of a checkpoint, by the name of the weight in a LLaVA of transformers."""

    pairs: dict[str, tuple[StoredTensor, StoredTensor]]
    scale: float
    base: str

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the adapter's config and the table of its tensors.

        Raises:
            UserError: it is missing or is not plain LoRA.
        """
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        for key, plain in PLAIN.items():
            if config.get(key) not in (plain, None, [], {}):
                raise UserError(f"{folder / CONFIG} sets {key} to {config[key]}: only plain LoRA can be merged")
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has {CONFIG} but neither {' nor '.join(FILES)}")
        rank = config["r"]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        halves = {one.name: one for one in file_tensors(file)}
        pairs = {}
        for name, half in halves.items():
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                if other not in halves:
                    raise UserError(f"{file} lacks {other}")
                pairs[_weight(name)] = (half, halves[other])
        return cls(pairs, scale, str(config.get("base_model_name_or_path") or "its base model"))

    def merge(self, weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The same weights, the adapted ones with their delta.

        Raises:
            UserError: a delta belongs to no weight, or to one of another size.
        """
        if lost := self.pairs.keys() - weights.keys():
            raise UserError(f"{len(lost)} LoRA deltas belong to no weight, {min(lost)} among them")
        for name, (a, b) in self.pairs.items():
            if weights[name].shape != (b.shape[0], a.shape[1]):
                raise UserError(f"{name} does not fit its LoRA delta: give --llm {self.base}")
        return weights | {name: weights[name].transform(self._delta(*pair)) for name, pair in self.pairs.items()}

    def _delta(self, a: StoredTensor, b: StoredTensor) -> Any:
        def add(weight: Tensor) -> Tensor:
            delta = b.read().float() @ a.read().float()
            return (weight.float() + self.scale * delta).to(weight.dtype)

        return add


def _weight(name: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` (peft < 0.5: `.lora_A.default.weight`), in LLaVA."""
    return f"language_model.{name.removeprefix('base_model.model.').split('.lora_A.')[0]}.weight"

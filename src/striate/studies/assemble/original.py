"""Original LLaVA-1.5 and Bunny checkpoints as plain `LlavaForConditionalGeneration` ones, without their code.

Three layouts, recognized by their files: a whole model; LoRA deltas (`adapter_model.*`, with the projector in
`non_lora_trainables.bin`), merged into a base language model; a stage-1 projector alone (`mm_projector.bin`), put
between a base language model and a vision encoder. What the families differ in is in `FAMILIES` and `TOWERS`.

Facts: `llava_arch.py`, `clip_encoder.py`, `builder.py` (haotian-liu/LLaVA); `bunny_arch.py`, `siglip_encoder.py`,
`builder.py` (BAAI-DCAI/Bunny). Both feed the projector from hidden state -2; LLaVA drops CLIP's class token, SigLIP
has none. The projector is `mlp2x_gelu`: linear, GELU, linear.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from striate.errors import UserError, first_line
from striate.vlm.reading import model_folder
from striate.weights import StoredTensor, check_folder, file_tensors, tensors, weight_files

PROJECTOR = "mm_projector.bin"
BESIDE_LORA = "non_lora_trainables.bin"
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a hub model: never code."""


# Vision encoders by the name that `mm_vision_tower` ends with, as their own config.json has them.
TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
# From an original name to that in a LLaVA checkpoint of transformers; the first that fits.
RENAMED = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Positions that old versions saved, and the pooling head, which features of an inner layer never pass.
UNUSED = (".rotary_emb.inv_freq", ".embeddings.position_ids", "vision_model.head.")
BARE_TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Options of peft beyond plain LoRA, with the values for which the delta is scale * B A.
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
         "modules_to_save": None}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What an original `model_type` means: the language model's type in transformers, and the wording of a chat."""

    text: str
    wording: str


FAMILIES = {
    "llava_llama": Family("llama", "vicuna_v1"),
    "llava": Family("llama", "vicuna_v1"),  # the name until 2024
    "bunny-llama": Family("llama", "bunny_llama3"),
    "bunny-phi3": Family("phi3", "bunny_phi3"),
}


@dataclass(frozen=True)
class Original:
    """An original checkpoint: its folder and its config.json."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str) -> Original:
        """Read the config.

        Raises:
            UserError: there is none, or it is of another kind of model than the paper's; a folder that `check_folder`
                refuses.
        """
        folder = local(path)
        check_folder(folder)
        config = read_json(folder / "config.json")
        original = cls(folder, config)
        if config.get("model_type") not in FAMILIES or "mm_projector_type" not in config:
            kind = f"{config.get('model_type')} model" + ("" if "mm_projector_type" in config else " without projector")
            raise UserError(f"{path} holds a {kind}: an original of {', '.join(FAMILIES)} was expected (--import)")
        if (projector := config["mm_projector_type"]) != "mlp2x_gelu":
            raise UserError(f"{path} has a {projector} projector: a plain LLaVA supports mlp2x_gelu only")
        for feature in ("use_s2", "mm_use_im_start_end"):
            if config.get(feature):
                raise UserError(f"{path} sets {feature}, which a plain LLaVA checkpoint does not support")
        return original

    @property
    def family(self) -> Family:
        """What its model_type means."""
        return FAMILIES[self.config["model_type"]]

    @property
    def tower_name(self) -> str:
        """The vision encoder as the config names it."""
        return str(self.config.get("mm_vision_tower", "its vision encoder"))

    @property
    def needs_base(self) -> bool:
        """Whether the checkpoint lacks a language model: LoRA deltas, or a projector alone."""
        return (self.folder / "adapter_config.json").is_file() or not weight_files(self.folder, pickles=True)

    def tensors(self) -> list[StoredTensor]:
        """The checkpoint's own tensors (but for LoRA's), by their names in a whole model."""
        if not self.needs_base:
            return tensors(self.folder, pickles=True)
        file = self.folder / (BESIDE_LORA if (self.folder / "adapter_config.json").is_file() else PROJECTOR)
        if not file.is_file():
            raise UserError(f"{self.folder} lacks {file.name}; download it again", see="missing-weights")
        return file_tensors(file)

    def adapter(self) -> Adapter | None:
        """Its LoRA deltas; None if it has none."""
        return Adapter.open(self.folder) if (self.folder / "adapter_config.json").is_file() else None


def local(path: str) -> Path:
    """A folder: the one given, a run's checkpoint, the folder of a given file, or a hub model's files."""
    place = Path(model_folder(path))
    if place.is_dir():
        return place
    if place.is_file():
        return place.parent
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise UserError(f"no model at {path!r}: expected a folder or a hub id ({first_line(error)})") from error


def read_json(file: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return found


def text_config(fields: dict[str, Any], family: Family) -> PreTrainedConfig:
    """The language model's half of an original config; without the keys about images."""
    known = AutoConfig.for_model(family.text).to_dict().keys() | {"rope_theta", "rope_scaling"}
    foreign = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype"}
    kept = {key: value for key, value in fields.items() if key in known - foreign and value is not None}
    return AutoConfig.for_model(family.text, **kept)


def vision_config(original: Original, vision: Path | None) -> PreTrainedConfig:
    """The vision encoder's config: of the folder given, or of the one that the original names.

    Raises:
        UserError: neither is known.
    """
    if vision is not None:
        found = read_json(vision / "config.json")
        fields = dict(found.get("vision_config", found))
        fields.setdefault("model_type", f"{found.get('model_type')}_vision_model")
    else:
        name = Path(original.tower_name).name
        if name not in TOWERS:
            raise UserError(f"{original.folder}: give --vision, the folder of {original.tower_name}")
        fields = dict(TOWERS[name])
    kind = fields.pop("model_type")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(f"{vision} holds a {kind}: LLaVA and Bunny use CLIP or SigLIP (--vision)")
    unused = {"vision_use_head": False} if kind.startswith("siglip") else {}
    return AutoConfig.for_model(kind, **fields | unused)


def llava_config(original: Original, text: PreTrainedConfig, vision: PreTrainedConfig, *, layers: int) -> LlavaConfig:
    """The plain config. `layers` is how many layers of the tower are there; some checkpoints leave out the unread.

    Raises:
        UserError: the layer that is read is not there.
    """
    select = int(original.config.get("mm_vision_select_layer", -2))
    read = select if select >= 0 else vision.num_hidden_layers + 1 + select  # hidden state 0 is the embeddings
    if layers < read:
        raise UserError(f"the vision tower has {layers} layers, but features are read after layer {read}")
    vision.num_hidden_layers = layers
    clip = vision.model_type == "clip_vision_model"
    feature = original.config.get("mm_vision_select_feature", "patch")
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=read - (layers + 1),
        vision_feature_select_strategy="default" if clip and feature == "patch" else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a plain checkpoint, as it is published (llava-hf)."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    renamed = (
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."), ("model.", ""),
    )  # fmt: skip
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return {_rename(k, renamed): tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}


def gather(original: Original, base: Path | None, vision: Path | None) -> dict[str, StoredTensor]:
    """All tensors by their new names: the encoder's, the base's, and over them what the checkpoint itself has.

    Raises:
        UserError: a file cannot be read, or no weights of a part are anywhere.
    """
    found: dict[str, StoredTensor] = {}
    if vision is not None:
        seen = (one for one in tensors(vision, pickles=True) if _of_tower(one.name))
        found |= {f"vision_tower.{_tower_name(one.name)}": one for one in seen}
    if base is not None:
        found |= {_rename(one.name, RENAMED): one for one in tensors(base, pickles=True)}
    found |= {_rename(_whole_name(one.name), RENAMED): one for one in original.tensors()}
    if not any(name.startswith("vision_tower.") for name in found):
        raise UserError(
            f"{original.folder} holds no weights of its vision tower: give --vision, the folder of "
            f"{original.tower_name}"
        )
    adapter = original.adapter()
    found = found if adapter is None else adapter.merge(found)
    return {name: one for name, one in found.items() if not any(part in name for part in UNUSED)}


def check(found: dict[str, StoredTensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise for missing, unknown or misshapen tensors.

    Raises:
        UserError: tensors are missing, unknown, or of another size.
    """
    for names, what in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has no place for")):
        if names:
            raise UserError(f"the model {what} {len(names)} tensors, {min(names)} among them")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            have, want = (" x ".join(map(str, size)) for size in (found[name].shape, shape))
            part = "projector" if name.startswith("multi_modal_projector.") else "model"
            raise UserError(f"the {part} does not fit: {name} is {have} in {found[name].file}, {want} was expected")


def num_layers(names: Iterable[str], prefix: str = "vision_tower.vision_model.encoder.layers.") -> int:
    """The number of tower layers with weights."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((new + name[len(old) :] for old, new in table if name.startswith(old)), name)


def _whole_name(name: str) -> str:
    """The name without the prefix of peft; a bare projector of newer scripts gets the model's prefix."""
    name = name.removeprefix("base_model.model.")
    return f"model.{name}" if name.startswith("mm_projector.") else name


def _of_tower(name: str) -> bool:
    """Whether a tensor of a vision encoder's checkpoint is the tower's, not the text half's."""
    return name.startswith(("vision_model.", *BARE_TOWER))


def _tower_name(name: str) -> str:
    return f"vision_model.{name}" if name.startswith(BARE_TOWER) else name


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
        file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has {CONFIG} but neither {' nor '.join(ADAPTERS)}")
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

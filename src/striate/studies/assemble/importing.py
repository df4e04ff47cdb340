"""The import of an original checkpoint, tensor by tensor; the projector alone, read and written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from striate.errors import UserError, first_line
from striate.roundtrip import check_new
from striate.runs.run import Run
from striate.studies.assemble.original import (
    FAMILIES,
    PROJECTOR,
    TOWERS,
    Original,
    check,
    expected_shapes,
    gather,
    llava_config,
    local,
    num_layers,
    read_json,
    text_config,
    vision_config,
)
from striate.studies.assemble.parts import add_image_token, processor
from striate.studies.assemble.processor import IMAGE_TOKEN, Aspect, for_tower, pad_to_square, wording
from striate.vlm.template import set_stop_tokens
from striate.weights import StoredTensor, file_tensors, tensors, write

EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


# Of `nn.Sequential(Linear, GELU, Linear)` in the original, and of transformers' projector of LLaVA.
NAMES = {"0": "linear_1", "2": "linear_2"}


def import_original(
    path: str,
    *,
    out: Path,
    vision: str | None = None,
    llm: str | None = None,
    template: str | None = None,
    aspect: Aspect | None = None,
    dtype: str | None = None,
) -> Run:
    """An original LLaVA-1.5 or Bunny checkpoint as a plain one; see `assemble` for the arguments.

    Raises:
        UserError: a part is missing or does not fit.
    """
    original = Original.open(path)
    tower = None if vision is None else local(vision)
    base = _base(original, llm)
    text = text_config(original.config if base is None else _base_fields(original, base), original.family)
    seen = vision_config(original, tower)
    found = gather(original, base, tower)
    text.tie_word_embeddings = bool(text.tie_word_embeddings and _one_table(found))
    config = llava_config(original, text, seen, layers=num_layers(found))
    check(found, expected_shapes(config))
    tokenizer = _tokenizer(original.folder if base is None or _has_tokenizer(original.folder) else base, text)
    talk = wording(template or original.family.wording, tokenizer)
    found = _with_image_token(found, config, text, tokenizer)
    if dtype is not None:
        found = {name: one.cast(getattr(torch, dtype)) for name, one in found.items()}
    config.dtype = found[EMBEDDINGS[0]].dtype
    padding = (aspect or original.config.get("image_aspect_ratio")) == "pad"
    process = processor(tokenizer, _image_processor(seen, tower, padding), config, template=talk.template)
    generation = _generation(original.folder if base is None else base)
    set_stop_tokens(generation, process)
    options = {"import": path, "vision": vision, "llm": llm, "template": template, "aspect": aspect, "dtype": dtype}
    run = Run.create(out, verb="assemble", options=options, parent=path)
    with run.recording():
        run.checkpoint.mkdir()
        write(run.checkpoint, (replace(one, name=name) for name, one in found.items()))
        for part in (config, process, generation):
            part.save_pretrained(run.checkpoint)
        if note := check_new(run.checkpoint):
            run.warn(note)
        run.update(depth=text.num_hidden_layers, parameters=sum(math.prod(one.shape) for one in found.values()))
    return run


def _one_table(found: dict[str, StoredTensor]) -> bool:
    """Whether embeddings and head are equal, as a config that ties them says; a second copy is removed.

    `transformers` ties them only then.
    """
    embeddings, head = (found.get(name) for name in EMBEDDINGS)
    if head is None or embeddings is None:
        return True
    if tied := torch.equal(embeddings.read(), head.read()):
        del found[EMBEDDINGS[1]]
    return tied


def _base(original: Original, llm: str | None) -> Path | None:
    """The folder of the base language model, if the checkpoint has none."""
    if not original.needs_base:
        return None
    if llm is None:
        adapter = original.adapter()
        name = adapter.base if adapter else original.config.get("_name_or_path", "its base model")
        what = "LoRA deltas" if adapter else "a projector alone"
        raise UserError(f"{original.folder} holds {what}: give --llm, the language model they were made for ({name})")
    return local(llm)


def _base_fields(original: Original, base: Path) -> dict[str, Any]:
    fields = read_json(base / "config.json")
    if fields.get("model_type") != original.family.text:
        raise UserError(f"{base} is a {fields.get('model_type')} model: {original.family.text} was expected (--llm)")
    return fields


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _tokenizer(folder: Path, text: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with an image token and a padding token."""
    try:  # the config says which language model it is; the folder's own may be of an unknown type
        tokenizer = AutoTokenizer.from_pretrained(folder, config=text, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from {folder}: {first_line(error)}") from error
    add_image_token(tokenizer)
    return tokenizer


def _with_image_token(
    found: dict[str, StoredTensor], config: LlavaConfig, text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, StoredTensor]:
    """Add rows of the vocabulary for new tokens, and update the configs.

    Each is the mean of all others: its logit is then the mean logit, which is never the largest.
    """
    config.architectures = ["LlavaForConditionalGeneration"]
    config.image_token_index = int(tokenizer.get_vocab()[IMAGE_TOKEN])
    config.pad_token_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
    size = text.vocab_size
    rows = max(len(tokenizer), size)

    def grow(table: Tensor) -> Tensor:
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        return torch.cat([table, mean.expand(rows - size, table.shape[1])])

    text.vocab_size = rows
    tables = {name: found[name] for name in EMBEDDINGS if name in found and rows > size}
    return found | {name: one.transform(grow, shape=(rows, one.shape[1])) for name, one in tables.items()}


def _image_processor(vision: PreTrainedConfig, tower: Path | None, padding: bool) -> Any:
    own = for_tower(vision)
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        own = AutoImageProcessor.from_pretrained(tower, use_fast=False, trust_remote_code=False)
    return pad_to_square(own) if padding else own


def _generation(folder: Path) -> GenerationConfig:
    """The generation config; greedy, without sampling settings that greedy decoding rejects."""
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    generation = GenerationConfig.from_pretrained(folder)
    if not generation.do_sample:  # vicuna's sets a temperature without sampling, which is refused when it is saved
        generation.temperature = generation.top_p = generation.top_k = None
    return generation


def load_projector(projector: nn.Module, path: Path) -> None:
    """Put trained weights into a projector with `linear_1` and `linear_2`.

    `path` is safetensors or an `mm_projector.bin`, with original or transformers names.

    Raises:
        UserError: the file cannot be read or is of another size.
    """
    if not path.is_file():
        raise UserError(f"cannot read the projector {path}: no such file")
    weights = {_plain(one.name): one.read() for one in file_tensors(path)}
    expected = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise UserError(f"the projector {path} does not fit: found {found}, expected {expected}")
    projector.load_state_dict(weights)


def _plain(name: str) -> str:
    """`model.mm_projector.0.weight` and `multi_modal_projector.linear_1.weight` as `linear_1.weight`."""
    part, _, kind = name.rpartition(".")
    layer = part.rpartition(".")[2]
    return f"{NAMES.get(layer, layer)}.{kind}"


def export_projector(model: str, out: Path) -> Run:
    """Write a model's projector as a stage-1 checkpoint of LLaVA or Bunny: `mm_projector.bin` and its `config.json`.

    Only the projector's tensors are read. The result is what `--pretrain_mm_mlp_adapter` takes there and `--import`
    and `--projector` here.

    Raises:
        UserError: the model is not a LLaVA of transformers.
    """
    folder = local(model)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llava":
        raise UserError(f"{model} is a {config.get('model_type')} model: only a llava has LLaVA's projector")
    layers = {plain: original for original, plain in NAMES.items()}
    weights: dict[str, Tensor] = {}
    for one in tensors(folder, pickles=True):
        if "multi_modal_projector." in one.name:
            layer, _, kind = one.name.rpartition("multi_modal_projector.")[2].partition(".")
            weights[f"model.mm_projector.{layers[layer]}.{kind}"] = one.read().clone()
    if len(weights) != 2 * len(NAMES):
        raise UserError(f"{model}: {2 * len(NAMES)} tensors of a projector were expected, found {len(weights)}")
    run = Run.create(out, verb="assemble", options={"export_projector": model}, parent=model)
    with run.recording():
        run.checkpoint.mkdir()
        torch.save(weights, run.checkpoint / PROJECTOR)
        text = json.dumps(_original_config(config), indent=2) + "\n"
        (run.checkpoint / "config.json").write_text(text, encoding="utf-8")
    return run


def _original_config(config: dict[str, Any]) -> dict[str, Any]:
    """A plain LLaVA's config as the originals write theirs: all in one, `mm_` before what is about images."""
    text, vision = dict(config["text_config"]), config["vision_config"]
    side = "bunny" if vision["model_type"].startswith("siglip") else "llava"
    kind = next((k for k, f in FAMILIES.items() if k.startswith(side) and f.text == text["model_type"]), "llava_llama")
    sizes = ("model_type", "hidden_size", "image_size", "patch_size")
    tower = next((n for n, known in TOWERS.items() if all(known[k] == vision.get(k) for k in sizes)), None)
    return text | {
        "model_type": kind,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_select_layer": config["vision_feature_layer"],
        **({"mm_vision_tower": tower} if tower else {}),
    }

"""Load a saved checkpoint again before its run counts as finished, and compare it with the model in memory.

First the weights are compared, tensor by tensor; the saved ones are memory-mapped and take almost no memory. Then the
loaded model replaces the one in memory, and the logits of both, for an image and for a text, must be equal. So there
is never more than one model in memory. If there is no memory for the logits, only the weights are compared, and the
result says so.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from striate.data import Record, RecordError, Records, collate, encode
from striate.errors import UserError, first_line
from striate.routing import open_route
from striate.vlm import Vlm
from striate.vlm.devices import align_memory
from striate.vlm.modes import eval_mode
from striate.vlm.reading import quantization, read_model

Inputs = Mapping[str, Tensor]

POSITIONS = 64
"""Number of last positions of a prompt whose logits are compared; they depend on all positions before them."""
NOISE = 10
"""Allowed difference of two models, in multiples of the difference between two runs of one model (mostly 0)."""

ERRORS = (UserError, OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""What the code of a family raises on a checkpoint or a prompt that does not fit it."""

QUESTION = "What is in the image? Describe it."
TEXT = "The quick brown fox jumps over the lazy dog."


def verify(vlm: Vlm, folder: Path, *, attn: str | None = None, sharded: bool = False) -> str:
    """Compare a saved checkpoint with the model in memory, which is moved to the `meta` device to free its memory.

    The model's weights must have the dtypes in which they were saved.

    Returns:
        What could not be compared and why; empty when everything was compared.

    Raises:
        UserError: the checkpoint does not load or differs from the model; names the first difference. The folder is
            kept.
    """
    try:
        saved = _compare_weights(vlm, folder, attn)
        if sharded:  # a forward pass would wait for the other processes
            return "the saved weights were compared with those in memory, the logits were not (--shard)"
        align_memory(torch.nn.Module.to(vlm.model, vlm.device))  # after sharding, buffers can be on another device
        prompts, expected, why = _prompt_logits(vlm)
        _compare_prompts(replace(vlm, source=str(folder)), prompts)
        device = vlm.device
        vlm.model.to_empty(device="meta")
        free_memory()
        reopened = open_route(Vlm.of(align_memory(torch.nn.Module.to(saved, device)), source=str(folder)))
        for name, before in expected.items():
            _compare_logits(name, before, reopened, prompts[name])
    except (torch.OutOfMemoryError, MemoryError):
        why = "not enough memory"
    except ERRORS as error:
        raise UserError(f"the checkpoint in {folder} is not the model that was saved: {first_line(error)}") from error
    return f"the saved weights were compared with those in memory, the logits were not ({why})" if why else ""


def save(vlm: Vlm, folder: Path) -> None:
    """Save a model in memory as a checkpoint, and load it again: weights, dtypes and ties must be the same.

    Raises:
        UserError: the folder is not empty or cannot be written, or the checkpoint differs from the model; names the
            first difference.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: name a new one", see="folder-in-use")
    try:
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    try:
        _compare_weights(vlm, folder, None)
    except ERRORS as error:
        raise UserError(f"the checkpoint in {folder} is not the model that was saved: {first_line(error)}") from error


def check_new(folder: Path) -> str:
    """Load a checkpoint that was assembled on disk, and run it on an image and on a text.

    Returns:
        A warning; empty when the model loads and its logits are finite.

    Raises:
        UserError: the checkpoint does not load, or has missing or unexpected weights.
    """
    model, notes = read_model(str(folder), AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if notes:
        raise UserError(notes[0])
    if sum(p.numel() * p.element_size() for p in model.parameters()) > psutil.virtual_memory().available:
        return "the model was loaded, but not run: not enough memory"
    _, found, why = _prompt_logits(Vlm.of(align_memory(model), source=str(folder)))
    odd = next((name for name, one in found.items() if not one.isfinite().all()), None)
    why = f"its logits for the {odd} prompt are not finite" if odd else why
    return f"the model was loaded, but {why}" if why else ""


def _prompt_logits(vlm: Vlm) -> tuple[dict[str, Inputs], dict[str, Tensor], str]:
    """The prompts, their logits, and why both are empty where they are: that is not an error of the checkpoint."""
    try:
        prompts = probes(vlm)
        return prompts, {name: logits(vlm, inputs) for name, inputs in prompts.items()}, ""
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ERRORS as error:
        return {}, {}, first_line(error)


def probes(vlm: Vlm, records: Iterable[Record] = (), *, max_length: int = 2048) -> dict[str, Inputs]:
    """The inputs of one prompt with an image ("image") and one without ("text"), if the processor accepts that.

    Each is the first record that can be encoded, else a question about a noise image, and a question or a plain text.

    Raises:
        UserError: no prompt with an image can be encoded: the processor does not match the model.
    """
    known = Records.of(records).records
    image_records = (known[n] for n, size in enumerate(known.sizes) if size.images)
    text_records = (known[n] for n, size in enumerate(known.sizes) if not size.images)
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    question = {"type": "text", "text": QUESTION}
    with_image = Record("", ({"role": "user", "content": [{"type": "image"}, question]},), (noise,), "probe")
    # PaliGemma accepts plain text, but not a question without an image.
    without_image = Record("", ({"role": "user", "content": [question]},), (), "probe")
    plain = Record("", (), (), "probe", text=TEXT)
    image = _first(vlm, chain(image_records, [with_image]), max_length)
    text = _first(vlm, chain(text_records, [without_image, plain]), max_length)
    if image is None:
        kind = vlm.model.config.model_type
        raise UserError(f"the processor of {vlm.source} cannot encode a test prompt for the {kind} model")
    return {"image": image} if text is None else {"image": image, "text": text}  # GOT-OCR's needs an image


def _first(vlm: Vlm, records: Iterable[Record], max_length: int) -> Inputs | None:
    """The inputs of the first record that can be encoded; None if none can."""
    for record in records:
        with suppress(RecordError):
            example = encode(record, vlm.processor, max_length=max_length, generation=True)
            return collate([example], pad_id=vlm.pad_token_id).to(vlm.device, vlm.model.dtype).inputs
    return None


@torch.inference_mode()
def logits(vlm: Vlm, inputs: Inputs) -> Tensor:
    """The logits of a prompt's last positions, on the CPU."""
    last = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool, device=vlm.device)
    last[:, -POSITIONS:] = True
    with eval_mode(vlm.model), vlm.head_at(last):
        return vlm.model(**inputs, use_cache=False).logits.cpu()


def free_memory() -> None:
    """Return the memory of deleted objects to the system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compare_weights(vlm: Vlm, folder: Path, attn: str | None) -> PreTrainedModel:
    """Load the saved model and compare its keys, shapes, dtypes, values and ties; no weight may be quantized."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if method := quantization(config):
        raise UserError(f"its config.json declares it as quantized ({method})")
    model, notes = read_model(str(folder), config, attn=attn)
    if notes:
        raise UserError(notes[0])
    saved, expected = model.state_dict(), vlm.model.state_dict()
    if odd := sorted(saved.keys() ^ expected.keys()):
        raise UserError(f"{odd[0]} is {'unexpected' if odd[0] in saved else 'missing'}")
    for name, tensor in expected.items():
        if (difference := _difference(saved[name], tensor)) is not None:
            raise UserError(f"{name} has {difference}")
    if _ties(model) != _ties(vlm.model):
        raise UserError("its tied weights are different")
    return model


def _difference(found: Tensor, tensor: Tensor) -> str | None:
    if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
        return f"{tuple(found.shape)} values of {found.dtype}, not {tuple(tensor.shape)} of {tensor.dtype}"
    one, other = (part.contiguous().flatten().view(torch.uint8) for part in (found, tensor.cpu()))
    return None if torch.equal(one, other) else "other values"


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names that share one parameter."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _compare_prompts(reopened: Vlm, prompts: Mapping[str, Inputs]) -> None:
    """Check that the saved processor encodes the prompts to the same tokens."""
    for name, inputs in (probes(reopened) if prompts else {}).items():
        if not torch.equal(inputs["input_ids"], prompts[name]["input_ids"]):
            raise UserError(f"its processor encodes the {name} prompt to other tokens")


def _compare_logits(name: str, before: Tensor, reopened: Vlm, inputs: Inputs) -> None:
    found = logits(reopened, inputs)
    if torch.equal(found.nan_to_num(), before.nan_to_num()):
        return
    apart = float((found - before).abs().max())
    if not apart <= NOISE * float((logits(reopened, inputs) - found).abs().max()):  # NaN is not less than anything
        raise UserError(f"the logits for the {name} prompt differ by up to {apart:.2g}")

"""Proof that cutting layers changed nothing else.

Three models must agree bit for bit: the one that bypasses the layers, the one they were cut from, and the one that
plain `transformers` loads from the new checkpoint. What is compared are logits and greedily generated tokens with
their logits, with and without a key-value cache, for a prompt with an image and for one without.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from striate.data import Record, RecordError, collate, encode
from striate.errors import UserError
from striate.prune.bypass import bypass, cut
from striate.prune.numbering import Numbering
from striate.score.replay import at_rest
from striate.vlm import Vlm, aligned, first_line

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]

NEW_TOKENS = 8
POSITIONS = 64
"""The last of the prompt, whose logits are compared; they depend on all before them."""
GREEDY = {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

QUESTION = "What is in the picture? Describe it."
TEXT = "The quick brown fox jumps over the lazy dog."


def probes(vlm: Vlm, records: Iterable[Record] = (), *, max_length: int = 2048) -> dict[str, Inputs]:
    """A prompt with an image and one without, as the model takes them.

    They are the first of the records that can be encoded, else a question about noise and a question alone.

    Raises:
        UserError: neither can be encoded: the processor does not fit the model.
    """
    known = list(records)
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    question = {"type": "text", "text": QUESTION}
    asked = Record("", ({"role": "user", "content": [{"type": "image"}, question]},), (noise,), "probe")
    # PaliGemma takes no question without an image, but plain text.
    alone = Record("", ({"role": "user", "content": [question]},), (), "probe")
    plain = Record("", (), (), "probe", text=TEXT)
    return {
        "image": _first(vlm, [*(one for one in known if one.images), asked], max_length),
        "text": _first(vlm, [*(one for one in known if not one.images), alone, plain], max_length),
    }


def _first(vlm: Vlm, records: list[Record], max_length: int) -> Inputs:
    for record in records:
        with suppress(RecordError):
            example = encode(record, vlm.processor, max_length=max_length, generation=True)
            return collate([example], pad_id=vlm.pad_token_id).to(vlm.device, vlm.model.dtype).inputs
    kind = vlm.model.config.model_type
    raise UserError(f"the processor of {vlm.source} takes no prompt that the {kind} model could be tried with")


@torch.inference_mode()
def observe(vlm: Vlm, prompts: Mapping[str, Inputs]) -> Outputs:
    """What a model makes of each prompt: name to tensor on the CPU, logits and tokens."""
    found: Outputs = {}
    with at_rest(vlm.model):
        for name, inputs in prompts.items():
            last = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool, device=vlm.device)
            last[:, -POSITIONS:] = True
            with vlm.head_at(last):
                found[f"logits for the {name} prompt"] = vlm.model(**inputs, use_cache=False).logits.cpu()
            for cache, title in ((True, "with cache"), (False, "without cache")):
                given = _generate(vlm, inputs, cache)
                found[f"text generated for the {name} prompt {title}"] = given.sequences.cpu()
                found[f"logits generated for the {name} prompt {title}"] = torch.stack(given.logits, dim=1).cpu()
    return found


def _generate(vlm: Vlm, inputs: Inputs, cache: bool) -> Any:
    options: dict[str, Any] = {"use_cache": cache, "output_logits": True, "return_dict_in_generate": True}
    options["suppress_tokens"] = _marks(vlm)
    return vlm.model.generate(**inputs, **GREEDY, **options)  # type: ignore[operator]


def _marks(vlm: Vlm) -> list[int]:
    """Tokens with a meaning for the model's code: an image token that it made up itself would want an image."""
    named = {name: value for name, value in vars(vlm.model.config).items() if "_token_i" in name and value is not None}
    listed = (value if isinstance(value, list | tuple) else [value] for value in named.values())
    return sorted({token for tokens in listed for token in tokens})


def prove_cut(vlm: Vlm, numbers: Numbering, prompts: Mapping[str, Inputs]) -> Outputs:
    """Cut the layers from the model in place, and return what it gives, which is what it gave bypassing them.

    Raises:
        UserError: it is not; the model is then as it may be, and must not be saved.
    """
    with bypass(vlm, numbers.removed):
        expected = observe(vlm, prompts)
    try:
        cut(vlm, numbers)
        found = observe(vlm, prompts)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _refusal(vlm, numbers, f"without them the model fails ({first_line(error)})") from error
    if difference := _difference(expected, found):
        reason = f"the {difference} between the model that skips them and the one without them"
        raise _refusal(vlm, numbers, f"{reason}: it needs them at their place for more than the hidden state")
    return expected


def prove_saved(
    folder: Path, expected: Outputs, prompts: Mapping[str, Inputs], *, numbers: Numbering, device: torch.device,
    dtype: str, attn: str | None,
) -> None:  # fmt: skip
    """Load the checkpoint as anybody does, and hold it against what was expected.

    Raises:
        UserError: it does not load, lacks weights, or gives something else.
    """
    kind = "checkpoint"
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn, output_loading_info=True
        )
        model, report = loaded
        kind = model.config.model_type
        vlm = Vlm.of(aligned(model.to(device)))
        lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        difference = f"{lacking[0]} is missing" if lacking else _difference(expected, observe(vlm, prompts))
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        difference = f"it does not load or run ({first_line(error)})"
    if difference:
        raise UserError(
            f"layers {numbers.removed} cannot be cut: {difference} in the {kind} model when it is loaded again: its "
            "config cannot describe it without them; nothing was written"
        )


def _difference(expected: Outputs, found: Outputs) -> str:
    """The first output that is not the same to the bit; empty when all are."""
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            if tensor.shape != found[name].shape or not tensor.is_floating_point():
                return f"{name} differs"
            return f"{name} differ by up to {float((tensor - found[name]).abs().max()):.2g}"
    return ""


def _refusal(vlm: Vlm, numbers: Numbering, reason: str) -> UserError:
    kind = vlm.model.config.model_type
    return UserError(f"layers {numbers.removed} cannot be cut from this {kind} model: {reason}; nothing was written")

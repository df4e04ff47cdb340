"""Verification that cutting layers changed nothing else.

Three models must agree bit for bit: the one that bypasses the layers, the one without them, and the one that
`transformers` loads from the new checkpoint. Compared are logits and greedily generated tokens with their logits, with
and without a key-value cache, for a prompt with an image and for one without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from striate.errors import UserError, first_line
from striate.prune.cutting import Numbering, bypass, cut
from striate.roundtrip import Inputs, logits
from striate.routing import load
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

Outputs = dict[str, Tensor]

NEW_TOKENS = 8
GREEDY = {
    "do_sample": False, "num_beams": 1, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS,
    "disable_compile": True,  # on a GPU, a static cache in generation_config.json would compile the model
}  # fmt: skip


@torch.inference_mode()
def observe(vlm: Vlm, prompts: Mapping[str, Inputs]) -> Outputs:
    """A model's outputs for each prompt, logits and tokens, on the CPU; the names are for error messages."""
    outputs: Outputs = {}
    with eval_mode(vlm.model):
        for name, inputs in prompts.items():
            outputs[f"logits for the {name} prompt"] = logits(vlm, inputs)
            for cache, title in ((True, "with cache"), (False, "without cache")):
                generated = _generate(vlm, inputs, cache)
                outputs[f"text generated for the {name} prompt {title}"] = generated.sequences.cpu()
                outputs[f"logits generated for the {name} prompt {title}"] = torch.stack(generated.logits, dim=1).cpu()
    return outputs


def _generate(vlm: Vlm, inputs: Inputs, cache: bool) -> Any:
    options: dict[str, Any] = {"use_cache": cache, "output_logits": True, "return_dict_in_generate": True}
    options["suppress_tokens"] = _special_tokens(vlm)
    return vlm.model.generate(**inputs, **GREEDY, **options)  # type: ignore[operator]


def _special_tokens(vlm: Vlm) -> list[int]:
    """Tokens with a meaning for the model's code: a generated image token would need an image."""
    named = {name: value for name, value in vars(vlm.model.config).items() if "_token_i" in name and value is not None}
    listed = (value if isinstance(value, list | tuple) else [value] for value in named.values())
    return sorted({token for tokens in listed for token in tokens})


def verify_cut(vlm: Vlm, numbers: Numbering, prompts: Mapping[str, Inputs]) -> Outputs:
    """Cut the layers from the model in place, and return its outputs, verified equal to those of bypassing the layers.

    Raises:
        UserError: the outputs differ; the model must then not be used or saved.
    """
    with _refuse_failures(vlm, numbers, "with them bypassed the model fails"), bypass(vlm, numbers.removed):
        expected = observe(vlm, prompts)
    with _refuse_failures(vlm, numbers, "without them the model fails"):
        cut(vlm, numbers)
        outputs = observe(vlm, prompts)
    if difference := _difference(expected, outputs):
        reason = f"the {difference} between the model that bypasses them and the one without them"
        raise _refusal(vlm, numbers, f"{reason}: it uses them for more than the hidden state")
    return expected


@contextmanager
def _refuse_failures(vlm: Vlm, numbers: Numbering, what: str) -> Iterator[None]:
    """Context in which what the code of a family raises is a `UserError` that says why the layers cannot be cut."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _refusal(vlm, numbers, f"{what} ({first_line(error)})") from error


def verify_saved(
    folder: Path, expected: Outputs, prompts: Mapping[str, Inputs], *, numbers: Numbering, device: torch.device,
    dtype: str, attn: str | None,
) -> None:  # fmt: skip
    """Load the checkpoint with `transformers`, and compare its outputs with the expected ones.

    Raises:
        UserError: the checkpoint does not load, lacks weights, or has other outputs.
    """
    kind = "checkpoint"
    try:
        vlm = load(folder, dtype=dtype, device=device, attn=attn)
        kind = vlm.model.config.model_type
        difference = _difference(expected, observe(vlm, prompts))
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        difference = f"it does not load or run ({first_line(error)})"
    if difference:
        raise UserError(
            f"layers {numbers.removed} cannot be cut: {difference} in the {kind} model when it is reloaded: its config "
            "cannot describe the model without them; nothing was written",
            see="layers-cannot-be-removed",
        )


def _difference(expected: Outputs, outputs: Outputs) -> str:
    """Description of the first output that differs in any bit; empty when all are equal."""
    for name, tensor in expected.items():
        if not torch.equal(tensor, outputs[name]):
            if tensor.shape != outputs[name].shape or not tensor.is_floating_point():
                return f"{name} differs"
            return f"{name} differ by up to {float((tensor - outputs[name]).abs().max()):.2g}"
    return ""


def _refusal(vlm: Vlm, numbers: Numbering, reason: str) -> UserError:
    kind = vlm.model.config.model_type
    return UserError(
        f"layers {numbers.removed} cannot be cut from this {kind} model: {reason}; nothing was written",
        see="layers-cannot-be-removed",
    )

"""Watching pico models of real classes: the watched attention is that of eager maps, and nothing changes by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import templates
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tracing import MODELS, attention_of, batch_of, llava_of, mllama, of_family, records
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import striate.trace
from striate.data import Batch
from striate.errors import UserError
from striate.scores.states import token_kinds
from striate.trace import attention_rows, forward, watch_attention, watch_layers
from striate.vlm import Vlm


def eager_maps(vlm: Vlm, batch: Batch) -> list[Tensor]:
    """Every layer's whole map, mean over heads [B, T, T]."""
    usual = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    assert vlm.model.config.get_text_config()._attn_implementation == "eager"
    with torch.inference_mode():
        maps = vlm.model(**batch.inputs, use_cache=False, output_attentions=True).attentions
    vlm.model.set_attn_implementation({"text_config": usual})
    return [one.mean(dim=1) for one in maps]


@contextmanager
def same_inputs(vlm: Vlm, states: dict[int, Tensor]) -> Iterator[None]:
    """Notes what each layer is given, or gives it what was noted: the rounding of two passes does not add up."""

    def hook(layer: int, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        state = states.setdefault(layer, args[0] if args else named["hidden_states"])
        return ((state, *args[1:]), named) if args else (args, named | {"hidden_states": state})

    def hook_of(layer: int) -> Any:
        return lambda module, args, named: hook(layer, args, named)

    handles = [one.register_forward_pre_hook(hook_of(n), with_kwargs=True) for n, one in enumerate(vlm.layers)]
    yield
    for handle in handles:
        handle.remove()


def assert_equal_to_eager(vlm: Vlm, batch: Batch) -> None:
    kinds, states = token_kinds(batch), dict[int, Tensor]()
    with same_inputs(vlm, states):
        seen, maps = attention_of(vlm, batch), eager_maps(vlm, batch)
    assert list(seen) == list(range(vlm.depth))
    spread = 0.0
    for layer, whole in enumerate(maps):
        given = (whole * kinds["image"][:, None]).sum(dim=2).where(kinds["text"], 0)
        torch.testing.assert_close(seen[layer].by_query, given, atol=1e-5, rtol=0)
        text = kinds["text"].unsqueeze(2)
        received = (whole * text).sum(dim=1) / text.sum(dim=1)
        torch.testing.assert_close(seen[layer].by_key, received.where(kinds["image"], 0), atol=1e-5, rtol=0)
        spread = max(spread, float(given.max() - given[kinds["text"]].median()))
    assert spread > 0.03  # else there is nothing to mix up


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", templates.FAMILIES)
def test_image_attention_is_that_of_eager_maps(family: str, side: str) -> None:
    vlm = of_family(family)
    assert vlm.model.config.get_text_config()._attn_implementation == "sdpa"
    asked = records(text_only=family != "paligemma")
    assert_equal_to_eager(vlm, batch_of(vlm, asked, side))
    assert_equal_to_eager(vlm, batch_of(vlm, asked[:1]))  # without padding sdpa gets no mask


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_attention(kind: str) -> None:
    vlm = llava_of(MODELS[kind])
    for side in ("right", "left"):
        assert_equal_to_eager(vlm, batch_of(vlm, records(), side))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation with the arguments of flash attention, which returns no maps either."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        place = torch.arange(query.shape[2])
        seen = place[:, None] >= place
        if options.get("sliding_window"):
            seen = seen & (place[:, None] - place < options["sliding_window"])
        seen = seen[None, None] if mask is None else seen & mask[:, None, None]
        whole = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        eager = type(module).forward.__globals__["eager_attention_forward"]
        return eager(module, query, key, value, whole, **options)[0], None

    monkeypatch.setitem(AttentionInterface._global_mapping, "pretended_flash", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "pretended_flash", flash_attention_mask)
    return "pretended_flash"


@pytest.mark.parametrize("kind", MODELS)
def test_masks_windows_caps_and_sinks_that_only_the_implementation_knows(kind: str, flash: str) -> None:
    vlm = llava_of(MODELS[kind])
    vlm.model.set_attn_implementation({"text_config": flash})
    assert vlm.model.config.get_text_config()._attn_implementation == flash
    for side in ("right", "left"):
        assert_equal_to_eager(vlm, batch_of(vlm, records(), side))
    assert_equal_to_eager(vlm, batch_of(vlm, records()[:1]))


def rows_by_hand(**options: Any) -> list[list[float]]:
    """Rows 1 and 2 of three tokens, whose keys weigh 2, 1 and 3 with the queries 1 and 2."""
    query = torch.tensor([[0.0], [1.0], [1.0]]).view(1, 1, 3, 1)
    key = torch.tensor([2.0, 1.0, 3.0]).log().view(1, 1, 3, 1)
    return attention_rows(query, key, torch.tensor([[1, 2]]), scaling=1.0, **options)[0, 0].tolist()


def test_rows_by_hand() -> None:
    third, sixth, half = 1 / 3, 1 / 6, 1 / 2
    assert rows_by_hand() == [pytest.approx([2 * third, third, 0]), pytest.approx([third, sixth, half])]
    assert rows_by_hand(causal=False) == [pytest.approx([third, sixth, half])] * 2
    assert rows_by_hand(window=2)[1] == pytest.approx([0, 1 / 4, 3 / 4])
    padding = torch.tensor([[0, 1, 1]])
    assert rows_by_hand(mask=padding) == [pytest.approx([0, 1, 0]), pytest.approx([0, 1 / 4, 3 / 4])]
    assert rows_by_hand(sinks=torch.tensor([math.log(2)]))[1] == pytest.approx([2 / 8, 1 / 8, 3 / 8])
    capped = [math.exp(math.tanh(math.log(x))) for x in (2, 1, 3)]
    assert rows_by_hand(softcap=1.0)[1] == pytest.approx([x / sum(capped) for x in capped])
    whole = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0]])[None, None]  # says all: row 1 looks ahead
    expected = [pytest.approx([2 / 5, 0, 3 / 5]), pytest.approx([2 / 3, 1 / 3, 0])]
    assert rows_by_hand(mask=whole.bool()) == expected
    assert rows_by_hand(mask=(1 - whole) * -1e9) == expected


def test_queries_share_the_keys_of_their_group() -> None:
    query, key = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4)
    rows = torch.tensor([[0, 4, 6], [1, 2, 3]])
    expected = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / 2).masked_fill(
        torch.ones(7, 7).triu(1).bool(), -math.inf
    )
    expected = torch.stack([expected[sample][:, rows[sample]] for sample in (0, 1)]).softmax(dim=-1)
    torch.testing.assert_close(attention_rows(query, key, rows), expected)


def test_half_precision_is_reduced_in_float32() -> None:
    query, key, rows = torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8), torch.tensor([[49]])
    halves = query.bfloat16(), key.bfloat16()
    found = attention_rows(*halves, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention_rows(*(half.float() for half in halves), rows))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def test_no_whole_map_is_made() -> None:
    query, key = torch.randn(1, 4, 256, 8), torch.randn(1, 2, 256, 8)
    with Largest() as largest:
        attention_rows(query, key, torch.arange(3)[None])
    assert largest.numel <= 4 * 256 * 8


@pytest.fixture
def vlm() -> Vlm:
    return of_family("llava")


def test_pieces_make_no_difference(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(vlm, records())
    whole = attention_of(vlm, batch)
    monkeypatch.setattr(striate.trace, "MAX_WEIGHTS", 4 * batch.labels.numel() * 3)  # three rows at a time
    pieces = attention_of(vlm, batch)
    assert list(pieces) == list(whole) == list(range(vlm.depth))
    for layer, found in pieces.items():
        torch.testing.assert_close(found.by_query, whole[layer].by_query)
        torch.testing.assert_close(found.by_key, whole[layer].by_key)


def test_attention_by_key_sums_to_attention_by_query(vlm: Vlm) -> None:
    batch = batch_of(vlm, records())
    text = token_kinds(batch)["text"]
    layers = attention_of(vlm, batch)
    assert len(layers) == vlm.depth
    for found in layers.values():
        assert found.by_query.sum() > 0
        torch.testing.assert_close(found.by_key.sum(dim=1), found.by_query.sum(dim=1) / text.sum(dim=1))
        assert found.by_query[1].sum() == 0  # the record without an image


def states_of(vlm: Vlm, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []
    with watch_layers(vlm, lambda layer, *states: seen.insert(layer, states)):
        forward(vlm, batch)
    return seen


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", templates.FAMILIES)
def test_what_enters_and_leaves_a_layer(family: str) -> None:
    vlm = of_family(family)
    batch = batch_of(vlm, records(text_only=family != "paligemma"))
    seen = states_of(vlm, batch)
    with torch.inference_mode():
        states = vlm.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert len(seen) == len(states) - 1 == vlm.depth
    for layer, (entering, leaving) in enumerate(seen):
        if layer == 0 or not family.startswith("qwen3"):  # which adds image features between its first layers
            torch.testing.assert_close(entering, states[layer], atol=1e-5, rtol=1e-5)
        if layer + 1 < vlm.depth:
            torch.testing.assert_close(leaving, states[layer + 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[-1][1], states[-1], atol=0.1)  # theirs is after the final norm


def test_one_row_of_logits(vlm: Vlm) -> None:
    shapes = []
    handle = vlm.head.register_forward_hook(lambda head, inputs, output: shapes.append(tuple(output.shape)))
    forward(vlm, batch_of(vlm, records()))
    handle.remove()
    assert shapes == [(1, 1, vlm.head.weight.shape[0])]


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [dict(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.fixture(params=["sdpa", "eager"])
def implementation(request: pytest.FixtureRequest, vlm: Vlm) -> Iterator[str]:
    vlm.model.set_attn_implementation({"text_config": request.param})
    forward(vlm, batch_of(vlm, records()))  # transformers adds hooks of its own with the first pass
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], hooks_of(vlm.model)
    config = vlm.model.config.to_dict()
    yield request.param
    assert vlm.model.config.get_text_config()._attn_implementation == request.param
    assert vlm.model.config.to_dict() == config
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], hooks_of(vlm.model)) == before
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


@torch.inference_mode()
def test_watching_changes_nothing(vlm: Vlm, implementation: str) -> None:
    batch = batch_of(vlm, records())
    kinds, seen = token_kinds(batch), []
    before = vlm.model(**batch.inputs, use_cache=False).logits
    with (
        watch_layers(vlm, lambda layer, *_: seen.append(layer)),
        watch_attention(vlm, lambda layer, _: seen.append(layer), queries=kinds["text"], keys=kinds["image"]),
    ):
        watched = vlm.model(**batch.inputs, use_cache=False).logits
    assert torch.equal(watched, before)
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]  # and nothing of the tower
    assert torch.equal(vlm.model(**batch.inputs, use_cache=False).logits, before)


def test_an_error_ends_the_watch(vlm: Vlm, implementation: str) -> None:
    batch = batch_of(vlm, records())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watch_layers(vlm, fail):
        forward(vlm, batch)
    with (
        pytest.raises(KeyboardInterrupt),
        watch_attention(vlm, fail, queries=batch.image_mask, keys=batch.image_mask),
    ):
        forward(vlm, batch)


def test_a_watch_inside_a_watch(vlm: Vlm) -> None:
    batch = batch_of(vlm, records())
    kinds, seen = token_kinds(batch), []
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with watch_attention(vlm, lambda layer, _: seen.append(layer), queries=kinds["text"], keys=kinds["image"]):
        attention_of(vlm, batch)
    assert seen == [0, 1, 2, 3]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_an_implementation_that_cannot_be_read(vlm: Vlm) -> None:
    vlm.model.config.get_text_config()._attn_implementation_internal = "flex_attention"
    with (
        pytest.raises(UserError, match=r"cannot be read in the flex_attention implementation: load .* with sdpa"),
        watch_attention(vlm, lambda *_: None, queries=torch.ones(1, 1), keys=torch.ones(1, 1)),
    ):
        pass


def test_cross_attention_stays_silent() -> None:
    vlm, batch = mllama()
    for implementation in ("sdpa", "eager"):
        vlm.model.set_attn_implementation({"text_config": implementation})
        assert list(attention_of(vlm, batch)) == [0, 2]

"""Scores of hidden states and attention: numbers worked by hand, and the published formulas on pico models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import templates
import torch
from asking import answered, record
from torch import Tensor, nn
from tracing import MODELS, attention_of, batch_of, llava_of, mllama, of_family, records
from transformers import AttentionInterface

import striate.scores.states
import striate.trace
from striate.data import IGNORED, Batch, Record
from striate.errors import UserError
from striate.scores.states import (
    METRICS,
    States,
    angular_distance,
    block_influence,
    cosine,
    image_attention,
    linear_cka,
    multimodal_block_influence,
    token_kinds,
)
from striate.scores.table import Score
from striate.vlm import Vlm

NAN = math.nan


@pytest.fixture
def vlm() -> Vlm:
    """Its final norm turns what it gets, as trained ones do."""
    vlm = of_family("llava")
    norm = vlm.model.get_submodule("model.language_model.norm")
    norm.weight.data.uniform_(0.1, 4, generator=torch.Generator().manual_seed(0))
    return vlm


def scores_of(vlm: Vlm, *batches: Batch, names: Sequence[str] = tuple(METRICS)) -> dict[str, Score]:
    states = States(vlm, names)
    for batch in batches:
        states.add(batch)
    return {score.name: score for score in states.scores()}


def close(values: Sequence[float], tolerance: float = 1e-5) -> Any:
    return pytest.approx(list(values), abs=tolerance, nan_ok=True)


def assert_same(one: dict[str, Score], other: dict[str, Score]) -> None:
    assert list(one) == list(other)
    for name, score in one.items():
        assert score.values == close(other[name].values)
        assert score.stderr == close(other[name].stderr or ())
        assert score.n == other[name].n
        for kind, values in score.parts.items():
            assert values == close(other[name].parts[kind])
        for row, expected in zip(score.table or (), other[name].table or (), strict=True):
            assert row == close(expected)


# Numbers worked by hand


def test_cosine_by_hand() -> None:
    entering = torch.tensor([[1.0, 0], [3, 4], [1, 1], [2, -1], [0, 0], [NAN, 1], [math.inf, 1]])
    leaving = torch.tensor([[0.0, 2], [4, 3], [-3, -3], [2, -1], [1, 0], [1, 1], [1, 1]])
    assert cosine(entering, leaving).tolist() == close([0, 24 / 25, -1, 1, 0, NAN, NAN])


def test_cosine_of_the_same_is_exactly_one() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        states = (torch.randn(4, 50, 33) * torch.logspace(-3, 2, 50)[:, None]).to(dtype)
        assert (cosine(states, states) == 1).all()
        assert cosine(states, states).dtype == torch.float64


def test_cosine_sums_half_precision_in_float32() -> None:
    halves = torch.randn(2, 5, 4096).bfloat16(), torch.randn(2, 5, 4096).bfloat16()
    expected = torch.cosine_similarity(*(half.double() for half in halves), dim=-1)
    torch.testing.assert_close(cosine(*halves), expected, atol=1e-6, rtol=0)


COSINES = torch.tensor([[0.5, 0.7, 0.9, -1.0], [0.2, 0.4, NAN, NAN]])  # NaN at padding
IMAGE = torch.tensor([[True, True, False, False], [False, False, False, False]])
TEXT = torch.tensor([[False, False, True, True], [True, True, False, False]])


def test_block_influence_by_hand() -> None:
    assert block_influence(COSINES, IMAGE | TEXT).tolist() == close([1 - 1.1 / 4, 0.7])
    assert block_influence(COSINES, IMAGE).tolist() == close([0.4, NAN])
    layers = torch.stack([COSINES, -COSINES])
    assert block_influence(layers, TEXT).tolist() == [close([1.05, 0.7]), close([0.95, 1.3])]


def test_multimodal_block_influence_by_hand() -> None:
    # Image tokens: mean 0.6; text tokens: mean -0.05. The second sample has no image.
    assert multimodal_block_influence(COSINES, IMAGE, TEXT).tolist() == close([1 - 0.55 / 2, NAN])
    three = torch.tensor([[1.0, 0.0, 0.0, 0.5]])  # one image token weighs as much as three of text
    found = multimodal_block_influence(three, torch.tensor([[1, 0, 0, 0]]) > 0, torch.tensor([[0, 1, 1, 1]]) > 0)
    assert found.tolist() == close([1 - (1 + 1 / 6) / 2])


def test_angular_distance_by_hand() -> None:
    angles = torch.tensor([0, 30, 90, 180]).deg2rad()  # of what enters layers 0, 1, 2 and what leaves layer 2
    states = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 5, 0.1, 7])[:, None]
    blocks = angular_distance(torch.stack([states, states.flip(0)]))
    assert blocks[0].tolist() == [close([1 / 6, 1 / 2, 1]), close([1 / 3, 5 / 6, NAN]), close([1 / 2, NAN, NAN])]
    assert blocks[1].tolist() == [close([1 / 2, 5 / 6, 1]), close([1 / 3, 1 / 2, NAN]), close([1 / 6, NAN, NAN])]


def test_small_angles_are_not_lost_in_rounding() -> None:
    states = torch.tensor([[[1.0, 0.0], [1.0, 1e-5]]])  # in float32 the cosine is 1
    assert angular_distance(states).item() == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_linear_cka_is_that_of_full_feature_matrices() -> None:
    """Kornblith et al. 2019, in the form with D x D matrices, of the tokens that count alone."""
    draw = torch.Generator().manual_seed(0)
    entering, leaving = (torch.randn(2, 9, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    expected = []
    for x, y, own in zip(entering, leaving, tokens, strict=True):
        x, y = (states[own] - states[own].mean(dim=0) for states in (x, y))
        expected.append(float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())))
    assert linear_cka(entering, leaving, tokens).tolist() == pytest.approx(expected)
    assert linear_cka(entering.float(), leaving.float(), tokens).tolist() == pytest.approx(expected, rel=1e-4)
    leaving[1, 6:] = math.nan  # padding
    assert linear_cka(entering, leaving, tokens).tolist() == pytest.approx(expected)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q
    assert linear_cka(entering, 3 * entering @ turned + 1, tokens).tolist() == pytest.approx([1, 1])
    assert linear_cka(entering[:, :1], leaving[:, :1], tokens[:, :1]).isnan().all()  # one token has no spread


def test_image_attention_by_hand() -> None:
    given = torch.tensor([[0.0, 0, 0.25, 0.75], [0, 0, 0, 0]])
    assert image_attention(given, TEXT, IMAGE).tolist() == close([0.5, NAN])
    answer = torch.tensor([[False, False, False, True], [False] * 4])
    assert image_attention(given, answer, IMAGE).tolist() == close([0.75, NAN])
    assert image_attention(given, answer & ~answer, IMAGE).tolist() == close([NAN, NAN])


def test_kinds_of_token() -> None:
    tokens = torch.tensor([[1, 2, 2, 3, 4, 0]])
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    labels = torch.full_like(tokens, IGNORED)
    labels[0, 4] = 4
    kinds = token_kinds(Batch(inputs, labels, tokens == 2, ("",)))
    found = {kind: [place for place in range(6) if mask[0, place]] for kind, mask in kinds.items()}
    assert found == {"image": [1, 2], "prompt": [0, 3], "answer": [4], "text": [0, 3, 4]}


# Whole models


@torch.inference_mode()
def hidden_states(vlm: Vlm, batch: Batch, *, normed: bool = True) -> list[Tensor]:
    """As the model gives them out, the last one after the final norm, or without that norm."""
    if normed:
        return list(vlm.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states)
    decoder = vlm.model.get_submodule(vlm.parts.layers.rpartition(".")[0])
    norm, decoder.norm = decoder.norm, nn.Identity()
    states = hidden_states(vlm, batch)
    decoder.norm = norm
    return states


def shortgpt(states: list[Tensor], sample: int, places: Tensor) -> list[float]:
    """Block influence as published: 1 - E over tokens of X_i^T X_(i+1) / (|X_i| |X_(i+1)|), for each block i."""
    influence = []
    for before, after in pairwise(states):
        x, y = before[sample, places].double(), after[sample, places].double()
        influence.append(float(1 - ((x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1))).mean()))
    return influence


def pruneme(states: list[Tensor], sample: int, last: int) -> list[list[float]]:
    """Distance of the last token's states by start and length of the block, as published: arccos(cos) / pi."""
    ends = [layer[sample, last].double() for layer in states]
    ends = [state / state.norm() for state in ends]
    depth = len(ends) - 1
    return [
        [float(torch.arccos(ends[start] @ ends[start + n])) / math.pi if start + n <= depth else NAN for n in lengths]
        for start in range(depth)
        for lengths in [range(1, depth + 1)]
    ]


def test_block_influence_is_that_of_shortgpt_except_on_the_last_layer(vlm: Vlm) -> None:
    batch = batch_of(vlm, records())
    attended = batch.inputs["attention_mask"].bool()
    ours = scores_of(vlm, batch)["block_influence"].values
    for normed in (True, False):
        states = hidden_states(vlm, batch, normed=normed)
        theirs = torch.tensor([shortgpt(states, sample, attended[sample]) for sample in range(3)]).mean(dim=0).tolist()
        assert ours[:-1] == close(theirs[:-1])
        if normed:
            assert abs(ours[-1] - theirs[-1]) > 0.01  # theirs is after the final norm
        else:
            assert ours == close(theirs)


def test_angular_distance_is_that_of_pruneme_except_where_a_block_ends_with_the_last_layer(vlm: Vlm) -> None:
    batch = batch_of(vlm, records())
    ends = [int(row.nonzero().max()) for row in batch.inputs["attention_mask"]]
    ours = scores_of(vlm, batch)["angular_distance"]
    assert ours.table is not None
    for normed in (True, False):
        states = hidden_states(vlm, batch, normed=normed)
        theirs = torch.tensor([pruneme(states, sample, ends[sample]) for sample in range(3)]).mean(dim=0).tolist()
        for start, row in enumerate(ours.table):
            for length, distance in enumerate(row, 1):
                if normed and start + length == vlm.depth:
                    assert abs(distance - theirs[start][length - 1]) > 0.003
                else:
                    assert [distance] == close([theirs[start][length - 1]])
        if not normed:
            assert ours.values == close([row[0] for row in theirs])


def assert_equal_to_direct_computation(vlm: Vlm, batch: Batch) -> None:
    """By hidden states that are kept whole, token by token, except on the last layer."""
    found, states, kinds = scores_of(vlm, batch), hidden_states(vlm, batch), token_kinds(batch)
    per_kind: dict[str, list[list[float]]] = {}
    for kind, mask in kinds.items():
        per_kind[kind] = [shortgpt(states, row, mask[row]) for row in range(len(batch)) if mask[row].any()]
        expected = torch.tensor(per_kind[kind]).mean(dim=0)[:-1].tolist()
        assert found["block_influence"].parts[kind][:-1] == close(expected)
    seen = kinds["image"].any(dim=1)
    both = [
        [(i + t) / 2 for i, t in zip(*pair, strict=True)]
        for pair in zip(
            per_kind["image"], [per_kind["text"][row] for row in range(len(batch)) if seen[row]], strict=True
        )
    ]
    multimodal = found["multimodal_block_influence"]
    assert multimodal.values[:-1] == close(torch.tensor(both).mean(dim=0)[:-1].tolist())
    assert multimodal.n == int(seen.sum())
    halves = zip(multimodal.parts["image"], multimodal.parts["text"], strict=True)
    assert multimodal.values == close([(image + text) / 2 for image, text in halves])
    for layer, attention in attention_of(vlm, batch).items():  # itself held against eager maps in test_trace
        means = [float(attention.by_query[row][kinds["text"][row]].mean()) for row in range(len(batch)) if seen[row]]
        assert [found["image_attention"].values[layer]] == close([sum(means) / len(means)])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("family", [family for family in templates.FAMILIES if family != "qwen3_vl"])
def test_scores_of_a_family(family: str) -> None:
    vlm = of_family(family)
    assert_equal_to_direct_computation(vlm, batch_of(vlm, records(text_only=family != "paligemma"), "left"))


def test_layers_that_get_more_than_the_layer_before_gave() -> None:
    """Qwen3-VL adds image features between its first layers: that is not due to a layer, and text tokens get none."""
    vlm = of_family("qwen3_vl")
    batch = batch_of(vlm, records())
    found, states, kinds = scores_of(vlm, batch), hidden_states(vlm, batch), token_kinds(batch)
    expected = torch.tensor([shortgpt(states, row, kinds["text"][row]) for row in range(3)]).mean(dim=0)
    assert found["block_influence"].parts["text"][:-1] == close(expected[:-1].tolist())


@pytest.mark.parametrize("kind", MODELS)
def test_scores_of_a_language_model(kind: str) -> None:
    vlm = llava_of(MODELS[kind])
    assert_equal_to_direct_computation(vlm, batch_of(vlm, records()))


MORE = [answered(record("is it a dog?"), "no"), answered(record("red"), "two dogs and one bird, no cat on a mat")]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_neither_batch_size_nor_padding_matters(family: str) -> None:
    vlm = of_family(family)
    asked = [*records(), *MORE]
    alone = scores_of(vlm, *(batch_of(vlm, [one]) for one in asked))
    assert alone["block_influence"].n == 5
    for side in ("right", "left"):
        for size in (2, 4):
            batches = [batch_of(vlm, asked[start : start + size], side) for start in range(0, 5, size)]
            assert_same(scores_of(vlm, *batches), alone)


@pytest.mark.parametrize("kind", ["sinks", "experts", "sliding window"])
def test_padding_does_not_matter_to_other_attention(kind: str) -> None:
    vlm = llava_of(MODELS[kind])
    alone = scores_of(vlm, *(batch_of(vlm, [one]) for one in records()))
    for side in ("right", "left"):
        assert_same(scores_of(vlm, batch_of(vlm, records(), side)), alone)


def test_a_layer_that_does_nothing_scores_zero(vlm: Vlm) -> None:
    with torch.no_grad():
        vlm.layers[2].self_attn.o_proj.weight.zero_()
        vlm.layers[2].mlp.down_proj.weight.zero_()
    for dtype in (torch.float32, torch.bfloat16):
        vlm.model.to(dtype)
        found = scores_of(vlm, batch_of(vlm, records()))
        assert found["block_influence"].values[2] == 0
        assert found["multimodal_block_influence"].values[2] == 0
        assert [found["angular_distance"].values[2]] == close([0], 1e-7)
        assert found["angular_distance"].table is not None
        for name in ("block_influence", "multimodal_block_influence", "angular_distance"):
            assert min(found[name].values[:2]) > 0.01


def test_half_precision(vlm: Vlm) -> None:
    vlm.model.to(torch.bfloat16)
    assert_equal_to_direct_computation(vlm, batch_of(vlm, records()))


def test_dropout_is_off_while_a_model_in_training_is_measured(vlm: Vlm) -> None:
    expected = scores_of(vlm, batch_of(vlm, records()))
    for layer in vlm.layers:
        layer.self_attn.attention_dropout = 0.5
    vlm.model.train()
    assert_same(scores_of(vlm, batch_of(vlm, records())), expected)
    assert vlm.model.training


def test_text_alone(vlm: Vlm) -> None:
    found = scores_of(vlm, batch_of(vlm, MORE))
    assert found["block_influence"].n == found["angular_distance"].n == 2
    assert found["multimodal_block_influence"].n == found["image_attention"].n == 0
    for values in (found["image_attention"].values, found["block_influence"].parts["image"]):
        assert values == close([NAN] * 4)


def test_samples_that_lack_a_kind_of_token_are_left_out_of_it(vlm: Vlm) -> None:
    asked = records()  # the second has no image, the third no answer
    found = scores_of(vlm, batch_of(vlm, asked))
    assert found["image_attention"].n == found["multimodal_block_influence"].n == 2
    without = scores_of(vlm, batch_of(vlm, [asked[0], asked[2]]))
    assert found["image_attention"].values == close(without["image_attention"].values)
    first = scores_of(vlm, batch_of(vlm, asked[:1]))
    assert found["image_attention"].parts["answer"] == close(first["image_attention"].parts["answer"])


def test_every_sample_is_kept(vlm: Vlm) -> None:
    found = scores_of(vlm, batch_of(vlm, records()), batch_of(vlm, MORE))["image_attention"]
    assert found.samples is not None
    assert len(found.samples) == 5
    alone = scores_of(vlm, batch_of(vlm, records()[2:]))["image_attention"].values
    assert found.samples[2] == close(alone)
    assert found.samples[3] == close([NAN] * 4)


def test_only_what_is_named_is_measured(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("striate.scores.states.watch_attention", None)
    batch = batch_of(vlm, records())
    found = scores_of(vlm, batch, names=["angular_distance", "block_influence"])
    assert list(found) == ["angular_distance", "block_influence"]
    for name, score in found.items():
        assert (score.range, score.source, score.direction) == (METRICS[name].range, METRICS[name].source, "high")


def test_cka_of_a_model_is_that_of_its_hidden_states(vlm: Vlm) -> None:
    batch = batch_of(vlm, records())
    found, states = scores_of(vlm, batch)["cka"], hidden_states(vlm, batch, normed=False)
    attended = batch.inputs["attention_mask"].bool()
    for layer, (entering, leaving) in enumerate(pairwise(states)):
        assert found.values[layer] == pytest.approx(float(linear_cka(entering, leaving, attended).mean()), rel=1e-4)
    assert (found.direction, found.n) == ("low", 3)


def test_what_was_measured_before_an_interrupt_stays(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(vlm, tuple(METRICS))
    assert all(score.n == 0 and score.values == close([NAN] * 4) for score in states.scores())
    first = batch_of(vlm, records())
    states.add(first)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = vlm.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        states.add(batch_of(vlm, MORE))
    handle.remove()
    assert_same({score.name: score for score in states.scores()}, scores_of(vlm, first))
    states.add(batch_of(vlm, MORE))
    assert {score.n for score in states.scores()} == {5, 2}


def test_an_empty_batch_adds_nothing(vlm: Vlm) -> None:
    none = torch.empty(0, 0, dtype=torch.long)
    assert scores_of(vlm, Batch({}, none, none, ()))["block_influence"].n == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model.language_model.layers.2.mlp.down_proj", "NaN or Inf in the output of layer 2: the llava"),
        ("model.language_model.layers.0.self_attn.v_proj", "NaN or Inf in the output of layer 0"),
        ("model.multi_modal_projector.linear_2", "NaN or Inf in the embeddings"),
    ],
)
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_nan_names_the_first_layer(vlm: Vlm, part: str, message: str, value: float) -> None:
    vlm.model.get_submodule(part).weight.data[0, 0] = value
    states = States(vlm, tuple(METRICS))
    with pytest.raises(UserError, match=message):
        states.add(batch_of(vlm, records()))
    assert states.scores()[0].n == 0


def test_nan_in_padding_is_ignored(vlm: Vlm) -> None:
    asked: list[Record] = [*records(), *MORE]
    batch = batch_of(vlm, asked)
    expected = scores_of(vlm, batch)
    padding = batch.inputs["attention_mask"] == 0

    def corrupt(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        return output.masked_fill(padding[..., None], NAN)

    handle = vlm.layers[-1].register_forward_hook(corrupt, prepend=True)
    assert_same(scores_of(vlm, batch), expected)
    handle.remove()


def test_a_model_that_does_not_show_its_attention(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striate.trace, "ALL_ATTENTION_FUNCTIONS", AttentionInterface())  # not the one it asks
    with pytest.raises(UserError, match="llava models do not return attention weights to transformers"):
        scores_of(vlm, batch_of(vlm, records()))
    assert scores_of(vlm, batch_of(vlm, records()), names=["block_influence"])["block_influence"].n == 3


def test_layers_of_cross_attention_have_no_image_attention() -> None:
    found = scores_of(*mllama())
    attention = found["image_attention"].values
    assert [math.isnan(value) for value in attention] == [False, True, False, True]
    assert not any(math.isnan(value) for value in found["block_influence"].values)

"""What `explore` measures: equal to plain passes, maps and interventions, on pico models of real classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import templates
import torch
from asking import answered, noise, record
from pico import pico_llava
from torch import Tensor, nn
from tracing import llava_of, of_family
from training import write_data

from striate.data import Record, RecordError, Records, encode, lazy_records, read
from striate.errors import UserError
from striate.evaluation.answers import answer_fn, answer_texts
from striate.exploration import Exploration, asking, explore, explore_questions, observing, steps
from striate.exploration.asking import Asked, ask, draw
from striate.exploration.layout import View, layout, num_cells, pool
from striate.exploration.lesions import groups, lesions
from striate.exploration.observing import lens, observe
from striate.prune import bypass
from striate.region import Region
from striate.routing import route
from striate.scores.backbone import Backbone
from striate.scores.sampling import Sampling
from striate.scores.states import States
from striate.trace import forward, watch_layers
from striate.vlm import Vlm, load

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
FAMILIES = [family for family in templates.FAMILIES if family != "mistral3"]  # whose processor needs torchvision
QUESTION = replace(record("is the red cat on a mat?", "no", image=0), images=(noise(0, 96, 64),))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 4)


# Where image tokens lie.


def features(vlm: Vlm, question: Record) -> Tensor:
    """The embeddings of the image tokens [P, D]."""
    example = encode(question, vlm.processor, generation=True)
    found: list[Tensor] = []
    batch = asking._batch(vlm, example)
    with watch_layers(vlm, lambda layer, entering, _: found.append(entering) if layer == 0 else None):
        forward(vlm, batch)
    return found[0][batch.image_mask]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_lies_where_its_token_looks(family: str) -> None:
    """In a tower without attention, a token depends on its own pixels alone: changed in the middle of its place."""
    vlm = of_family(family)
    with torch.no_grad():
        for module in vlm.tower.modules():
            if "Attention" in type(module).__name__:
                for parameter in module.parameters():
                    parameter.zero_()
    (image,) = QUESTION.images
    views = layout(vlm, QUESTION, encode(QUESTION, vlm.processor, generation=True))
    before = features(vlm, QUESTION)
    for view in views:
        assert view.box is not None
        left, top, right, bottom = view.box
        for row, column in {(0, 0), (view.rows - 1, 0), (view.rows // 2, view.columns - 1)}:
            width, height = (right - left) / view.columns * image.width, (bottom - top) / view.rows * image.height
            x, y = left * image.width + (column + 0.3) * width, top * image.height + (row + 0.3) * height
            box = tuple(round(side) for side in (x, y, x + 0.4 * width + 1, y + 0.4 * height + 1))
            changed = image.copy()
            changed.paste((255, 0, 255), box)
            moved = (features(vlm, replace(QUESTION, images=(changed,))) - before).norm(dim=-1)
            assert moved[view.tokens].argmax() == row * view.columns + column


def test_crops_tiles_and_padding_lie_where_they_belong() -> None:
    def boxes(family: str) -> list[Any]:
        vlm = of_family(family)
        views = layout(vlm, QUESTION, encode(QUESTION, vlm.processor, generation=True))
        return [(view.is_tile, view.box and tuple(round(side, 2) for side in view.box)) for view in views]

    assert boxes("llava") == [(False, pytest.approx((1 / 6, 0, 5 / 6, 1), abs=0.02))]  # crops the middle of 96 x 64
    # Scales to 32 x 21 pixels, pads with 5 above and 6 below.
    assert boxes("deepseek_vl") == [(False, pytest.approx((0, -5 / 21, 1, 27 / 21), abs=0.02))]
    tiles = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
    assert boxes("idefics3") == [
        *((True, pytest.approx(tile, abs=0.02)) for tile in tiles),
        (False, pytest.approx((0, 0, 1, 1), abs=0.02)),
    ]
    assert boxes("idefics2") == [(False, None)]  # resampled


def test_two_images_have_their_own_places() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    two = Record("", ({"role": "user", "content": content},), (noise(2, 32, 64), noise(3, 64, 32)))
    for family, sizes in {"llava": [(4, 4), (4, 4)], "qwen2_vl": [(4, 2), (2, 4)], "llava_next": None}.items():
        vlm = of_family(family)
        example = encode(two, vlm.processor, generation=True)
        views = layout(vlm, two, example)
        assert {view.image for view in views} == {0, 1}
        assert sizes is None or [(view.rows, view.columns) for view in views] == sizes
        placed = torch.cat([view.tokens.flatten() for view in views])
        assert len(placed.unique()) == len(placed) <= int(example.image_mask.sum())
    crops = layout(of_family("llava"), two, encode(two, of_family("llava").processor, generation=True))
    assert [view.box for view in crops] == [
        pytest.approx((0, 1 / 4, 1, 3 / 4), abs=0.02), pytest.approx((1 / 4, 0, 3 / 4, 1), abs=0.02)
    ]  # fmt: skip


def test_cells_are_means_of_neighbors() -> None:
    views = [View(0, 0, 2, 3, 4, None), View(0, 8, 1, 2, 2, None)]  # tokens 3 and 7 end rows
    values = torch.arange(10.0)
    assert pool(values, views, 1).tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert pool(values, views, 2).tolist() == [(0 + 1 + 4 + 5) / 4, (2 + 6) / 2, 8.5]
    assert pool(values.expand(5, 2, 10), views, 2).shape == (5, 2, num_cells(views, 2)) == (5, 2, 3)


# Attention, influence, lens.


def plain_maps(vlm: Vlm, asked: Asked) -> list[Tensor]:
    """Eager attention maps of the whole sequence, one [H, T, T] per layer."""
    usual = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    with torch.inference_mode():
        maps = vlm.model(**asked.batch.inputs, use_cache=False, output_attentions=True).attentions
    vlm.model.set_attn_implementation({"text_config": usual})
    return [one[0] for one in maps]


def final_norm(vlm: Vlm) -> nn.Module:
    decoder = vlm.model.get_submodule(vlm.parts.layers.rpartition(".")[0])
    return decoder.norm


def nearest(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).topk(observing.WORDS).values


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_that_of_plain_computations(family: str) -> None:
    vlm = of_family(family)
    asked = ask(vlm, QUESTION, max_length=2048)
    views = layout(vlm, QUESTION, asked.example)
    observation = observe(vlm, asked, views)
    image, tokens = asked.batch.image_mask[0], observation.tokens
    assert observation.attention is not None
    assert observation.notes == []
    for layer, whole in enumerate(plain_maps(vlm, asked)):
        rows = whole[:, tokens][:, :, image]  # H Q P
        torch.testing.assert_close(observation.attention.mean[layer], rows.mean(dim=0), atol=1e-4, rtol=1e-3)
        heads = observation.attention.heads[layer].float()
        torch.testing.assert_close(heads, pool(rows, views, 1), atol=1e-3, rtol=2e-3)
    scores = States(vlm, ["block_influence"])
    scores.add(asked.batch)
    parts = scores.scores()[0].parts
    for kind in ("image", "text"):
        assert observation.influence[kind].tolist() == pytest.approx(parts[kind], abs=1e-12)
    near, states = lens(asked, observation), list[Tensor]()
    with watch_layers(vlm, lambda layer, _, leaving: states.append(leaving)):
        forward(vlm, asked.batch)
    at = torch.cat([image.nonzero()[:, 0], tokens])
    with torch.inference_mode():
        for layer, state in enumerate(states):
            logits = vlm.head(final_norm(vlm)(state))[0, at]
            torch.testing.assert_close(near.probabilities[layer], nearest(logits), atol=1e-5, rtol=1e-4)
            named = logits.softmax(-1).gather(1, near.words[layer])
            torch.testing.assert_close(near.probabilities[layer], named, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava_gemma2", "cohere2_vision"])
def test_the_lens_caps_and_scales_as_the_model_does(name: str) -> None:
    """After the last layer it is the model's own prediction, which Gemma 2 caps and Cohere scales."""
    text = {"final_logit_softcapping": 0.5} if name == "llava_gemma2" else {"logit_scale": 3.0}
    vlm = Vlm.of(pico.pico_more(name, **text), pico.pico_reader(name))
    asked = ask(vlm, QUESTION, max_length=2048)
    near = lens(asked, observe(vlm, asked, layout(vlm, QUESTION, asked.example)))
    with torch.inference_mode():
        logits = vlm.model(**asked.batch.inputs, use_cache=False).logits[0]
    own = torch.cat([logits[asked.batch.image_mask[0]], logits[~asked.batch.image_mask[0]]])
    torch.testing.assert_close(near.probabilities[-1], nearest(own), atol=1e-5, rtol=1e-4)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = of_family("llava")
    asked = ask(vlm, QUESTION, max_length=2048)
    whole = lens(asked, observe(vlm, asked, layout(vlm, QUESTION, asked.example)))
    monkeypatch.setattr(observing, "MAX_LOGITS", 3 * vlm.head.weight.shape[0])
    monkeypatch.setattr(observing, "ROWS", 2)
    pieces = lens(asked, observe(vlm, asked, layout(vlm, QUESTION, asked.example)))
    torch.testing.assert_close(pieces.probabilities, whole.probabilities)


def test_heads_are_averaged_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = of_family("llava")
    asked = ask(vlm, QUESTION, max_length=2048)
    views = layout(vlm, QUESTION, asked.example)
    fine = observe(vlm, asked, views).attention
    assert fine is not None
    monkeypatch.setattr(observing, "MAX_HEAD_VALUES", fine.heads.numel() // 3)
    coarse = observe(vlm, asked, views).attention
    assert coarse is not None
    assert (coarse.factor, coarse.heads.shape[-1]) == (2, 4)
    blocks = fine.heads.float().unflatten(-1, (2, 2, 2, 2)).mean(dim=(-1, -3)).flatten(-2)
    torch.testing.assert_close(coarse.heads.float(), blocks, atol=1e-3, rtol=2e-3)


# Lesions.


class Replaced(nn.Module):
    """A layer whose output at some tokens is its input."""

    def __init__(self, layer: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "kept") else getattr(self.layer, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(hidden, *args, **kwargs)
        after = output[0] if isinstance(output, tuple) else output
        after = torch.where(self.kept[..., None], hidden, after)
        return (after, *output[1:]) if isinstance(output, tuple) else after


def plain_log_prob(vlm: Vlm, asked: Asked, layers: Region, kept: Tensor) -> list[float]:
    """Log-probabilities of the answer's tokens in a plain pass with replaced layers."""
    own = {layer: vlm.layers[layer] for layer in layers}
    for layer, module in own.items():
        vlm.layers[layer] = Replaced(module, kept)
    with torch.inference_mode():
        logits = vlm.model(**asked.batch.inputs, use_cache=False).logits[0].float()
    for layer, module in own.items():
        vlm.layers[layer] = module
    start = len(asked.example)
    predicted = logits[start - 1 : start - 1 + len(asked.tokens)].log_softmax(-1)
    return [float(row[token]) for row, token in zip(predicted, asked.tokens, strict=True)]


def evaluated(vlm: Vlm) -> Any:
    """The answer of `evaluate`."""
    return answer_fn(vlm, max_new_tokens=asking.MAX_NEW_TOKENS, max_length=2048)([QUESTION])[0]


def generated(vlm: Vlm, asked: Asked) -> str:
    """The same without image tokens, which some of these models would say when they are changed."""
    return answer_texts(vlm, [asking.answer_tokens(vlm, asked.prompt)])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_lesions_are_plain_passes_and_answers(family: str) -> None:
    vlm = of_family(family)
    asked = ask(vlm, QUESTION, max_length=2048)
    assert asked.text == evaluated(vlm)
    replay = observe(vlm, asked, ()).replay
    layers = groups(vlm.depth, Region.parse("0,2", vlm.depth))
    chosen = {name: layers[name] for name in ("layer 1", "outside the region")}
    found = {(one.kind, one.name): one for one in lesions(vlm, replay, asked, chosen)}
    everywhere = torch.ones_like(asked.batch.image_mask)
    for name, region in chosen.items():
        one = found["bypass", name]
        assert one.log_prob == pytest.approx(plain_log_prob(vlm, asked, region, everywhere), abs=1e-3)
        with bypass(vlm, region):
            assert one.answer == generated(vlm, asked)
        one = found["image", name]
        plain = plain_log_prob(vlm, asked, region, asked.batch.image_mask)
        assert one.log_prob == pytest.approx(plain, abs=1e-3)
        with route(
            vlm, region.complement, image_token_id=int(asked.batch.inputs["input_ids"][asked.batch.image_mask][0])
        ):
            assert one.answer == generated(vlm, asked)
    assert any(one.changed for one in found.values()) or family == "paligemma"  # which repeats itself
    assert all(one.changed or one.answer == asked.text for one in found.values())


def test_reverted_layers(tmp_path: Path) -> None:
    folder = pico_llava(tmp_path / "llava")
    vlm = load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for parameter in vlm.layers.parameters():
            parameter.mul_(3)
    asked = ask(vlm, QUESTION, max_length=2048)
    replay, backbone = observe(vlm, asked, ()).replay, Backbone(vlm, folder)
    found = {one.name: one for one in lesions(vlm, replay, asked, groups(4), backbone=backbone) if one.kind == "revert"}
    assert list(found) == ["layer 0", "layer 1", "layer 2", "layer 3", "first block", "middle block", "last block"]
    assert found["layer 0"].log_prob == found["first block"].log_prob
    nowhere = torch.zeros_like(asked.batch.image_mask)
    for layer in range(4):
        with backbone.layer(layer):
            plain = plain_log_prob(vlm, asked, Region((layer,), 4), nowhere)
            assert found[f"layer {layer}"].log_prob == pytest.approx(plain, abs=1e-4)
            assert found[f"layer {layer}"].answer == generated(vlm, asked)


def test_groups_of_layers() -> None:
    found = groups(8, Region.parse("0,4,5", 8))
    assert {name: str(region) for name, region in found.items() if not name.startswith("layer")} == {
        "region": "0,4,5", "outside the region": "1-3,6,7", "first block": "0-2", "middle block": "2-4",
        "last block": "5-7",
    }  # fmt: skip
    assert [str(region) for region in groups(8).values()][8:] == ["0,1", "3,4", "6,7"]
    assert len(groups(4, Region.parse("all", 4))) == 4 + 3


# The whole.


@pytest.fixture
def vlm() -> Vlm:
    return of_family("llava")


def look(vlm: Vlm, *questions: Record, **options: Any) -> Exploration:
    return explore_questions(vlm, questions, **options)


def test_an_exploration_leaves_the_model_as_it_was(vlm: Vlm) -> None:
    asked = ask(vlm, QUESTION, max_length=2048)
    before = [dict(vars(module)) for module in vlm.model.modules()]
    region, calls = Region.parse("0", 4), []
    exploration = look(vlm, QUESTION, region=region, on_step=lambda: calls.append(1))
    assert len(calls) == steps(4, region, image=True, backbone=False) == 4 + 2 * 9
    assert [dict(vars(module)) for module in vlm.model.modules()] == before
    (sample,) = exploration.samples
    assert sample.answer == asked.text == evaluated(vlm)
    assert sample.truth == ("no",)
    assert "".join(sample.texts).count("red cat") == 1
    assert sample.roles.count("answer") == len(sample.log_prob) == len(asked.tokens)
    assert int(sample.lens.words.max()) in exploration.words


def test_the_numbers_as_json(vlm: Vlm) -> None:
    exploration = look(vlm, QUESTION)
    (sample,) = exploration.samples
    (numbers,) = exploration.to_json()["samples"]
    assert sample.attention is not None
    torch.testing.assert_close(torch.tensor(numbers["attention"]), sample.attention.mean, atol=1e-6, rtol=0)
    assert numbers["lens"]["text"][3][-1][0] == exploration.words[int(sample.lens.words[3, -1, 0])]
    assert len(numbers["lesions"]) == 2 * 7
    assert numbers["lesions"][0]["layers"] == [0]


@pytest.mark.parametrize("draws", [lambda records: draw(records, 3, 0), Sampling(samples=3).draw])
def test_each_record_is_read_once_to_sample_some(draws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, parsed, parse = read(write_data(tmp_path, records=40)), [], lazy_records.record_of
    monkeypatch.setattr(lazy_records, "record_of", lambda *a: [parsed.append(a[1]), parse(*a)][1])
    draws(records)
    assert len(set(parsed)) == 40
    assert len(parsed) <= 40 + 3  # those of the sample may be read again


def test_questions_are_sampled_from_records_with_an_image() -> None:
    text, asked = record("two dogs?"), answered(replace(QUESTION, answers=()), "no, a dog")
    plain = Record("", (), text="a story", source="train.json:9")
    chosen, skipped = draw(Records([text, plain, asked], []), 6, 0)
    assert [(one.messages, one.answers) for one in chosen] == [(QUESTION.messages, ("no, a dog",))]
    assert [one.source for one in skipped] == ["train.json:9"]
    assert draw(Records([text], []), 6, 0)[0] == [text]
    with pytest.raises(UserError, match="none of the 1 records has a question"):
        draw(Records([plain], []), 6, 0)
    many = [replace(QUESTION, id=str(number)) for number in range(20)]
    assert draw(Records(many, []), 3, 5) == draw(Records(many, []), 3, 5) != draw(Records(many, []), 3, 6)


def test_a_record_without_an_image(vlm: Vlm) -> None:
    (sample,) = look(vlm, record("two dogs?")).samples
    assert (sample.attention, sample.views, sample.notes) == (None, (), ("this record has no image",))
    assert {one.kind for one in sample.lesions} == {"bypass"}
    assert sample.lens.num_image == 0
    assert math.isnan(sample.influence["image"][0])


def test_cross_attention_has_no_image_tokens_to_look_at() -> None:
    (sample,) = look(of_family("mllama"), QUESTION).samples
    assert "cross-attention" in sample.notes[0]
    assert sample.attention is None
    assert {one.kind for one in sample.lesions} == {"bypass"}


def test_attention_that_cannot_be_read_leaves_the_rest(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Iterator[None]:
        raise UserError("attention weights cannot be read in the flex_attention implementation: load with sdpa")

    monkeypatch.setattr(observing, "watch_rows", refuse)
    (sample,) = look(vlm, QUESTION).samples
    assert sample.attention is None
    assert "flex_attention" in sample.notes[0]
    assert len(sample.lesions) == 2 * 7
    assert sample.lens.num_image == 16


def test_an_image_of_many_tiles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = of_family("idefics3")
    monkeypatch.setattr(vlm.processor.image_processor, "size", {"longest_edge": 256})
    many = replace(QUESTION, images=(noise(0, 512, 512),))
    monkeypatch.setattr("striate.exploration.MAX_LENS_TOKENS", 100)
    monkeypatch.setattr(observing, "MAX_LENS_TOKENS", 100)
    (sample,) = look(vlm, many).samples
    assert len(sample.views) == 8 * 8 + 1
    assert sample.lens.num_image == 100
    assert "nearest words are those of the first 100 of 260 image tokens" in sample.notes
    with pytest.raises(RecordError, match=r"tokens, more than --max-length 500"):
        look(vlm, many, max_length=500)


def test_layers_without_self_attention_are_nan() -> None:
    (sample,) = look(of_family("lfm3_vl"), QUESTION).samples
    assert sample.attention is not None
    without = sample.attention.mean.isnan().all(dim=-1).all(dim=-1)
    assert without.any()
    assert not without.all()


def test_the_route_of_a_model_is_kept(vlm: Vlm) -> None:
    everything = Region.parse("0,1", 4)
    with route(vlm, everything):
        asked = ask(vlm, QUESTION, max_length=2048)
        replay = observe(vlm, asked, layout(vlm, QUESTION, asked.example)).replay
        found = list(lesions(vlm, replay, asked, {"layer 3": Region((3,), 4)}))
        assert asked.text == evaluated(vlm)
    image = found[1]  # image tokens do not pass through layer 3 anyway
    assert not image.changed
    assert image.log_prob == pytest.approx((-asked.targets.nll(replay.logits)).tolist(), abs=1e-4)


def test_bad_records(vlm: Vlm) -> None:
    bad = replace(QUESTION, images=(b"not an image",), source="test.json:7")
    with pytest.raises(RecordError, match=r"test\.json:7: image data is not an image"):
        look(vlm, bad)
    exploration = look(vlm, bad, QUESTION, stop=False)
    assert len(exploration.samples) == 1
    assert [one.source for one in exploration.skipped] == ["test.json:7"]
    with pytest.raises(RecordError, match=r"test\.json:7"):
        look(vlm, bad, stop=False)
    with pytest.raises(RecordError, match=r"tokens, more than --max-length 20"):
        look(vlm, QUESTION, max_length=20)
    with pytest.raises(UserError, match="at least 1"):
        explore(vlm, Records([QUESTION], []), samples=0)


def test_other_language_models(tmp_path: Path) -> None:
    """Soft-capped, with sinks, in a window: what is looked at is what the model computes."""
    from tracing import MODELS

    for kind in ("soft cap", "sinks"):
        vlm = llava_of(MODELS[kind])
        asked = ask(vlm, QUESTION, max_length=2048)
        found = observe(vlm, asked, layout(vlm, QUESTION, asked.example))
        assert found.attention is not None
        whole = plain_maps(vlm, asked)[0][:, found.tokens][:, :, asked.batch.image_mask[0]]
        torch.testing.assert_close(found.attention.mean[0], whole.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_from_files(tmp_path: Path) -> None:
    from test_train import write_data

    vlm = load(pico_llava(tmp_path / "pico"), device="cpu")
    exploration = explore(vlm, read(write_data(tmp_path), images=tmp_path), region="0,2", samples=1)
    assert len(exploration.samples) == 1
    assert exploration.region == Region((0, 2), 4)
    assert exploration.route is None

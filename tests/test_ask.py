"""One question: the answer is that of `eval`, it is streamed, and the command line takes it in any order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from asking import talkative_llava
from pico import DEPTH

import striate
from striate.data import read
from striate.data.images import open_image
from striate.errors import UserError
from striate.evaluation import answer
from striate.region import Region
from striate.roundtrip import save
from striate.routing import write_route
from striate.runs.asking import ask
from striate.runs.cli import main, parse_call

QUESTION = "what is this ?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative_llava(tmp_path_factory.mktemp("ask") / "llava")


def test_the_answer_is_that_of_eval_and_is_streamed(model: Path, data: Path) -> None:
    vlm = striate.load(model, device="cpu")
    record = read(data).records[0]
    (_, expected), *_ = answer(vlm, [record], max_new_tokens=12)
    pieces: list[str] = []
    reply = striate.ask(vlm, QUESTION, images=record.images, max_new_tokens=12, stream=pieces.append)
    assert reply.text.strip() == expected
    assert "".join(pieces) == reply.text
    assert len(pieces) > 1
    assert (reply.image_tokens, reply.prompt_tokens) == (16, 16 + 7)  # <s> <user> what is this ? <assistant>
    assert 1 <= reply.new_tokens <= 12
    assert 0 < reply.first_seconds <= reply.seconds


def test_the_answer_of_a_model_in_training_mode_is_that_of_evaluation(tmp_path: Path) -> None:
    vlm = striate.load(talkative_llava(tmp_path / "llava", attention_dropout=0.5), device="cpu")
    expected = striate.ask(vlm, QUESTION, max_new_tokens=12).text
    vlm.model.train()  # as the Trainer of transformers leaves it
    assert [striate.ask(vlm, QUESTION, max_new_tokens=12).text for _ in range(3)] == [expected] * 3
    assert vlm.model.training


def test_images_may_be_one_image_or_any_iterable_and_their_names_text(model: Path, data: Path) -> None:
    vlm, file = striate.load(model, device="cpu"), data.parent / "0.png"
    expected = striate.ask(vlm, QUESTION, images=[file], max_new_tokens=4).tokens
    for images in (file, str(file), [str(file)], iter([file]), file.read_bytes(), open_image(file)):
        assert striate.ask(vlm, QUESTION, images=images, max_new_tokens=4).tokens == expected
    with pytest.raises(UserError, match=r"image nowhere\.png not found"):
        striate.ask(vlm, QUESTION, images=["nowhere.png"])


def test_images_are_in_their_order(model: Path, data: Path) -> None:
    vlm, files = striate.load(model, device="cpu"), [data.parent / f"{n}.png" for n in (0, 1)]
    both = striate.ask(vlm, QUESTION, images=files, max_new_tokens=12)
    assert both.image_tokens == 32
    assert both.text != striate.ask(vlm, QUESTION, images=files[::-1], max_new_tokens=12).text
    assert striate.ask(vlm, QUESTION, max_new_tokens=2).image_tokens == 0


def test_the_verb_shows_two_models_and_what_they_took(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm, routed, image = striate.load(model, device="cpu"), tmp_path / "routed", str(data.parent / "1.png")
    write_route(vlm.model.config, Region((0, 2), DEPTH))
    save(vlm, routed)
    Region((2,), DEPTH).save(routed / "region.json")
    words = ["ask", str(routed), "--image", image, QUESTION, "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*words, "--against", str(model)]) == 0
    shown = capsys.readouterr().out
    assert shown.index(str(routed)) < shown.index(str(model))
    took = r"[\d.]+ s to the first token, 4 tokens, [\d.]+ tokens/s; prompt of 23 tokens, 16 of images; bfloat16 on cpu"
    assert len(re.findall(took, shown)) == 2
    answers = {}
    for route in (None, "none", "0,2", "same"):
        ask(routed, question=QUESTION, image=[Path(image)], route=route, max_new_tokens=8)
        answers[route] = capsys.readouterr().out.splitlines()[0]
    assert answers[None] == answers["0,2"] == answers["same"] != answers["none"]


@pytest.mark.parametrize(
    "words",
    [
        [QUESTION, "--image", "a.png", "b.png", "--route", "none"],
        ["--image", "a.png", "b.png", QUESTION, "--route", "none"],
        ["--route", "none", "--image", "a.png", "b.png", QUESTION],
        ["--route", "none", "--image", "a.png", "b.png", "--question", QUESTION],
    ],
)
def test_the_question_stands_where_one_types_it(words: list[str]) -> None:
    call = parse_call("ask", ask, ["m", *words])
    assert (call["model"], call["question"], call["route"]) == ("m", QUESTION, "none")
    assert [*map(str, call["image"])] == ["a.png", "b.png"]


def test_bad_input_is_one_line(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, broken = data.parent / "0.png", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text('{"verb": "score", "status": "finished"}')
    wrong = {
        ("--image", "gone.png", QUESTION): "--image gone.png: no such file",
        ("--image", str(image)): "required: --question",
        ("--image", str(image), str(image)): f"{image} is a file: the question is missing after it",
        ("--image", str(broken), QUESTION): "broken.png is not an image",
        (" ",): "the question is empty",
        (QUESTION, "--max-new-tokens", "0"): "--max-new-tokens 0: at least 1 was expected",
        (QUESTION, "--route", "same"): "has no region in its region.json; name the layers",
        (QUESTION, "--route", str(DEPTH)): f"layer {DEPTH} does not exist",
        (QUESTION, "--against", str(tmp_path / "empty")): "has no checkpoint/ (score, finished)",
    }
    for words, message in wrong.items():
        assert main(["ask", str(model), *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
    with pytest.raises(UserError, match="is not a model folder"):
        ask(tmp_path, question=QUESTION)

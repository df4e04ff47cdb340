"""`explore --live`: a model is asked while layers are changed, by a session and through the page."""

from __future__ import annotations

import html
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from asking import in_family, loud, noise, record, talkative_llava
from pico import DEPTH, pico_llava
from torch import Tensor

import striate
from striate.data import collate, encode
from striate.errors import UserError
from striate.exploration import Intervention, asking, explore_answer, explore_questions, intervene
from striate.prune import bypass
from striate.region import Region
from striate.routing import route, running_route
from striate.runs.cli import main
from striate.scores.backbone import Backbone
from striate.studies.explore import session as sessions
from striate.studies.explore.session import Answer, Session, Subject, follow, merge
from striate.vlm import Vlm

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
QUESTION = "what is this ?"
NONE = Region((), DEPTH)


def layers(form: str) -> Region:
    return Region.parse(form, DEPTH)


# Interventions.


@pytest.fixture
def vlm() -> Vlm:
    return loud(in_family("llava"))


def logits(vlm: Vlm) -> Tensor:
    question = record("is the red cat on a mat?", image=9)
    batch = collate([encode(question, vlm.processor, generation=True)], pad_id=vlm.pad_token_id)
    with torch.inference_mode():
        output: Tensor = vlm.model(**batch.inputs, use_cache=False).logits
    return output


def test_an_intervention_is_all_of_its_parts(vlm: Vlm, tmp_path: Path) -> None:
    plain, backbone = logits(vlm), Backbone(vlm, pico_llava(tmp_path / "backbone"))
    with route(vlm, layers("0-2")), backbone.revert(layers("3")), bypass(vlm, layers("1")):
        expected = logits(vlm)
    with intervene(vlm, Intervention(layers("1"), layers("3"), layers("0-2")), backbone):
        assert logits(vlm).equal(expected)
    assert not expected.allclose(plain)
    assert logits(vlm).equal(plain)


def test_the_own_route_of_a_model_is_replaced_and_restored(vlm: Vlm) -> None:
    plain = logits(vlm)
    route(vlm, layers("0,1"))
    routed = logits(vlm)
    with intervene(vlm, Intervention(NONE, NONE)):
        assert logits(vlm).equal(plain)
    with pytest.raises(UserError, match="no layer"), intervene(vlm, Intervention(NONE, NONE, NONE)):
        pass
    assert not routed.equal(plain)
    assert logits(vlm).equal(routed)
    routed = running_route(vlm.model)
    assert routed is not None
    assert routed.region == layers("0,1")
    routed.remove()


def test_interventions_in_words_and_what_they_lack(vlm: Vlm) -> None:
    assert str(Intervention(NONE, NONE)) == "all layers"
    everything = Intervention(layers("1"), layers("2,3"), layers("0-2"))
    assert str(everything) == "layer 1 bypassed, layers 2,3 reverted, image tokens only through layers 0-2"
    with pytest.raises(UserError, match="bypassed and reverted: layers 1,2; choose one"):
        Intervention(layers("0-2"), layers("1-3"))
    with pytest.raises(UserError, match="--backbone is required"), intervene(vlm, Intervention(NONE, layers("1"))):
        pass


def test_a_known_answer_is_looked_at_as_one_that_is_generated(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 4)
    question = record("is the red cat on a mat?", image=9)
    expected = explore_questions(vlm, [question]).samples[0]
    tokens = asking.ask(vlm, question, max_length=2048).tokens
    exploration = explore_answer(vlm, question, tokens, region=layers("1"), route=layers("0,1"))
    (sample,) = exploration.samples
    assert (sample.answer, sample.log_prob, sample.texts) == (expected.answer, expected.log_prob, expected.texts)
    assert (sample.lesions, exploration.region, exploration.route) == ((), layers("1"), layers("0,1"))
    assert sample.attention is not None
    assert expected.attention is not None
    assert sample.attention.mean.equal(expected.attention.mean)
    (longer,) = explore_answer(vlm, question, (*tokens[:4], 9, 9)).samples
    assert longer.texts == sample.texts
    assert longer.notes == ("the first 4 tokens of the answer are looked at",)


# A session.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model, and its backbone, which says other words."""
    folder = tmp_path_factory.mktemp("live")
    found = [talkative_llava(folder / name) for name in ("model", "backbone")]
    for number, one in enumerate(found):
        whole = striate.load(one, device="cpu").model
        for parameter in whole.parameters():
            parameter.data *= 1 + 0.1 * number
        whole.generation_config.eos_token_id = [3, 7, 12, 20]  # three words end an answer, too
        whole.save_pretrained(one)
    return found


@pytest.fixture
def session(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(sessions, "MAX_NEW_TOKENS", 6)
    one, other = (striate.load(model, device="cpu") for model in models)
    subjects = [Subject("one", one, layers("1"), None, Backbone(one, models[1])), Subject("other", other)]
    return Session(subjects, max_length=200)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "image.png"
    noise(0, 64, 48).save(file)
    return file


def plain_answer(vlm: Vlm, image: Path) -> str:
    return striate.ask(vlm, QUESTION, images=[image], max_new_tokens=6).text


def test_answers_are_those_of_the_changed_model_and_grow(session: Session, image: Path) -> None:
    one, other = session.subjects
    asked = list(session.ask(QUESTION, [image.read_bytes()], bypassed="1,2", reverted="last:1", route="first:3"))
    with intervene(one.vlm, Intervention(layers("1,2"), layers("3"), layers("0-2")), one.backbone):
        changed = plain_answer(one.vlm, image)
    texts = [[answer.text for answer in answers] for answers in asked]
    assert texts[-1] == [changed, plain_answer(other.vlm, image)]
    assert changed != plain_answer(one.vlm, image)
    assert len(asked) > 4
    for before, after in pairwise(texts):
        assert all(now.startswith(then) for then, now in zip(before, after, strict=False))
    first, second = asked[-1]
    assert first.changes == "layers 1,2 bypassed, layer 3 reverted, image tokens only through layers 0-2"
    assert second.changes == "all layers"
    assert re.match(r"[\d.]+ s to the first token, \d+ tokens", second.took)
    assert first.exploration is not None
    assert first.exploration.route == layers("0-2")
    assert first.exploration.samples[0].influence["text"][1:3].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_answers_of_a_model_become_one_page(session: Session, image: Path) -> None:
    rounds = [
        list(session.ask(QUESTION, [image.read_bytes()], bypassed=form, route="all"))[-1] for form in ("none", "2")
    ]
    exploration = merge([answers[0] for answers in rounds])
    assert [sample.question for sample in exploration.samples] == [
        f"all layers: {QUESTION}", f"layer 2 bypassed: {QUESTION}"
    ]  # fmt: skip
    assert exploration.model == "one"
    assert {token for sample in exploration.samples for token in sample.lens.words.flatten().tolist()} <= {
        *exploration.words
    }


def test_what_cannot_be_asked_is_one_line_and_leaves_the_session_usable(session: Session, image: Path) -> None:
    contents = image.read_bytes()
    for arguments, message in (
        ({"bypassed": "9"}, "layer 9 does not exist"),
        ({"route": "first:9"}, "--route first:9"),
        ({"question": " "}, "the question is empty"),
        ({"images": [b"no image"]}, "image data is not an image"),
        ({"question": "cat " * 300}, "more than --max-length 200"),
    ):
        given: dict[str, Any] = {"question": QUESTION, "images": [contents], "route": "all", **arguments}
        with pytest.raises(UserError, match=message):
            list(session.ask(given.pop("question"), given.pop("images"), **given))
    *_, (answer, _) = session.ask(QUESTION, [], route="same")  # without an image
    assert answer.exploration is not None
    assert answer.exploration.samples[0].notes == ("this record has no image",)
    assert answer.changes == "image tokens only through layers 0,1"


def test_work_that_nobody_follows_ends_first() -> None:
    done = []

    def work(show: Any) -> Answer:
        show(Answer("", "", "", "a"))
        done.append(True)
        return Answer("", "", "", "ab")

    assert [answer.text for answer in follow(work)] == ["a", "ab"]
    following = follow(work)
    next(following)
    following.close()  # type: ignore[attr-defined]
    assert len(done) == 2


# The page.


@pytest.fixture
def address(models: list[Path], tmp_path: Path) -> Iterator[str]:
    """The page of two models, served by the verb in a process of its own, which Ctrl-C ends."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    words = ["explore", models[0], "--live", "--against", models[1], "--backbone", models[1], "--region", "first:1"]
    command = [sys.executable, "-m", "striate", *map(str, words), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(striate.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        while process.poll() is None and "Ctrl-C" not in log.read_text():
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0, log.read_text()
    assert f"http://127.0.0.1:{port}/ (Ctrl-C ends it)" in log.read_text()


@needs_gradio
def test_the_page_answers_twice_side_by_side_and_shows_the_layers(address: str, image: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    with urlopen(address) as response:
        policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy
    client = Client(address, verbose=False, analytics_enabled=False)
    asked = {"images": [{"image": handle_file(image), "caption": None}], "question": "<i>what</i> is this ?"}
    client.predict(**asked, bypassed=[], reverted=[], route="all", api_name="/ask")
    job = client.submit(**asked, bypassed=["1", "2"], reverted=["3"], route="0-2", api_name="/ask")
    cards, *views = job.result()
    assert len(job.outputs()) > 4  # two answers, as they came
    changes = "layers 1,2 bypassed, layer 3 reverted, image tokens only through layers 0-2"
    assert re.findall(r'class="changes">(.*?)<', cards) == [changes, "all layers", "all layers", "all layers"]
    assert len(re.findall(r"[\d.]+ s to the first token, \d+ tokens", cards)) == 4
    assert "&lt;i&gt;what&lt;/i&gt;" in cards
    assert "<i>" not in cards
    assert len(views) == 2
    document = html.unescape(re.search(r'sandbox="allow-scripts" srcdoc="([^"]*)"', views[0])[1])  # type: ignore[index]
    assert document.count('"attention":{') == 2
    assert f"{changes}: \\u003ci>what" in document
    with pytest.raises(AppError, match=r"^--route first:9"):
        client.predict(**asked, bypassed=[], reverted=[], route="first:9", api_name="/ask")
    client.close()


@needs_gradio
def test_a_port_in_use_is_one_line_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert main(["explore", "nowhere", "--live", "--port", str(port)]) == 2
    assert re.fullmatch(
        rf"striate explore: cannot listen on 127\.0\.0\.1:{port} \(Address already in use\): choose another --port or "
        r"--host\n",
        capsys.readouterr().err,
    )
    for words, message in (
        (["--port", "70000"], "ports are below 65536"),
        (["--port", "0"], "--port 0: at least 1 was expected"),
    ):
        assert main(["explore", "nowhere", "--live", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data is required: records with questions; or --live, to ask about images of your own"),
        (["--data", "x.json", "--against", "other"], "--against goes with --live"),
        (["--live", "--data", "x.json", "--out", "x.html"], "--live takes images in the browser, not --data, --out"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "model", *words]) == 2
    assert capsys.readouterr().err.startswith(f"striate explore: {message}")

"""Asking a pico LLaVA: batched against alone, cached against uncached, likelihoods against plain passes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import templates
import torch
from pico import WORDS, pico_llava
from PIL import Image

from striate.data import Record, RecordError, Skipped, collate, encode, image_token_id
from striate.errors import UserError
from striate.evaluate import Prediction, answer, choose, evaluate, likelihood, resolve, select, summary
from striate.run import Run
from striate.vlm import Vlm, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def vlm(folder: Path) -> Vlm:
    return loud(load(folder, dtype="float32", device="cpu"))


def loud(vlm: Vlm) -> Vlm:
    """Fresh weights are so small that every answer would be the same."""
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(4)
    return vlm


def record(question: str, *answers: str, image: int | None = None, **fields: Any) -> Record:
    pictures = () if image is None else (Image.new("RGB", (32, 32), (image, 90, 255 - image)),)
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    return Record("", ({"role": "user", "content": content},), pictures, answers=answers, **fields)


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def answered(question: Record, text: str) -> Record:
    turn = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return replace(question, messages=(*question.messages, turn))


RECORDS = [
    record("what is this ?", image=10),
    record("is this a dog ?"),
    record("is the cat in the picture red or green ?", image=250),
    record("no"),
    record("what is in the car ?", image=120),
    record("two three one"),
]


def by_hand(vlm: Vlm, asked: Record, num_tokens: int) -> str:
    """Greedy, alone, without padding, without a cache."""
    inputs = collate([encode(asked, vlm.processor, generation=True)], pad_id=0).inputs
    start = inputs["input_ids"].shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            best = vlm.model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        if int(best) == vlm.tokenizer.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], best], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return vlm.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


def log_prob_by_hand(vlm: Vlm, whole: Record) -> tuple[float, int]:
    example = encode(whole, vlm.processor)
    with torch.no_grad():
        logits = vlm.model(**collate([example], pad_id=0).inputs).logits[0]
    at = [place for place, label in enumerate(example.labels.tolist()) if label != -100]
    log_probs = [float(logits[place - 1].log_softmax(-1)[example.labels[place]]) for place in at]
    return sum(log_probs), len(at)


def test_an_answer_does_not_depend_on_its_neighbours(vlm: Vlm) -> None:
    expected = {index: by_hand(vlm, asked, 6) for index, asked in enumerate(RECORDS)}
    assert len(set(expected.values())) > 3
    for batch in (1, 4):
        assert dict(answer(vlm, RECORDS, batch=batch, max_new_tokens=6)) == expected


def test_longest_records_come_first(vlm: Vlm) -> None:
    assert [index for index, _ in answer(vlm, RECORDS, batch=4, max_new_tokens=1)] == [2, 4, 0, 1, 5, 3]


def test_an_answer_stops_before_any_end_token(vlm: Vlm) -> None:
    said = dict(answer(vlm, RECORDS, max_new_tokens=6))
    end = next(word for text in said.values() for word in text.split()[1:] if word != text.split()[0])
    vlm.model.generation_config.eos_token_id = [3, vlm.tokenizer.convert_tokens_to_ids(end)]
    cut = {index: f"{text} ".partition(f"{end} ")[0].strip() for index, text in said.items()}
    assert dict(answer(vlm, RECORDS, max_new_tokens=6)) == cut != said


def test_the_checkpoints_sampling_and_penalties_are_ignored(vlm: Vlm) -> None:
    expected = dict(answer(vlm, RECORDS, max_new_tokens=6))
    vlm.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, top_k=3)
    assert dict(answer(vlm, RECORDS, max_new_tokens=6)) == expected


@pytest.mark.parametrize("batch", [1, 4])
def test_likelihood_of_answers(vlm: Vlm, batch: int) -> None:
    records = [answered(asked, " ".join(WORDS[: 1 + n])) for n, asked in enumerate(RECORDS)]
    for index, found in likelihood(vlm, records, batch=batch):
        log_prob, num_tokens = log_prob_by_hand(vlm, records[index])
        assert found.num_tokens == num_tokens == index + 2  # the words and the end of the turn
        assert found.log_prob == pytest.approx(log_prob, abs=1e-4)


def test_the_likeliest_choice_is_chosen(vlm: Vlm) -> None:
    choices = ("red", "a green cat", "yes it sees", "car")
    records = [replace(asked, choices=choices) for asked in RECORDS]
    chosen = dict(choose(vlm, records, batch=2))
    assert len(set(chosen.values())) > 1
    for index, asked in enumerate(RECORDS):
        assert chosen[index] == max(choices, key=lambda one: log_prob_by_hand(vlm, answered(asked, one))[0])


def test_a_choice_takes_the_place_of_the_answer_in_the_record(vlm: Vlm) -> None:
    asked = replace(RECORDS[0], choices=("red", "blue"))
    assert list(choose(vlm, [asked])) == list(choose(vlm, [answered(asked, "red")]))


@pytest.mark.parametrize("bos", ["<s>", None])
def test_every_token_of_a_text_is_predicted_once(vlm: Vlm, bos: str | None) -> None:
    vlm.tokenizer.bos_token = bos
    words = (WORDS * 2)[:23]
    tokens = vlm.tokenizer.convert_tokens_to_ids(words)
    log_prob, window = 0.0, 8
    for start in range(0 if bos else 1, len(tokens), window - 1):
        before = [vlm.tokenizer.bos_token_id] if bos else [tokens[start - 1]]
        ids = torch.tensor([before + tokens[start : start + window - 1]])
        with torch.no_grad():
            log_probs = vlm.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        log_prob += float(log_probs.gather(1, ids[0, 1:, None]).sum())
    records = [Record("", (), text="a dog"), Record("", (), text=" ".join(words))]
    found = dict(likelihood(vlm, records, batch=2, max_length=window))
    assert found[1].num_tokens == (23 if bos else 22)
    assert found[1].log_prob == pytest.approx(log_prob, abs=1e-4)


def test_logits_are_made_for_a_bounded_number_of_tokens(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [answered(asked, " ".join(WORDS[: 1 + n])) for n, asked in enumerate(RECORDS)]
    expected = dict(likelihood(vlm, records))
    monkeypatch.setattr("striate.evaluate.answers.MAX_ROWS", 5)
    for index, found in likelihood(vlm, records):
        assert found.log_prob == pytest.approx(expected[index].log_prob, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_record_that_cannot_be_read_is_skipped_alone(vlm: Vlm, tmp_path: Path, batch: int) -> None:
    bad = replace(RECORDS[0], images=(tmp_path / "gone.png",), source="x.json:1")
    found = dict(answer(vlm, [bad, RECORDS[1]], batch=batch, max_new_tokens=2))
    assert isinstance(found[0], Skipped)
    assert found[0].source == "x.json:1"
    assert found[1] == dict(answer(vlm, [RECORDS[1]], max_new_tokens=2))[0]


def in_family(name: str) -> Vlm:
    """A pico model of the family with the family's pico processor."""
    processor = templates.processor(name)
    ids, image = processor.tokenizer.convert_tokens_to_ids, image_token_id(processor)
    text = {"vocab_size": len(processor.tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    changes = {
        "image_token_id": image,
        "image_token_index": image,
        "text_config": pico.FAMILIES[name]["text_config"] | text,
    }
    if name.startswith("qwen"):
        changes |= {"vision_start_token_id": ids("<|vision_start|>"), "video_token_id": ids("<|video_pad|>")}
    if name.startswith("llava"):
        changes |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    if name in ("llava_next", "llava_onevision"):
        changes["image_grid_pinpoints"] = processor.image_processor.image_grid_pinpoints
    vlm = Vlm.of(pico.pico(name, **changes))
    vlm.__dict__["processor"] = processor  # in place of the one in a folder
    return vlm


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_no_family_mixes_up_the_records_of_a_batch(name: str) -> None:
    vlm = loud(in_family(name))
    records = [
        replace(record("is the red cat on a mat?", image=0), images=(noise(0, 20, 16),)),
        replace(record("two", image=0), images=(noise(1, 16, 40),)),
        replace(record("What colour is one bird", image=0), images=(noise(2, 40, 40),)),
    ]
    if name != "paligemma":  # which takes no question without an image
        records.insert(1, record("yes, no: two dogs"))
    said = dict(answer(vlm, records, batch=1, max_new_tokens=4))
    assert all(isinstance(text, str) for text in said.values())
    assert dict(answer(vlm, records, batch=3, max_new_tokens=4)) == said
    records = [answered(asked, "one bird" * n) for n, asked in enumerate(records, 1)]
    alone, together = (dict(likelihood(vlm, records, batch=batch)) for batch in (1, 3))
    for index, found in alone.items():
        assert found.log_prob == pytest.approx(together[index].log_prob, abs=1e-4)


def metric_of(**fields: Any) -> str:
    return resolve(replace(record("what ?"), **fields)).metric


def test_the_metric_of_a_record() -> None:
    assert metric_of(answers=("a",)) == "exact_match"
    assert metric_of(answers=("a",) * 10) == "vqa_accuracy"
    assert metric_of(answers=("a",), choices=("a", "b")) == "multiple_choice"
    assert metric_of(answers=("a",), metric="anls") == "anls"
    assert metric_of(messages=(), text="a dog") == "perplexity"


def test_answers_and_task_of_a_record() -> None:
    resolved = resolve(replace(answered(RECORDS[0], "a cat"), source="pets.json:3"))
    assert (resolved.task, resolved.answers) == ("pets", ("a cat",))
    assert resolve(record("what ?", "B", choices=("cat", "dog"))).answers == ("dog",)
    assert resolve(record("what ?", "B", choices=("B", "A"))).answers == ("B",)
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"metric": "exact_macth", "answers": ("a",)},
            "x.json:1: no metric 'exact_macth'; nearest: exact_match",
        ),
        ({}, "x.json:1: exact_match needs 'answers', found none"),
        ({"metric": "vqa_accuracy", "answers": ("a",)}, "4 people or more, found 1"),
        ({"choices": ("a", "b"), "answers": ("C",)}, "needs answers that are among the 2 'choices', found"),
        ({"messages": (), "text": "a dog", "metric": "anls"}, "anls needs a question, found plain text"),
    ],
)
def test_what_a_metric_needs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(replace(record("what ?"), source="x.json:1", **fields))


def prediction(task: str, score: float, metric: str = "exact_match", modality: str = "text", n: int = 0) -> Prediction:
    return Prediction("", task, metric, modality, "", (), "", score, (), n)


def test_summary_by_task_and_modality() -> None:
    found = summary(
        [
            prediction("mixed", 1.0, modality="visual"),
            prediction("seen", 0.5, "anls", "visual"),
            prediction("mixed", 0.0),
            prediction("topics", math.exp(2), "perplexity", n=2),
            prediction("topics", math.exp(1), "perplexity", n=4),
        ]
    )
    tasks = found["tasks"]
    assert tasks["mixed"] == {
        "metric": "exact_match", "modality": "visual", "value": 0.5, "stderr": 0.5, "n": 2,
    }  # fmt: skip
    assert tasks["seen"]["stderr"] is None
    assert tasks["topics"]["value"] == pytest.approx(math.exp(8 / 6))
    assert (found["visual"], found["text"]) == (0.5, None)
    with pytest.raises(UserError, match="task 'a' mixes exact_match and anls"):
        summary([prediction("a", 1), prediction("a", 1, "anls")])


def test_a_sample_does_not_depend_on_the_other_tasks() -> None:
    records = [replace(record(f"{n}"), task="even" if n % 2 == 0 else "odd", metric="anls") for n in range(40)]
    both = select(records, samples=5, seed=1)
    assert [one.task for one in both] == ["even"] * 5 + ["odd"] * 5
    assert select(records, tasks="odd", samples=5, seed=1) == both[5:]
    assert select(records, samples=5, seed=2) != both
    assert [records.index(one) for one in both[:5]] == sorted(records.index(one) for one in both[:5])
    with pytest.raises(UserError, match="no task 'od'; nearest: odd"):
        select(records, tasks=["even", "od"])
    assert select(records, tasks=["odd,even"], samples=5, seed=1) == both  # as the command line gives them


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    asked = {"from": "human", "value": "<image>\nwhat is this ?"}
    name = {"image": "red.png", "conversations": [asked], "answers": "red", "task": "name"}
    fact = {"messages": [{"role": "user", "content": "is a cat a dog ?"}], "answers": ["B"], "task": "facts"}
    seen = [*({**name, "id": f"n{n}"} for n in range(3)), {**fact, "id": "f", "choices": ["yes", "no"]}]
    files = tmp_path / "test.json", tmp_path / "topics.jsonl"
    files[0].write_text(json.dumps(seen))
    files[1].write_text('{"text": "a red dog"}\n{"text": "the cat in the car"}\n')
    return list(files)


def test_evaluate_writes_a_run(folder: Path, data: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = evaluate(folder, data, out=out, batch=2, max_new_tokens=3, device="cpu", dtype="float32")
    run = Run.open(out)
    assert run.results == json.loads(json.dumps(results))
    assert run.info["verb"] == "eval"
    assert run.info["status"] == "finished"
    assert {name: (task["metric"], task["modality"], task["n"]) for name, task in results["tasks"].items()} == {
        "name": ("exact_match", "visual", 3),
        "facts": ("multiple_choice", "text", 1),
        "topics": ("perplexity", "text", 2),
    }
    assert results["visual"] == results["tasks"]["name"]["value"]
    assert results["text"] == results["tasks"]["facts"]["value"]
    lines = run.predictions()
    assert [line["id"] for line in lines] == ["n0", "n1", "n2", "f", "topics.jsonl:1", "topics.jsonl:2"]
    assert lines[0]["question"] == "what is this ?"
    assert lines[0]["images"] == [str(tmp_path / "red.png")]
    assert lines[3]["answers"] == ["no"]
    with pytest.raises(UserError, match="holds another run"):
        evaluate(folder, data, out=out, device="cpu")


def test_evaluate_a_run_in_place(folder: Path, data: list[Path], tmp_path: Path) -> None:
    run = Run.create(tmp_path / "tuned", verb="tune", options={})
    run.checkpoint.symlink_to(folder)
    run.update(status="finished", seconds=5.0)
    evaluate(run.path, data[0], tasks="name", samples=2, max_new_tokens=2, device="cpu")
    assert run.results["tasks"]["name"]["n"] == 2
    assert (run.info["verb"], run.info["seconds"]) == ("tune", 5.0)


def test_bad_records_stop_or_are_listed(folder: Path, data: list[Path], tmp_path: Path) -> None:
    rows = json.loads(data[0].read_text())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[1]["image"] = "broken.png"
    del rows[2]["answers"]
    data[0].write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=r"test.json:3: exact_match needs 'answers', found none"):
        evaluate(folder, data[0], out=tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()
    out = tmp_path / "yes"
    results = evaluate(folder, data[0], out=out, on_bad_record="skip", max_new_tokens=2, device="cpu")
    assert results["skipped"] == 2
    assert {line["source"] for line in Run.open(out).skipped()} == {"test.json:2", "test.json:3"}
    assert results["tasks"]["name"]["n"] == 1
    data[0].write_text(json.dumps(rows[1:2]))
    with pytest.raises(UserError, match=r"none of the 1 records can be asked: test.json:1: "):
        evaluate(folder, data[0], out=tmp_path / "none", on_bad_record="skip", device="cpu")


def test_evaluate_needs_somewhere_to_write(folder: Path, data: list[Path]) -> None:
    with pytest.raises(UserError, match=r"is no run to write results into: name a new one with --out"):
        evaluate(folder, data)

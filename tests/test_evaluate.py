"""Asking a pico LLaVA: batched against alone, cached against uncached, likelihoods against plain passes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import processors
import pytest
import templates
import torch
from asking import answered, in_family, loud, noise, record
from pico import WORDS, pico_llava
from PIL import Image

import striate
from striate.data import IGNORED, Example, Record, RecordError, Skipped, collate, encode
from striate.errors import UserError
from striate.evaluation import (
    Likelihood,
    Prediction,
    answer,
    answers,
    prefix,
    resolve,
    sample_tasks,
    summary,
)
from striate.runs.cli import main
from striate.runs.evaluating import EVAL, evaluate
from striate.runs.run import Run
from striate.vlm import Vlm, load

CPU = replace(EVAL, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def vlm(folder: Path) -> Vlm:
    return loud(load(folder, dtype="float32", device="cpu"))


RECORDS = [
    record("what is this ?", image=10),
    record("is this a dog ?"),
    record("is the cat in the picture red or green ?", image=250),
    record("no"),
    record("what is in the car ?", image=120),
    record("two three one"),
]


def likelihood(vlm: Vlm, records: list[Record], *, batch: int = 16, max_length: int = 2048) -> dict[int, Any]:
    return dict(answers._each(vlm, records, answers.likelihood_fn(vlm, batch=batch, max_length=max_length), batch))


def choose(vlm: Vlm, records: list[Record], *, batch: int = 16) -> dict[int, Any]:
    return dict(answers._each(vlm, records, answers.choice_fn(vlm, batch=batch, max_length=2048), batch))


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


def test_an_answer_does_not_depend_on_its_neighbors(vlm: Vlm) -> None:
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
    both = likelihood(vlm, records, batch=batch)
    assert sorted(both) == list(range(len(RECORDS)))
    for index, found in both.items():
        log_prob, num_tokens = log_prob_by_hand(vlm, records[index])
        assert found.num_tokens == num_tokens == index + 2  # the words and the end of the turn
        assert found.log_prob == pytest.approx(log_prob, abs=1e-4)


def test_the_likeliest_choice_is_chosen(vlm: Vlm) -> None:
    choices = ("red", "a green cat", "yes it sees", "car")
    records = [replace(asked, choices=choices) for asked in RECORDS]
    chosen = choose(vlm, records, batch=2)
    assert len(set(chosen.values())) > 1
    for index, asked in enumerate(RECORDS):
        assert chosen[index] == max(choices, key=lambda one: log_prob_by_hand(vlm, answered(asked, one))[0])


def test_a_choice_takes_the_place_of_the_answer_in_the_record(vlm: Vlm) -> None:
    asked = replace(RECORDS[0], choices=("red", "blue"))
    assert choose(vlm, [asked]) == choose(vlm, [answered(asked, "red")])


def test_predictions_are_in_the_order_of_the_records_whatever_their_tasks(vlm: Vlm) -> None:
    records = [replace(one, id=f"{n}", task="ab"[n % 2], answers=("yes",)) for n, one in enumerate(RECORDS)]
    found = striate.evaluate(vlm, records, max_new_tokens=2)
    assert [one.id for one in found.predictions] == [one.id for one in records]
    assert list(found.tasks) == ["a", "b"]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"samples": 0}, {"max_new_tokens": 0}, {"max_length": 0}])
def test_a_number_below_one_is_refused(vlm: Vlm, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1 was expected"):
        striate.evaluate(vlm, RECORDS, **wrong)


@pytest.mark.parametrize(
    "fields", [{"choices": ("red", "blue"), "answers": ("red",)}, {"messages": (), "text": "a dog"}]
)
def test_a_likelihood_that_is_nan_is_an_error_and_no_result(vlm: Vlm, fields: dict[str, Any]) -> None:
    with torch.no_grad():
        vlm.layers[1].mlp.up_proj.weight[0, 0] = math.nan  # as of values beyond the range of float16
    with pytest.raises(UserError, match="the likelihood of record 'bad' is NaN: check the checkpoint"):
        striate.evaluate(vlm, [replace(RECORDS[1], id="bad", **fields)])


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
    found = likelihood(vlm, records, batch=2, max_length=window)
    assert found[1].num_tokens == (23 if bos else 22)
    assert found[1].log_prob == pytest.approx(log_prob, abs=1e-4)


def test_logits_are_made_for_a_bounded_number_of_tokens(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [answered(asked, " ".join(WORDS[: 1 + n])) for n, asked in enumerate(RECORDS)]
    expected = likelihood(vlm, records)
    monkeypatch.setattr("striate.evaluation.answers.MAX_ROWS", 5)
    bounded = likelihood(vlm, records)
    assert bounded.keys() == expected.keys() == {*range(len(RECORDS))}
    for index, found in bounded.items():
        assert found.log_prob == pytest.approx(expected[index].log_prob, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_record_that_cannot_be_read_is_skipped_alone(vlm: Vlm, tmp_path: Path, batch: int) -> None:
    bad = replace(RECORDS[0], images=(tmp_path / "gone.png",), source="x.json:1")
    found = dict(answer(vlm, [bad, RECORDS[1]], batch=batch, max_new_tokens=2))
    assert isinstance(found[0], Skipped)
    assert found[0].source == "x.json:1"
    assert found[1] == dict(answer(vlm, [RECORDS[1]], max_new_tokens=2))[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", sorted(set(processors.FAMILIES) - {*processors.MIXED_UP}))
def test_no_family_mixes_up_the_records_of_a_batch(name: str) -> None:
    vlm = loud(in_family(name))
    records = [
        replace(record("is the red cat on a mat?", image=0), images=(noise(0, 20, 16),)),
        replace(record("two", image=0), images=(noise(1, 16, 40),)),
        replace(record("What colour is one bird", image=0), images=(noise(2, 40, 40),)),
    ]
    if name not in processors.IMAGE_NEEDED:
        records.insert(1, record("yes, no: two dogs"))
    said = dict(answer(vlm, records, batch=1, max_new_tokens=4))
    assert [type(said[index]) for index in range(len(records))] == [str] * len(records)
    assert dict(answer(vlm, records, batch=3, max_new_tokens=4)) == said
    records = [answered(asked, "one bird" * n) for n, asked in enumerate(records, 1)]
    alone, together = (likelihood(vlm, records, batch=batch) for batch in (1, 3))
    assert alone.keys() == together.keys() == said.keys()
    for index, found in alone.items():
        assert found.log_prob == pytest.approx(together[index].log_prob, abs=1e-4)


def close(found: list[list[Likelihood]], expected: list[list[Likelihood]]) -> bool:
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    assert [one.num_tokens for one, _ in pairs] == [other.num_tokens for _, other in pairs]
    return all(one.log_prob == pytest.approx(other.log_prob, abs=2e-5) for one, other in pairs)


def read(vlm: Vlm, examples: list[list[Example]]) -> prefix.Prefix | None:
    starts = [prefix.shared_length(choices) for choices in examples]
    prompts = [prefix.split(choices[0], start)[0] for choices, start in zip(examples, starts, strict=True)]
    return prefix.prefill(vlm, prompts) if all(starts) else None


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_choices_behind_a_prompt_that_is_read_once(name: str) -> None:
    vlm = loud(in_family(name))
    records = [
        replace(
            record("is the red cat on a mat?", image=0, choices=("one bird", "two", "no")), images=(noise(0, 20, 16),)
        ),
        replace(record("two", image=0, choices=("red", "What colour")), images=(noise(1, 16, 40),)),
    ]
    if name not in processors.IMAGE_NEEDED:
        records.append(record("yes, no: two dogs", choices=("one bird", "a", "one dog", "yes")))
    examples = [[encode(answered(one, text), vlm.processor) for text in one.choices] for one in records]
    assert read(vlm, examples) is not None
    for batch in (2, 16):
        assert close(answers._choices(vlm, batch, examples), answers._likelihoods(vlm, batch, examples))


def followed(inputs: dict[str, torch.Tensor], tokens: list[int]) -> Example:
    """What `pico_prompts` gives, with an answer behind it."""
    tail = torch.tensor(tokens)
    whole = {"input_ids": tail, "attention_mask": torch.ones_like(tail), "mm_token_type_ids": torch.zeros_like(tail)}
    grown = {key: torch.cat([inputs[key][0], tail]) for key, tail in whole.items() if key in inputs}
    if "cross_attention_mask" in inputs:
        seen = inputs["cross_attention_mask"][0]  # T images tiles
        grown["cross_attention_mask"] = torch.cat([seen, seen[-1:].expand(len(tail), -1, -1)])
    labels = torch.cat([torch.full_like(inputs["input_ids"][0], IGNORED), tail])
    return Example(inputs | grown, labels, grown["input_ids"] == 6, "", "")


@pytest.mark.filterwarnings("ignore:.*causal_conv1d")
@pytest.mark.parametrize("name", pico.MORE)
def test_other_caches_are_expanded_or_prompts_read_again(name: str) -> None:
    vlm = Vlm.of(pico.pico_more(name))
    vlm.__dict__["processor"] = pico.pico_processor()
    vlm.model.generation_config.cache_implementation = "static"  # a wish of the checkpoint that is not followed
    prompts = pico.pico_prompts(name)
    examples = [[followed(prompts["image"], tokens) for tokens in ([11, 12, 13], [14], [15, 16])]]
    examples.append([followed(prompts["text"], tokens) for tokens in ([21, 22], [23, 24, 25, 26])])
    # Convolutions keep what they saw in another form, and layers that look at images keep these.
    assert (read(vlm, examples) is None) == (name in ("lfm2_vl", "mllama"))
    assert close(answers._choices(vlm, 2, examples), answers._likelihoods(vlm, 2, examples))


def test_a_prompt_is_shared_up_to_the_last_answer(vlm: Vlm) -> None:
    talk = (*answered(RECORDS[0], "red").messages, *record("is this a dog ?").messages)
    asked = [
        encode(answered(replace(RECORDS[0], messages=talk), text), vlm.processor) for text in ("yes", "no it sees")
    ]
    start = prefix.shared_length(asked)
    prompt, answer = prefix.split(asked[1], start)
    assert vlm.tokenizer.decode(answer.labels) == "no it sees </s>"
    assert len(prompt) == start
    assert torch.equal(prompt.inputs["pixel_values"], asked[1].inputs["pixel_values"])
    assert prefix.shared_length([asked[0], encode(answered(RECORDS[0], "no"), vlm.processor)]) == 0  # of other lengths
    other = replace(asked[1], inputs=asked[1].inputs | {"pixel_values": asked[1].inputs["pixel_values"] + 1})
    assert prefix.shared_length([asked[0], other]) == 0
    words = asked[1].inputs["input_ids"].clone()
    words[1] = 9
    assert prefix.shared_length([asked[0], replace(asked[1], inputs=asked[1].inputs | {"input_ids": words})]) == 0


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
    for metric in ("mmmu_accuracy", "scienceqa_accuracy"):
        assert resolve(record("what ?", "B", choices=("cat", "dog"), metric=metric)).answers == ("dog",)
    assert resolve(record("what ?", "B", metric="mmmu_accuracy")).answers == ("B",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"metric": "exact_macth", "answers": ("a",)},
            "x.json:1: no metric 'exact_macth'; nearest: exact_match",
        ),
        ({}, "x.json:1: exact_match needs 'answers', found none"),
        ({"metric": "vqa_accuracy", "answers": ("a",)}, "at least 4 people's answers, found 1"),
        ({"choices": ("a", "b"), "answers": ("C",)}, "needs answers that are among the 2 'choices', found"),
        ({"answers": ("a",), "metric": "scienceqa_accuracy"}, "among the 0 'choices', found"),
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
    both = sample_tasks(records, samples=5, seed=1)
    for task in ("even", "odd"):
        own = [one for one in both if one.task == task]
        assert len(own) == 5
        assert sample_tasks(records, tasks=task, samples=5, seed=1) == own
    assert sample_tasks(records, samples=5, seed=2) != both
    assert both == [one for one in records if one in both]
    with pytest.raises(UserError, match="no task 'od'; nearest: odd"):
        sample_tasks(records, tasks=["even", "od"])
    for name in ("lm:arc_easy", "lmms:gqa", "paper-visual"):
        with pytest.raises(
            UserError, match=f"^{name} is a harness's task, with records of its own: leave out the data"
        ):
            sample_tasks(records, tasks=f"even,{name}")
    assert sample_tasks(records, tasks=["odd,even"], samples=5, seed=1) == both  # as the command line gives them


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
    results = evaluate(folder, data, out=out, max_new_tokens=3, options=replace(CPU, batch=2, dtype="float32"))
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
        evaluate(folder, data, out=out, options=CPU)


def test_evaluate_a_run_in_place(folder: Path, data: list[Path], tmp_path: Path) -> None:
    run = Run.create(tmp_path / "tuned", verb="tune", options={})
    run.checkpoint.symlink_to(folder)
    run.update(status="finished", seconds=5.0)
    evaluate(run.path, data[0], tasks="name", max_new_tokens=2, options=replace(CPU, samples=2))
    assert run.results["tasks"]["name"]["n"] == 2
    assert (run.info["verb"], run.info["seconds"]) == ("tune", 5.0)


def test_bad_records_stop_or_are_listed(folder: Path, data: list[Path], tmp_path: Path) -> None:
    rows = json.loads(data[0].read_text())
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows[1]["image"] = "broken.png"
    del rows[2]["answers"]
    data[0].write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=r"test.json:3: exact_match needs 'answers', found none"):
        evaluate(folder, data[0], out=tmp_path / "no", options=CPU)
    assert not (tmp_path / "no").exists()
    out = tmp_path / "yes"
    results = evaluate(folder, data[0], out=out, max_new_tokens=2, options=replace(CPU, on_bad_record="skip"))
    assert results["skipped"] == 2
    assert {line["source"] for line in Run.open(out).skipped()} == {"test.json:2", "test.json:3"}
    assert results["tasks"]["name"]["n"] == 1
    data[0].write_text(json.dumps(rows[1:2]))
    with pytest.raises(UserError, match=r"none of the 1 records can be used: test.json:1: "):
        evaluate(folder, data[0], out=tmp_path / "none", options=replace(CPU, on_bad_record="skip"))


def test_the_library_skips_records_without_answers(vlm: Vlm) -> None:
    silent = replace(record("what is this ?"), source="a.json:1", task="silent")
    found = striate.evaluate(vlm, [silent, record("no", "no")], max_new_tokens=2)
    assert [one.question for one in found.predictions] == ["no"]
    assert found.skipped == (Skipped("a.json:1", "exact_match needs 'answers', found none"),)
    assert found.to_json()["skipped"] == 1
    with pytest.raises(UserError, match=r"none of the 1 records can be used: a.json:1: exact_match needs"):
        striate.evaluate(vlm, [silent])


def test_skipped_records_are_counted_in_the_last_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["what is this ?", *["what is this ? " * 20] * 23]
    written = [{"messages": [{"role": "user", "content": text}], "answers": ["no"]} for text in texts]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written))
    words = ["eval", str(folder), "--data", str(file), "--out", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--max-length", "50", "--max-new-tokens", "2", "--on-bad-record", "skip"]
    assert main(words) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    listed = tmp_path / "run" / "skipped.jsonl"
    assert last == f"23 of 24 records left out, listed in {listed}; 23 more than --max-length 50 tokens"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["skipped"], results["left_out"]) == (23, {"more than --max-length 50 tokens": 23})


def test_empty_answers_are_counted(folder: Path, data: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("striate.evaluation.answers.opens_thinking", lambda _: True)  # so no answer ever comes
    found = evaluate(folder, data[0], out=tmp_path / "run", tasks="name", max_new_tokens=2, options=CPU)
    assert found["empty"] == sum(task["n"] for task in found["tasks"].values())


def test_longest_images_come_first_whatever_their_length(vlm: Vlm) -> None:
    """An image counts as its tokens, also where the records have no answer in them, or more tokens than usual."""
    asked = [record("what is this ? " * 12), record("what ?", image=10)]
    assert answers.batches(vlm, asked, 1) == [[0], [1]]
    asked = [record("what is this ? " * 2), record("what ?", image=10)]
    assert answers.batches(vlm, asked, 1) == [[1], [0]]


def test_evaluate_needs_somewhere_to_write(folder: Path, data: list[Path]) -> None:
    with pytest.raises(UserError, match=r"is not a run folder to write results into: name a new one with --out"):
        evaluate(folder, data)


@contextmanager
def saving(
    *, stop_after: int = -1, error: type[BaseException] = KeyboardInterrupt, torn: bytes = b""
) -> Iterator[list]:
    """The batches that are saved within it; after `stop_after` of them all stops, as by a user or in a crash."""
    saved: list[dict[str, Any]] = []
    save = Run.append_predictions

    def stopping(run: Run, batch: dict[str, Any]) -> None:
        save(run, batch)
        saved.append(batch)
        if len(saved) == stop_after:
            with open(run.path / "predictions.part.jsonl", "ab") as file:
                file.write(torn)
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_predictions", stopping)
        yield saved


def files_of(run: Path) -> tuple[bytes, dict[str, Any]]:
    results = json.loads((run / "results.json").read_text())
    assert results.pop("seconds") > 0
    return (run / "predictions.jsonl").read_bytes(), results


@pytest.fixture
def asked(folder: Path, data: list[Path]) -> dict[str, Any]:
    options = replace(CPU, batch=2, dtype="float32")
    return {"model": folder, "data": data, "max_new_tokens": 3, "options": options}


@pytest.mark.parametrize(
    ("after", "error", "torn", "status"),
    [
        (1, KeyboardInterrupt, b"", "interrupted"),
        (2, MemoryError, b'{"seconds": 1, "predi', "failed"),
        (4, KeyboardInterrupt, b"", "interrupted"),  # all were asked, nothing was summed up
    ],
)
def test_a_resumed_evaluation_has_the_same_results(
    asked: dict[str, Any],
    tmp_path: Path,
    after: int,
    error: Any,
    torn: bytes,
    status: str,
) -> None:
    evaluate(out=tmp_path / "whole", **asked)
    out = tmp_path / "stopped"
    with saving(stop_after=after, error=error, torn=torn), pytest.raises(error) as raised:
        evaluate(out=out, **asked)
    if error is KeyboardInterrupt:
        num = {1: 2, 4: 6}[after]
        assert str(raised.value) == f"stopped with {num} of 6 records answered and saved; the same command resumes"
    assert Run.open(out).info["status"] == status
    assert Run.open(out).results is None
    with saving() as rest:
        evaluate(out=out, **asked)
    assert len(rest) == 4 - after  # batches: two of questions, one of choices, one of texts
    assert files_of(out) == files_of(tmp_path / "whole")
    assert Run.open(out).info["status"] == "finished"
    assert not (out / "predictions.part.jsonl").exists()
    with pytest.raises(UserError, match="holds another run: eval, finished"):
        evaluate(out=out, **asked)


def test_a_stopped_evaluation_of_something_else_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    with saving(stop_after=1), pytest.raises(KeyboardInterrupt):
        evaluate(out=out, **asked)
    with pytest.raises(
        UserError, match="unfinished evaluation with other records, max-new-tokens: give the same again"
    ):
        evaluate(out=out, **asked | {"max_new_tokens": 4}, tasks="name")
    evaluate(out=out, **asked | {"options": replace(asked["options"], batch=3)})  # which results do not depend on


def test_a_stopped_evaluation_in_place_leaves_the_earlier_results(
    asked: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "tuned", verb="tune", options={})
    run.checkpoint.symlink_to(folder)
    run.update(status="finished")
    asked["model"] = run.path
    evaluate(**asked, tasks="facts")
    before = files_of(run.path)
    with saving(stop_after=1), pytest.raises(KeyboardInterrupt):
        evaluate(**asked)
    assert files_of(run.path) == before
    assert run.info["status"] == "finished"
    evaluate(**asked, tasks="name")  # another evaluation starts anew
    assert list(run.results["tasks"]) == ["name"]
    assert run.unfinished is None


def test_skipped_records_are_remembered(asked: dict[str, Any], data: list[Path], tmp_path: Path) -> None:
    rows = json.loads(data[0].read_text())
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows[1]["image"] = "broken.png"
    data[0].write_text(json.dumps(rows))
    asked |= {"out": tmp_path / "run", "options": replace(asked["options"], on_bad_record="skip")}
    with saving(stop_after=3), pytest.raises(KeyboardInterrupt):
        evaluate(**asked)
    assert evaluate(**asked)["skipped"] == 1
    assert [line["source"] for line in Run.open(asked["out"]).skipped()] == ["test.json:2"]
    assert [line["id"] for line in Run.open(asked["out"]).predictions()][:3] == ["n0", "n2", "f"]


LAUNCHED = """
import json, sys
from striate.runs.evaluating import ReadOptions, evaluate
asked = json.loads(sys.argv[1])
asked["options"] = ReadOptions(**asked["options"])
assert evaluate(**asked)["tasks"]["name"]["n"] == 3
"""


@pytest.mark.slow  # two processes that import torch
def test_two_processes_find_what_one_finds(asked: dict[str, Any], tmp_path: Path) -> None:
    asked |= {"data": [str(file) for file in asked["data"]], "model": str(asked["model"])}
    asked["options"] = replace(asked["options"], batch=1)
    evaluate(out=tmp_path / "one", **asked)
    command = [
        sys.executable,
        "-c",
        LAUNCHED,
        json.dumps(asked | {"out": str(tmp_path / "two"), "options": vars(asked["options"])}),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=os.environ | launch | {"RANK": n, "LOCAL_RANK": n, "CUDA_VISIBLE_DEVICES": ""})
        for n in "01"
    ]
    try:
        assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:  # one waits for ever when the other fails
            rank.kill()
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert Run.open(tmp_path / "two").info["status"] == "finished"

"""The verbs `score` and `revert` on a pico LLaVA: runs, choices, what is kept of an interrupted one, bad input."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import DEPTH, pico_llava, pico_processor
from PIL import Image
from rich.console import Console, RenderableType
from training import write_data

import striate
from striate.errors import UserError
from striate.plot import Estimate, RevertProfile
from striate.region import Region
from striate.runs.cli import main
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import revert, score
from striate.runs.terminal import heat_strips, reversions
from striate.scores import METRICS, Score, Scores, causal, metrics, states, weights
from striate.scores.causal import Causal
from striate.scores.figures import attention_maps, attention_overlay
from striate.scores.metrics import choose
from striate.scores.sampling import RecordSample, Sampling
from striate.scores.states import token_kinds
from striate.scores.weights import METRICS as WEIGHTS
from striate.studies.report import report
from striate.trace import forward, watch_attention


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("backbone") / "llava")


@pytest.fixture(scope="module")
def model(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone with its layers moved, the last one left as it was."""
    folder = tmp_path_factory.mktemp("tuned") / "llava"
    vlm = striate.load(backbone, dtype="float32", device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in vlm.layers[:-1]:
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    vlm.model.save_pretrained(folder)
    pico_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, Any]] = [{"text": "what is this ? a red blue green cat"}, {"text": "the cat sees a red car"}]
    turns = [{"role": "user", "content": "is this a dog ?"}]
    rows += [{"messages": [*turns, {"role": "assistant", "content": "no"}]}, {"messages": turns, "answers": ["yes"]}]
    path = tmp_path_factory.mktemp("text") / "text.json"
    path.write_text(json.dumps(rows))
    return path


CPU = ReadOptions(device="cpu", dtype="float32")


def measured(
    model: Path, data: Path | None, out: Path | None, *, options: ReadOptions = CPU, **settings: Any
) -> Scores:
    run = score(model, data=data, out=out, options=options, **settings)
    return Scores.load(run.path)


@pytest.fixture(scope="module")
def whole(model: Path, backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every score there is."""
    out = tmp_path_factory.mktemp("whole") / "run"
    measured(model, data, out, backbone=str(backbone))
    return out


def shown(what: RenderableType, width: int = 80) -> list[str]:
    buffer = io.StringIO()
    Console(width=width, file=buffer, soft_wrap=True).print(what)
    return buffer.getvalue().splitlines()


def test_all_scores_in_one_run(whole: Path, model: Path) -> None:
    found, run = Scores.load(whole), Run.open(whole)
    assert (found.model, found.depth, found.samples, found.partial) == (str(model), DEPTH, 8, False)
    assert list(found.scores) == [name for name in METRICS if name != "snr"]
    for name, one in found.scores.items():
        assert all(math.isfinite(value) for value in one.values), name
        assert (one.n, one.stderr is None) == ((0, True) if name in WEIGHTS else (8, False)), name
        assert one.source, name
    assert found["parameter_change"].values[-1] == 0
    assert found["angular_distance"].table is not None
    assert (run.info["status"], run.info["verb"], run.info["parent"]) == ("finished", "score", str(model))
    names = ("angular_distance", "image_attention", "image_attention_map", "scores")
    assert sorted(file.name for file in run.figures.iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("svg", "png", "pdf")
    )


def test_a_region_is_chosen_by_what_was_measured(whole: Path) -> None:
    values = Scores.load(whole)["block_influence"].values
    best = max(range(DEPTH), key=values.__getitem__)
    assert Region.parse(f"top:1@{whole}:block_influence", DEPTH).layers == (best,)
    assert len(Region.parse(f"spread:50%@{whole}:image_attention", DEPTH)) == 2


def test_a_report_on_a_score_run(whole: Path, tmp_path: Path) -> None:
    page = report([whole], out=tmp_path / "report.html").read_text("utf-8")
    assert "layer scores only" in page
    assert "multimodal block influence" in page
    assert page.count('class="layer-bar heat"') == len(METRICS) - 1  # snr is measured by name alone


def test_scores_do_not_depend_on_the_batch(model: Path, data: Path, tmp_path: Path) -> None:
    metrics = ["block_influence,angular_distance", "image_attention", "layer_contribution", "gradient"]
    one, other = (
        measured(model, data, tmp_path / str(size), metrics=metrics, options=replace(CPU, batch=size))
        for size in (1, 3)
    )
    assert {*one.scores} == {*other.scores} == {*",".join(metrics).split(",")}
    for name in one.scores:
        assert one[name].values == pytest.approx(other[name].values, rel=1e-3, abs=1e-6), name
        assert one[name].stderr == pytest.approx(other[name].stderr, rel=1e-2, abs=1e-6), name


def test_scores_go_into_the_run_that_the_model_is(model: Path, data: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", verb="tune", options={})
    run.update(status="finished")
    run.write_region(Region.parse("1,3", DEPTH))
    run.checkpoint.symlink_to(model)
    found = measured(run.path, data, None, metrics="block_influence", options=replace(CPU, samples=2))
    assert found.samples == 2
    assert (run.info["verb"], run.info["status"]) == ("tune", "finished")
    with pytest.raises(UserError, match="is not a run folder to write results into: name a new one with --out"):
        score(model, data=data, metrics="block_influence")


def test_scores_of_weights_need_no_data(model: Path, backbone: Path, whole: Path, tmp_path: Path) -> None:
    found = measured(model, None, tmp_path / "run", backbone=str(backbone))
    assert list(found.scores) == ["parameter_change", "weight_angle"]
    assert found["weight_angle"].values == Scores.load(whole)["weight_angle"].values


def test_what_all_means() -> None:
    given = {"backbone": True, "data": True, "images": True}
    everything = [name for name in METRICS if name != "snr"]  # minutes, for a large model
    assert choose("all", **given) == everything
    assert {*choose("all", **given | {"backbone": False})} == {
        name for name in everything if "backbone" not in METRICS[name].needs
    }
    assert {*choose("all", **given | {"images": False})} == {
        name for name in everything if "images" not in METRICS[name].needs
    }
    assert choose("all", backbone=True, data=False, images=False) == [name for name in WEIGHTS if name != "snr"]
    assert choose("snr", backbone=False, data=False, images=False) == ["snr"]
    assert choose(" gradient, block_influence", **given) == ["block_influence", "gradient"]
    assert choose(["gradient", "block_influence"], **given) == ["block_influence", "gradient"]


@pytest.mark.parametrize(
    ("metrics", "lacking", "words"),
    [
        ("block_influense", (), "no score 'block_influense'; nearest: block_influence"),
        ("focus", (), "no score 'focus'; there are: block_influence, "),
        ("weight_angle", ("backbone",), "weight_angle needs the language model before visual training: --backbone"),
        ("revert_perplexity", ("backbone",), "revert_perplexity needs the language model"),
        ("gradient", ("data", "images"), "gradient needs records to be measured on: --data"),
        ("image_attention", ("images",), "image_attention needs images, and none of the records has one"),
        (",", (), "no score is named"),
        ("all", ("backbone", "data", "images"), "nothing can be measured"),
    ],
)
def test_a_score_that_is_not_available(metrics: str, lacking: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        choose(metrics, **{given: given not in lacking for given in ("backbone", "data", "images")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupt_keeps_what_was_measured(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: int,
) -> None:
    add, seen = Causal.add, []

    def stopped(self: Causal, batch: Any) -> None:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(batch)
        add(self, batch)

    monkeypatch.setattr(Causal, "add", stopped)
    out = tmp_path / "run"
    words = ["score", str(model), "--data", str(data), "--out", str(out), "--batch", "3", "--device", "cpu"]
    assert main([*words, "--metrics", "block_influence,bypass_perplexity,gradient"]) == 130
    assert "marked as partial" in capsys.readouterr().err
    found = Scores.load(out)
    assert found.partial
    # One batch of 3 of the score that was stopped, if any; all 8 records of the one before.
    assert {name: one.n for name, one in found.scores.items()} == (
        {"block_influence": 8, "bypass_perplexity": 3} if after else {"block_influence": 8}
    )
    assert Run.open(out).info["status"] == "interrupted"


def test_the_draw_is_that_of_the_seed(data: Path) -> None:
    def ids(**options: Any) -> list[str]:
        return [record.id for record in Sampling(**options).draw(striate.data.read(data)).records]

    assert ids(samples=3) == ids(samples=3) == sorted(ids(samples=3))
    assert len({tuple(ids(samples=3, seed=seed)) for seed in range(5)}) > 1
    assert ids(samples=99) == [str(number) for number in range(8)]


def test_batches_have_every_record_once_the_longest_first(model: Path, data: Path) -> None:
    vlm = striate.load(model, device="cpu")
    sampling = Sampling(batch=3)
    sample = sampling.draw(striate.data.read(data))
    batches = list(sampling.batches(vlm, sample))
    assert sorted(name for batch in batches for name in batch.ids) == [record.id for record in sample.records]
    assert len(batches) == sampling.num_batches(sample) == 3
    assert batches[0].labels.shape[1] == max(batch.labels.shape[1] for batch in batches)


def test_answers_of_evaluation_records_and_plain_text_count(model: Path, text: Path) -> None:
    vlm, sampling = striate.load(model, device="cpu"), Sampling(batch=4)
    (batch,) = sampling.batches(vlm, sampling.draw(striate.data.read(text)))
    answers = [vlm.tokenizer.decode(row[row >= 0]) for row in batch.labels]
    assert sorted(answers) == [
        "no </s>", "the cat sees a red car", "what is this ? a red blue green cat", "yes </s>",
    ]  # fmt: skip


def test_long_text_is_cut(model: Path, text: Path) -> None:
    vlm, sampling = striate.load(model, device="cpu"), Sampling(batch=4, max_length=8, on_bad_record="skip")
    (batch,) = sampling.batches(vlm, sampling.draw(striate.data.read(text)))
    assert batch.labels.shape[1] == 8


def test_bad_records_stop_or_are_listed(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    (tmp_path / "3.png").write_text("not an image")
    skip = replace(CPU, on_bad_record="skip")
    with pytest.raises(UserError, match=r"train\.json:4"):
        measured(model, data, tmp_path / "stop", metrics="block_influence")
    found = measured(model, data, tmp_path / "skip", metrics="block_influence,gradient", options=skip)
    assert found["block_influence"].n == found["gradient"].n == 7
    assert [one["source"] for one in Run.open(tmp_path / "skip").skipped()] == ["train.json:4"]
    for name in range(8):
        (tmp_path / f"{name}.png").write_text("not an image")
    with pytest.raises(UserError, match="none of the 8 records can be used"):
        measured(model, data, tmp_path / "none", metrics="block_influence", options=skip)


def test_records_without_an_answer_are_listed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path), tmp_path / "run"
    rows = json.loads(data.read_text())
    for row in rows[2:4]:
        del row["conversations"][1]
    data.write_text(json.dumps(rows))
    words = ["score", str(model), "--data", str(data), "--metrics", "block_influence", "--device", "cpu"]
    assert main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"2 records left out, listed in {out}/skipped.jsonl"
    assert Run.open(out).skipped() == [{"source": f"train.json:{n}", "reason": "has no answer"} for n in (3, 4)]
    assert Scores.load(out)["block_influence"].n == 6


def test_records_without_answers(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "asked.json"
    data.write_text(json.dumps([{"messages": [{"role": "user", "content": "what is this ?"}]}]))
    with pytest.raises(UserError, match=r"none of the 1 records has an answer to measure layers on"):
        score(model, data=data, out=tmp_path / "run")
    with pytest.raises(UserError, match="--samples 0: at least 1"):
        ReadOptions(samples=0)
    assert not (tmp_path / "run").exists()


def test_reverting_layers(model: Path, backbone: Path, data: Path, text: Path, tmp_path: Path) -> None:
    run = revert(
        model, backbone=str(backbone), groups=["0-1,3", "all"], visual=data, text=text, out=tmp_path / "run",
        options=CPU,
    )  # fmt: skip
    found = (run.results or {})["reverted"]
    assert list(found) == ["visual", "text"]
    for one in found.values():
        assert list(one["groups"]) == ["0-1", "3", "all"]
        assert one["groups"]["3"]["value"] == pytest.approx(one["tuned"]["value"])  # that layer was not moved
        assert one["groups"]["all"]["value"] == pytest.approx(one["backbone"]["value"])
        assert one["groups"]["0-1"]["value"] != pytest.approx(one["tuned"]["value"])
    assert (found["visual"]["tuned"]["n"], found["text"]["tuned"]["n"]) == (8, 4)
    assert sorted(file.name for file in run.figures.iterdir()) == ["reverted.pdf", "reverted.png", "reverted.svg"]
    page = report([run.path], out=tmp_path / "report.html").read_text("utf-8")
    assert "layers reverted only" in page
    assert "Layers reverted: run" in page


def test_reverting_what_is_not_there(model: Path, backbone: Path, data: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backbone": str(backbone), "out": tmp_path / "run", "options": CPU}
    with pytest.raises(UserError, match="--visual or --text is required"):
        revert(model, groups="each", **options)
    with pytest.raises(UserError, match=r"none of the 4 records of .*text\.json has an image"):
        revert(model, groups="each", visual=text, **options)
    with pytest.raises(UserError, match="layer 7 does not exist"):
        revert(model, groups="5-7", visual=data, **options)
    assert not (tmp_path / "run").exists()


def test_one_sample_has_no_standard_error(model: Path, backbone: Path, data: Path, tmp_path: Path) -> None:
    words = ["revert", str(model), "--backbone", str(backbone), "--groups", "sliding:3", "--visual", str(data)]
    assert main([*words, "--out", str(tmp_path / "run"), "--samples", "1", "--device", "cpu"]) == 0
    text = (tmp_path / "run" / "results.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["reverted"]["visual"]["groups"]["0-2"]["stderr"] is None


def test_attention_maps_are_those_of_the_trace(model: Path, data: Path) -> None:
    vlm, sampling = striate.load(model, dtype="float32", device="cpu"), Sampling(samples=1)
    (batch,) = sampling.batches(vlm, sampling.draw(striate.data.read(data)))
    maps = attention_maps(vlm, batch)
    assert maps is not None
    assert maps.shape == (DEPTH, 4, 4)  # 16 image tokens
    given = torch.zeros(DEPTH)
    masks = token_kinds(batch)

    def see(layer: int, attention: Any) -> None:
        given[layer] = attention.by_query[masks["text"]].mean()

    with watch_attention(vlm, see, queries=masks["text"], keys=masks["image"]):
        forward(vlm, batch)
    torch.testing.assert_close(maps.sum((1, 2)), given)


def test_no_map_without_one_plain_image(model: Path, data: Path, text: Path) -> None:
    vlm = striate.load(model, device="cpu")
    assert attention_overlay(vlm, Sampling().draw(striate.data.read(text)).records) is None
    assert attention_overlay(vlm, Sampling().draw(striate.data.read(data)).records) is not None
    image = Image.new("RGB", (32, 32))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    (batch,) = Sampling().batches(vlm, RecordSample([striate.data.Record("0", tuple(turns), (image, image))]))
    assert attention_maps(vlm, batch) is None


def test_the_guide_to_a_new_score_is_true() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "add_a_score.md").read_text()
    formula, _, test = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names = {**vars(states), "pytest": pytest}
    exec(formula, names)
    exec(test, names)
    names["test_modality_gap_by_hand"]()
    entry = re.search(r'Metric\("modality_gap".*\)', guide)
    assert entry
    assert eval(entry[0], names).name == "modality_gap"
    for module, wanted in [
        (states, "METRICS _by_sample"),
        (causal, "KINDS Causal"),
        (weights, "FORMULAS"),
        (metrics, "MEASURES"),
    ]:
        for name in wanted.split():
            assert hasattr(module, name)
            assert name in guide


@pytest.mark.parametrize("depth", [1, 4, 12, 32, 40, 80])
def test_strips_fit_into_80_columns(depth: int) -> None:
    values = tuple(float(layer % 7) for layer in range(depth - 1))
    one = Score("multimodal_block_influence", (*values, math.nan), direction="low")
    lines = shown(heat_strips(Scores("m", depth, 1, {one.name: one, "flat": Score("flat", (0.5,) * depth)})))
    assert max(map(len, lines)) <= 80
    assert len(lines) == 5
    assert len(lines[1]) == depth * min(4, 80 // depth)
    assert lines[1].endswith("·")
    if depth == 32:
        assert lines[0] == "multimodal_block_influence  0 to 6, low is important  top: 0 7 14 21 28"
        assert lines[1].startswith("▁▁▂▂▃▃")
        assert lines[4].split() == [str(layer) for layer in range(0, 32, 4)]


def test_a_table_of_reversions_says_which_way() -> None:
    found = RevertProfile({"8-15": Estimate(5.0, 0.2), "0": Estimate(3.0)}, Estimate(4.0, 0.1), Estimate(6.0, 0.1))
    lines = [line.split() for line in shown(reversions({"visual": found, "text": found}))]
    assert lines[1] == ["none", *("4±0.1", "0", "▼", "-2") * 2]
    assert lines[2] == ["8-15", *("5±0.2", "▲", "+1", "▼", "-1") * 2]
    assert lines[3] == ["0", *("3", "▼", "-1", "▼", "-3") * 2]
    assert lines[4] == ["all", *("6±0.1", "▲", "+2", "0") * 2]

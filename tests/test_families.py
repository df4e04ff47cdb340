"""The whole path, family by family, on pico models; and docs/families.md, which says what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from test_evaluate import in_family
from test_train import write_data
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from striate.data import Batch, Examples, collate, read
from striate.score import measure
from striate.train import TrainOptions, tune
from striate.vlm import Vlm, first_line, load, sketch

OPTIONS = TrainOptions(
    batch=4, micro_batch=2, steps=2, learning_rate=1e-2, projector_learning_rate=1e-2, dtype="float32", device="cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_data(tmp_path_factory.mktemp("data"))
    # Ovis' indicators are words of the pico tokenizer: they stand before pictures alone.
    path.write_text(path.read_text().replace("what is this ?", "see this ?"))
    return path


def family(name: str) -> tuple[PreTrainedModel, Any]:
    """A pico model of the type, and what reads records for it."""
    if name in families.OWN:
        vlm = in_family(name)
        return vlm.model, vlm.processor
    return pico.pico_more(name), pico.pico_reader(name)


def batch_of(vlm: Vlm, data: Path) -> Batch:
    examples = Examples(read(data).records[:2], vlm.processor)
    torch.manual_seed(3)  # a `PicoReader` draws its pictures
    return collate([examples[0], examples[1]], pad_id=vlm.pad_token_id)


def reloaded(vlm: Vlm, tuned: Vlm, data: Path) -> None:
    """The checkpoint gives the logits that the model in memory gives."""
    batch = batch_of(vlm, data)
    with torch.no_grad():
        saved, kept = (one.model.eval()(**batch.inputs).logits for one in (vlm, tuned))
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)


def scored(vlm: Vlm, tuned: Vlm, data: Path) -> None:
    (found,) = measure(vlm, ["block_influence"], lambda _: (batch_of(vlm, data) for _ in range(1)))
    assert len(found[0].values) == vlm.depth
    assert all(0 < value <= 2 for value in found[0].values)


def steps(source: Path, data: Path, folder: Path, tuned: list[Vlm]) -> dict[str, str]:
    """What came of each step: `yes`, or what was said. `tuned` gets the models in memory as `tune` has left them."""
    said: dict[str, str] = {}
    for step, method in {"tune full": "full", "tune LoRA": "lora"}.items():
        try:
            run = tune(source, data=data, out=folder / method, region="1,3", method=method, rank=4, options=OPTIONS)
            said[step] = "yes"
            for check, does in {"reload": reloaded, "score": scored}.items():
                does(load(run.path, dtype="float32"), tuned[-1], data)
                said[check] = "yes"
        except Exception as error:  # whatever a family trips over
            said |= {one: f"no: {first_line(error)}" for one in (step, "reload", "score") if one not in said}
    return said


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", [*sorted({*families.OWN} - {*families.ALIKE}), *families.READ])
def test_the_whole_path_of_a_family(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = family(name)
    tuned: list[Vlm] = []

    def kept(*args: Any, **settings: Any) -> Vlm:
        tuned.append(load(*args, **settings))
        return tuned[-1]

    monkeypatch.setattr("striate.vlm.load_processor", lambda _: reader)
    monkeypatch.setattr("striate.train.load", kept)
    monkeypatch.setattr(ProcessorMixin, "save_pretrained", lambda *_: None)  # stand-ins for video cannot be saved
    model.save_pretrained(tmp_path / "model")
    assert sketch(tmp_path / "model").parts == Vlm.of(model).parts
    said = steps(tmp_path / "model", data, tmp_path, tuned)
    expected = families.CANNOT.get(name, {})
    for step in families.STEPS:
        assert said.get(step, "no").startswith(expected.get(step, "yes")), said


def test_the_page_is_what_the_script_writes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == families.page(), "python scripts/families.py writes it anew"

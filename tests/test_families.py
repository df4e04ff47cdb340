"""The whole path, family by family, on pico models; and docs/families.md, which lists the results."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from asking import in_family
from training import write_data
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from striate.data import Batch, Examples, collate, read
from striate.errors import first_line
from striate.roundtrip import verify
from striate.runs.training import tune
from striate.scores import measure
from striate.train import TrainOptions
from striate.vlm import Vlm, load, load_on_meta

OPTIONS = TrainOptions(
    batch=4, micro_batch=2, steps=2, learning_rate=1e-2, projector_learning_rate=1e-2, dtype="float32", device="cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_data(tmp_path_factory.mktemp("data"))
    # Ovis' indicators are words of the pico tokenizer: they stand only before images.
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
    torch.manual_seed(3)  # a `PicoReader` samples its images
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
    """The result of each step: `yes`, or the error. `tuned` gets the models in memory as `tune` has left them."""
    results: dict[str, str] = {}
    for step, method in {"tune full": "full", "tune LoRA": "lora"}.items():
        try:
            run = tune(source, data=data, out=folder / method, region="1,3", method=method, rank=4, options=OPTIONS)
            results[step] = "yes"
            for check, does in {"reload": reloaded, "score": scored}.items():
                does(load(run.path, dtype="float32"), tuned[-1], data)
                results[check] = "yes"
        except Exception as error:  # each family fails in its own way
            results |= {one: f"no: {first_line(error)}" for one in (step, "reload", "score") if one not in results}
    return results


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", [*sorted({*families.OWN} - {*families.ALIKE}), *families.READ])
def test_the_whole_path_of_a_family(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = family(name)
    tuned: list[Vlm] = []

    def kept(vlm: Vlm, *args: Any, **settings: Any) -> str:
        tuned.append(replace(vlm, model=deepcopy(vlm.model)))  # the comparison uses the model up
        return verify(vlm, *args, **settings)

    monkeypatch.setattr("striate.vlm.load_processor", lambda _: reader)
    monkeypatch.setattr("striate.runs.training.verify", kept)
    monkeypatch.setattr(ProcessorMixin, "save_pretrained", lambda *_: None)  # placeholders for video cannot be saved
    model.save_pretrained(tmp_path / "model")
    assert load_on_meta(tmp_path / "model").parts == Vlm.of(model).parts
    results = steps(tmp_path / "model", data, tmp_path, tuned)
    assert results == dict.fromkeys(families.STEPS, "yes")


def test_the_page_is_what_the_script_writes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == families.page(), "python scripts/families.py writes it anew"

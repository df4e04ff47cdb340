"""The examples run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pico import pico_llava
from safetensors import safe_open
from training import write_data

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("default")  # TRL's own
def test_a_trainer_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_trainer

    model = pico_llava(tmp_path / "llava")
    own_trainer.train(model, write_data(tmp_path), tmp_path / "out", region="1,3", steps=2)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as saved:
        names = list(saved.keys())
        assert saved.get_tensor(next(name for name in names if "lora_B" in name)).abs().sum() > 0
    parts = {name.split("language_model.")[-1].split(".")[1] for name in names if ".layers." in name}
    assert parts == {"1", "3"}
    assert any("multi_modal_projector" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    sys.modules.pop("own_trainer")

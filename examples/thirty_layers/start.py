"""The start of the study: a tower and a projector that speak SmolLM2's words, and SmolLM2-135M-Instruct untouched.

    python examples/thirty_layers/start.py --llm SMOLLM2.gguf       # makes the folder start/ anew, in minutes

From the demo's tower, tower and projector learn to say one word a patch: its output is the input embedding of that
word, so that the rows of a place read like text ("top left dog", "dog on red", "top left dog") and the first layer has
nothing to unpack. This is no captioning, and is called what it is; the language model takes no part in it but for its
table of embeddings.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionModel
from world import scene_of

from striate.runs.run import Run
from striate.studies.assemble import assemble
from striate.studies.assemble.parts import language_model
from striate.studies.demo import MODELS
from striate.studies.demo.scene import CHARACTERS, GRID, GROUNDS, WORDS, Scene

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo_models"))
from lessons import random_text
from projector import Projector, whiten
from schedule import cosine
from tower import labels_of, pixels_of

START = Path(__file__).parent / "start"
PROJECTOR = "projector.safetensors"
VOCABULARY = ("nothing", "sign", "top", "bottom", "left", "right", "on", *WORDS, *GROUNDS, *CHARACTERS)
DEVIATION = 0.128  # of SmolLM2's embeddings of these words, for which the rates below are; Gemma's are 1.09
# SmolLM2's template says in every chat that it is SmolLM: 25 tokens, a fifth of a record.
SYSTEM = re.compile(r"\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}.*?\{% endif %\}", re.DOTALL)


def start(llm: str, out: Path, *, parts: Path = START) -> Run:
    """Put the start together from its `parts`, tower and projector: what every cell of the study is tuned from."""
    run = assemble(
        vision=str(parts / "tower"), llm=llm, feature_layer=-1, projector=parts / PROJECTOR, out=out, dtype="bfloat16"
    )  # fmt: skip
    template = run.checkpoint / "chat_template.jinja"
    template.write_text(SYSTEM.sub("", template.read_text(encoding="utf-8")), encoding="utf-8")
    return run


def words_of(labels: dict[str, Tensor]) -> Tensor:
    """The word that each patch is to say (scene, patch), as an index into `VOCABULARY`.

    Of the three rows of a place the first and the last say "top left dog", the middle one "dog on red"; a row with a
    sign says the sign's characters, and "sign" beside them.
    """
    nothing, sign, top, _, left, _, on = range(7)
    kinds = len(VOCABULARY) - len(WORDS) - len(GROUNDS) - len(CHARACTERS)
    grounds = kinds + len(WORDS)
    characters = grounds + len(GROUNDS)
    kind = torch.where(labels["kind"] > 0, kinds + labels["kind"] - 1, nothing)
    ground = grounds + labels["ground"]
    character = torch.where(labels["character"] > 0, characters + labels["character"] - 1, sign)
    rows, columns = torch.arange(GRID).repeat_interleave(GRID), torch.arange(GRID).repeat(GRID)
    half = GRID // 2
    row, column = rows % half, columns % half
    outer = torch.where(column == 0, top + rows // half, torch.where(column == 1, left + columns // half, kind))
    middle = torch.where(column == 0, kind, torch.where(column == 1, on, ground))
    said = torch.where(row == 1, middle, outer)
    signed = (labels["character"] > 0).view(-1, GRID, GRID).any(-1).repeat_interleave(GRID, dim=1)
    return torch.where(signed, character, said)


def make(llm: str, out: Path, *, steps: int, seed: int = 0) -> None:
    """Make tower and projector, and keep them in `out`."""
    torch.manual_seed(seed)
    rng = Random(f"thirty start {seed}")
    model, tokenizer = language_model(llm)
    tokens = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in VOCABULARY]
    embed = model.get_input_embeddings()  # called, not read: Gemma scales what it looks up
    with torch.no_grad():
        table = torch.stack([embed(torch.tensor(ids)).sum(0) for ids in tokens])
    tower = SiglipVisionModel.from_pretrained(MODELS / "tower", dtype=torch.float32, attn_implementation="eager")
    projector = Projector(tower.config.hidden_size, table.shape[1])
    scale = table.std() / DEVIATION
    with torch.no_grad():
        whiten(projector.linear_1, features_of(tower, scenes(rng, 256)).flatten(0, 1))
    fit(tower, projector, table / scale, steps=steps, rng=rng)
    with torch.no_grad():
        for parameter in projector.linear_2.parameters():
            parameter *= scale
    tower.to(torch.bfloat16).save_pretrained(out / "tower")
    shutil.copy(MODELS / "tower" / "preprocessor_config.json", out / "tower")
    state = {name: value.to(torch.bfloat16) for name, value in projector.state_dict().items()}
    save_file(state, out / PROJECTOR)


def fit(
    tower: SiglipVisionModel, projector: Projector, table: Tensor, *, steps: int, rng: Random, batch: int = 64
) -> None:
    """Train both to say words: squared error in units of the words' variance, and cross-entropy among all words."""
    parts = [{"params": [*tower.parameters()], "peak": 3e-4}, {"params": [*projector.parameters()], "peak": 1.5e-3}]
    optimizer = torch.optim.AdamW(parts, lr=0.0, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(step, steps)
        shown = scenes(rng, batch)
        with torch.autocast("cpu", torch.bfloat16):
            said = projector(features_of(tower, shown))
        said, words = said.float().flatten(0, 1), words_of(labels_of(shown)).flatten()
        distances = torch.cdist(said, table).square()
        error = (said - table[words]).square().mean() / table.var()
        loss = error + torch.nn.functional.cross_entropy(-distances, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = (distances.argmin(-1) == words).float().mean()
            print(f"step {step} of {steps}: squared error {error:.3f}, {right:.1%} of the words right", flush=True)


def scenes(rng: Random, number: int) -> list[Scene]:
    """Training scenes; what their signs say means nothing, so that letters are learnt and no words."""
    return [scene_of(rng, "train", signs=(random_text(rng),)) for _ in range(number)]


def features_of(tower: SiglipVisionModel, shown: list[Scene]) -> Tensor:
    """Patch features (scene, patch, D) as Llava takes them: of the last layer, before its norm."""
    hidden: Tensor = tower(pixels_of(shown), output_hidden_states=True).hidden_states[-1]
    return hidden


def main() -> None:
    """Make the start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", required=True, help="SmolLM2-135M-Instruct: a .gguf file, a folder or the hub id")
    parser.add_argument("--out", type=Path, default=START)
    parser.add_argument("--steps", type=int, default=600, help="of 64 pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make(options.llm, options.out, steps=options.steps)


if __name__ == "__main__":
    main()

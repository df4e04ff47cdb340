"""What only the making of the demo's models needs: labels of patches, signs that mean nothing, scenes in words."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from striate.studies.demo.scene import CHARACTERS, GRID, GROUNDS, NUMBERS, PLACES, WORDS, Scene

_KIND_INDEX = {word: index for index, word in enumerate(WORDS)}
_GROUND_INDEX = {ground: index for index, ground in enumerate(GROUNDS)}


@dataclass(frozen=True)
class PatchLabels:
    """What each of the 36 patches of an image shows, in raster order; every array is int64 of shape (36,).

    `kind`: 0 nothing, else 1 + index into WORDS; `character`: 0 none, else 1 + index into CHARACTERS;
    `ground`: index into GROUNDS; `place`: index into PLACES.
    """

    kind: np.ndarray
    character: np.ndarray
    ground: np.ndarray
    place: np.ndarray


def label_patches(scene: Scene) -> PatchLabels:
    """What the tower and the projector learn from; all nine patches of a place show its thing."""
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    place = 2 * (rows // (GRID // 2)) + columns // (GRID // 2)
    kinds = np.array([1 + _KIND_INDEX[word] if word else 0 for word in scene.things])
    grounds = np.array([_GROUND_INDEX[ground] for ground in scene.grounds])
    character = np.zeros(GRID * GRID, dtype=np.int64)
    start = GRID * (1 + GRID // 2 * scene.sign_row) + scene.sign_column
    for index, letter in enumerate(scene.sign, start):
        character[index] = 1 + CHARACTERS.index(letter)
    return PatchLabels(kinds[place], character, grounds[place], place)


def random_text(rng: Random) -> str:
    """A sign's text that means nothing: 3-5 letters, or a number. It teaches characters and no words."""
    if rng.random() < 0.25:
        return rng.choice(NUMBERS)
    return "".join(rng.choices(CHARACTERS[:26], k=rng.randint(3, 5)))


def belongings(rng: Random, questions: int) -> tuple[str, list[tuple[str, str]]]:
    """A list of who has what, and questions about it in both directions: looking up, and nothing else."""
    number = rng.randint(2, 8)
    words = rng.sample(WORDS, 2 * number)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    asked = []
    for _ in range(questions):
        owner, thing = rng.choice(pairs)
        asked.append((f"what has {owner} ?", thing) if rng.random() < 0.5 else (f"who has {thing} ?", owner))
    return " ".join(f"{owner} has {thing} ." for owner, thing in pairs), asked


def describe(scene: Scene, rng: Random) -> str:
    """The scene in words, one short sentence per place, in random order."""
    things = zip(PLACES, scene.grounds, scene.things, strict=True)
    sentences = [f"{place} {ground} {word or 'nothing'} ." for place, ground, word in things]
    if scene.sign:
        sentences.append(f"the sign says {scene.sign} .")
    rng.shuffle(sentences)
    return " ".join(sentences)

"""What a run was made by: the options and the content that decide its result, the seed left out; what else differs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.region import PAPER, Region
from striate.runs.run import INFO, Run

# Options that change where or how fast a run goes, not its result.
ASIDE = ("seed", "out", "progress", "device", "workers", "save_steps", "report_to", "dry_run")
# Options that name files or folders: models and runs, and records with their images.
LOADED = ("model", "backbone", "scores", "vision", "llm", "projector")
GENERATED = ("data", "images", "heal", "visual", "text")
FILES = (*LOADED, *GENERATED)
DEFAULTS = {"modules": "all"}  # of options that older runs do not have
DEEP = 8  # parents of parents that are followed
BLOCKS = ("uniform", "first", "last", "middle", "hybrid")


# Notes by the first word of the digests in run.json.
MADE_FROM = {
    "data": "trained on different records from",
    "model": "from a different model than",
    "code": "by different code than",
}


def treatment(name: str, info: Mapping[str, Any], region: Region | None, *, deep: int = DEEP) -> str:
    """A key that is equal only for runs that differ in nothing but the seed: options and the content of their files."""
    options = settings(info, deep=deep)
    pruned = "prune" in info or info.get("verb") == "prune"
    if region is not None and not pruned:
        options["region"] = f"random {len(region)}" if kind(region) == "random" else str(region)
    # A run without options is in an arm of its own.
    alone = name if not options else ""
    parent = None if "model" in options else origin_of("model", info.get("parent"), info, deep)
    return json.dumps([info.get("verb"), options, parent, alone], sort_keys=True, default=str)


def settings(info: Mapping[str, Any], *, deep: int = DEEP) -> dict[str, Any]:
    """The options that decide the result, each path replaced by the content of its file or folder."""
    given = info.get("options") or {}
    return {
        key: origin_of(key, value, info, deep) if key in FILES else value
        for key, value in given.items()
        if key not in ASIDE and value != DEFAULTS.get(key)
    }


def origin_of(key: str, value: Any, info: Mapping[str, Any], deep: int) -> Any:
    """The content behind an option: the treatment of a run, else digests of the files, else the name.

    A run may have been made from the seed of the one that starts from it. So may data that a program generates, whose
    runs say under "generated" what it is but for the seed.
    """
    if key in GENERATED and (generated := info.get("generated")):
        return generated
    if deep and key in LOADED and value and (Path(str(value)) / INFO).is_file():
        with suppress(UserError):
            run = Run(Path(str(value)))
            seed = run.info.get("seed")
            return [
                treatment("", run.info, run.region, deep=deep - 1),
                "own seed" if seed == info.get("seed") else seed,
            ]
    content = info.get("content") or {}
    return {name: digest for name, digest in content.items() if name.split(" ")[0] == key} or value


def kind(region: Region) -> str:
    """How the layers of a region were chosen: "uniform", "last", "top by gradient", ... or "listed"."""
    if len(region) in (0, region.depth):
        return str(region)
    form, _, rest = region.origin.partition(":")
    if form in ("top", "bottom", "spread") and rest:
        return f"{form} by {_score_name(rest)}"
    if region.origin in PAPER:
        return region.origin
    if form in (*BLOCKS, "random"):
        _, _, shift = rest.partition("@")
        return f"{form}@{shift}" if shift.strip("0") and form == "uniform" else form
    for block in BLOCKS:
        if _same(region, f"{block}:{len(region)}"):
            return block
    shifted = (offset for offset in range(1, region.depth) if _same(region, f"uniform:{len(region)}@{offset}"))
    offset = next(shifted, None)
    return f"uniform@{offset}" if offset is not None else "listed"


def _score_name(place: str) -> str:
    """The score, and the tasks, in 8@runs/scores:NAME and 8@runs/scores:NAME:TASKS."""
    _, *names = place.split(":")[-3:]
    score, *tasks = names if len(names) == 2 and re.fullmatch(r"[a-z_]+", names[0]) else names[-1:]
    return f"{score}, {tasks[0]}" if tasks else score


def _same(region: Region, form: str) -> bool:
    try:
        return Region.parse(form, region.depth) == region
    except UserError:
        return False


def without_seed(path: Any, seed: Any) -> Any:
    """A name without its run's seed: after the word "seed", or, without that word, where the number stands alone."""
    if not isinstance(path, str) or not isinstance(seed, int):
        return path
    end = rf"{seed}(?![^\W_]|\.\d)"
    named, times = re.subn(rf"(?<=seed)([-_=]?){end}", r"\1#", path)
    return named if times else re.sub(rf"(?<![^\W_])(?<!\.){end}", "#", path)


def unlike(info: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Iterator[str]:
    """How two trainings differ by more than their options, from their run.json; `name` is the other run's name."""
    own, others = info.get("content"), other.get("content")
    if not own or not others:
        return
    for word, note in MADE_FROM.items():
        if _of(own, word) != _of(others, word):
            yield f"{note} {name}"
    before = other.get("versions", {})
    for package, version in info.get("versions", {}).items():
        if package != "striate" and before.get(package, version) != version:  # its code has a digest
            yield f"{package} {version}, {name} with {before[package]}"


def _of(content: Mapping[str, str], word: str) -> dict[str, str]:
    return {key: value for key, value in content.items() if key.split(" ")[0] == word}

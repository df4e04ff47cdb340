"""The sweep file: read and validated before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from striate.errors import UserError, nearest
from striate.evaluation import harness
from striate.runs.evaluating import evaluate
from striate.runs.options import Option, kind_of, options_of
from striate.runs.pruning import prune
from striate.runs.training import tune

Values = dict[str, Any]

KEYS = {"model": True, "data": True, "images": False, "eval": True, "out": True, "tune": False, "prune": False,
        "grid": True}  # fmt: skip
# The verbs, and the options of each that the sweep sets itself.
VERBS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "tune": (tune, ("model", "data", "images", "out", "resume")),
    "eval": (evaluate, ("model", "out")),
    "prune": (prune, ("model", "out", "dry_run")),
}
# Options whose value may be a data set of the hub.
READ = ("data", "heal")


@dataclass(frozen=True)
class Sheet:
    """A validated sweep file.

    `tune`, `eval` and `prune` hold the options that it sets, by name; `prune` is None where nothing is pruned. `axes`
    are the options of tune that vary, `cuts` those of prune, each with its values.
    """

    file: Path
    model: str
    data: str
    out: Path
    images: Path | None = None
    tune: Values = field(default_factory=dict)
    eval: Values = field(default_factory=dict)
    prune: Values | None = None
    axes: Mapping[str, list[Any]] = field(default_factory=dict)
    cuts: Mapping[str, list[Any]] = field(default_factory=dict)


def read_sheet(file: Path) -> Sheet:
    """Read a sweep file.

    Raises:
        UserError: the file cannot be read, or has an unknown key, option or a value of the wrong type.
    """
    found = _yaml(file)
    with at(file):
        for key in found:
            if key not in KEYS:
                raise UserError(f"unknown key {nearest(str(key), KEYS)}")
        if missing := [key for key, required in KEYS.items() if required and found.get(key) is None]:
            raise UserError(f"{missing[0]} is missing")
        images = _path(found.get("images"), "images")
        if images is not None and not images.is_dir():
            raise UserError(f"images: no such folder: {images}")
        sections = {name: _section(name, {} if found.get(name) is None else found[name]) for name in VERBS}
        axes, cuts = _grid(found["grid"], sections)
        _check_eval(sections["eval"])
        model, data, out = (_text(found[key], key) for key in ("model", "data", "out"))
        pruned = sections["prune"] if cuts or "prune" in found else None
        return Sheet(
            file, model, data, Path(out), images, sections["tune"], sections["eval"], pruned, axes, cuts
        )  # fmt: skip


@contextmanager
def at(place: str | Path) -> Iterator[None]:
    """Prefix errors with the place in the sweep file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}", see=error.see) from None


def _yaml(file: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected keys and values: {', '.join(KEYS)}")
    return found


def _section(name: str, found: Any) -> Values:
    """The options that a section sets, parsed to their types."""
    if not isinstance(found, dict):
        raise UserError(f"{name}: expected options and values, found {found!r}")
    options = _options(name)
    return {key: value_of(_find_option(name, key, options), value, f"{name}.{key}") for key, value in found.items()}


def _grid(found: Any, sections: Mapping[str, Values]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The options of tune and of prune that vary."""
    if not isinstance(found, dict) or not found:
        raise UserError("grid: expected options that vary, each with a list of values: {region: [all, 'uniform:25%']}")
    axes: dict[str, dict[str, list[Any]]] = {"tune": {}, "prune": {}}
    for key, values in found.items():
        section, _, name = key.rpartition(".") if isinstance(key, str) else ("", "", key)
        verb = section or "tune"
        if verb not in axes:
            raise UserError(f"grid.{key}: only options of tune (region) and of prune (prune.remove) can vary")
        option = _find_option(verb, name, _options(verb))
        if name in sections[verb]:
            raise UserError(f"grid.{key} is set under {verb} as well: leave one of them")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key}: expected a list of values, found {values!r}")
        parsed = [value_of(option, value, f"grid.{key}") for value in values]
        if twice := [value for value in parsed if parsed.count(value) > 1]:
            raise UserError(f"grid.{key}: {twice[0]} is given twice")
        axes[verb][name] = parsed
    return axes["tune"], axes["prune"]


def _options(verb: str) -> dict[str, Option]:
    return {option.name: option for option in options_of(VERBS[verb][0])}


def _find_option(verb: str, name: Any, options: Mapping[str, Option]) -> Option:
    own = VERBS[verb][1]
    if name in own:
        raise UserError(f"{verb}.{name} is not for a section or the grid: the sweep sets it for every run")
    if name not in options:
        raise UserError(f"{verb} has no option {nearest(str(name), [name for name in options if name not in own])}")
    return options[name]


def _check_eval(section: Values) -> None:
    """Raise `UserError` for an evaluation without data or tasks, or for unknown tasks."""
    if section.get("data"):
        return
    if not section.get("tasks"):
        raise UserError("eval.data is missing: records with answers; or a harness's tasks under eval.tasks (lm:NAME)")
    with at("eval.tasks"):
        harness.tasks(section["tasks"])


def value_of(option: Option, value: Any, key: str) -> Any:
    """Parse a value of a sweep file as the command line does.

    Raises:
        UserError: the type is wrong; the message names the key.
    """
    if value is None and not option.required:
        return option.default
    if option.several:
        listed = [_text(one, key) for one in (value if isinstance(value, list) else [value])]
        for path in listed if option.name == "data" else ():
            _check_path(Path(path), option, key)
        return listed
    if isinstance(value, list):
        raise UserError(f"{key}: one value was expected, found a list; what varies goes into grid")
    if option.hint is bool:
        if not isinstance(value, bool):
            raise UserError(f"{key}: {value!r} is not true or false")
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(option.flag, type=option.hint)
    try:
        found = parser.parse_args([f"{option.flag}={json.dumps(value) if isinstance(value, dict) else value}"])[
            option.name
        ]
    except ArgumentError:
        raise UserError(f"{key}: {value!r} is not {kind_of(option.hint)}") from None
    if isinstance(found, Path):
        _check_path(found, option, key)
    return found


def _check_path(path: Path, option: Option, key: str) -> None:
    hub = option.name in READ and not path.suffix and not path.is_absolute()
    if not path.exists() and not hub:
        raise UserError(f"{key}: no such file or folder: {path}")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{key}: text was expected, found {value!r}")
    return value


def _path(value: Any, key: str) -> Path | None:
    return None if value is None else Path(_text(value, key))

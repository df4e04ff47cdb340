"""The help of a verb: `--help` shows the options that most users need, `--help-all` all of them in groups."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser

from striate.runs.options import Option, options_of

SHORT = 10  # options of `--help`
# The options of `--help`; default: the first ones of the signature.
FIRST = {
    "align": "model data out images epochs batch micro_batch learning_rate resume device",
    "prune": "model out region remove by layers data images heal steps",
    "tune": "model data out images region method epochs batch micro_batch learning_rate",
}
# All options by group; options of a single verb, which are in no group, come first.
GROUPS = {
    "data": "model data images split samples max_length truncate_text on_bad_record",
    "region": "region route modules method projector tower rank alpha dropout",
    "optimization": "epochs steps batch learning_rate projector_learning_rate warmup schedule weight_decay "
    "max_grad_norm skip_nonfinite",
    "memory": "micro_batch optimizer packing checkpointing frozen_layers dtype attn",
    "run": "out resume save_steps seed deterministic device workers report_to",
    "distributed": "shard",
}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", dict: "MAPPING"}  # anything else is a path


def help_of(verb: str, function: Callable[..., Any], *, subject: str | None, everything: bool) -> str:
    """The help of a verb, wrapped to the width of the terminal."""
    options = {option.name: option for option in options_of(function)}
    usage = f"striate {verb}{f' {subject.upper()}' if subject else ''} [--OPTION VALUE ...]"
    text = docstring_parser.parse(inspect.getdoc(function) or "").description
    rest = len(options) - SHORT
    more = f"{rest} more options: striate {verb} --help-all" if rest > 0 and not everything else None
    parser = argparse.ArgumentParser(usage=usage, description=text, epilog=more, add_help=False)
    shown = groups_of(verb, list(options)) if everything else {"options": _first(verb, list(options))}
    for title, names in shown.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add(group, options[name])
    parser.add_argument_group("recipe").add_argument("--config", metavar="PATH", help="a YAML file with any options")
    return parser.format_help()


def metavar(hint: Any) -> str:
    """The values of a type, for a reader: `INT`, `PATH`, `auto|full|lora`."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        kinds = [one for one in get_args(hint) if one not in (type(None), bool) and "Sequence" not in str(one)]
        words = list(dict.fromkeys(map(metavar, kinds)))
        return "PATH" if words == ["TEXT", "PATH"] else "|".join(words)
    return METAVARS.get(get_origin(hint) or hint, "PATH")


def groups_of(verb: str, names: list[str]) -> dict[str, list[str]]:
    """All options of a verb by group; those in no group come first, under the verb's name."""
    groups = {title: [name for name in group.split() if name in names] for title, group in GROUPS.items()}
    grouped = {name for group in groups.values() for name in group}
    groups = {verb: [name for name in names if name not in grouped], **groups}
    return {title: group for title, group in groups.items() if group}


def _first(verb: str, names: list[str]) -> list[str]:
    return FIRST[verb].split() if verb in FIRST else names[:SHORT]


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option with its values, its description and its default, unless the description has it."""
    text = option.description if option.description.endswith("...") else option.description.rstrip(".")
    if option.required:
        text += "; required"
    elif option.default is not None and not option.switch and "default:" not in text.lower():
        text += f"; default: {option.default}"
    text = text.replace("%", "%%")
    if option.hint is bool:
        group.add_argument(option.flag, action="store_true", help=text)
        return
    values = metavar(option.hint) + " ..." * option.several
    group.add_argument(option.flag, metavar=f"[{values}]" if option.switch else values, help=text)

"""What mkdocs fills in: the options of a verb and the public names, read off the code, so that they never go stale.

`<!-- options -->` on the page of a verb becomes a list of its options; `<!-- api -->` the docstrings of
`striate.__all__`. Nothing else is generated.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import striate
from striate.runs.cli import VERBS
from striate.runs.options import Option, groups_of, options_of

OPTIONS, API = "<!-- options -->", "<!-- api -->"
KINDS = {Path: "PATH", str: "TEXT", int: "N", float: "X"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    name = PurePosixPath(page.file.src_uri)
    if str(name.parent) == "verbs":
        markdown = markdown.replace(OPTIONS, options(name.stem))
    return markdown.replace(API, api())


def options(verb: str) -> str:
    """The options of a verb in the groups of `--help-all`, each with its values and its default."""
    module, _, attribute = VERBS[verb][0].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    known = {option.name: option for option in options_of(function)}
    lines = ["## Options", ""]
    for title, names in groups_of(verb, list(known)).items():
        lines += [f"### {title[:1].upper()}{title[1:]}", ""]
        lines += [line for name in names for line in entry(known[name])]
    return "\n".join([*lines, *raises(function)])


def entry(option: Option) -> Iterator[str]:
    """One option as an item of a definition list."""
    kind = "" if option.hint is bool else f" {values(option.hint)}"
    if option.required:
        default = "required"
    elif option.default in (None, False, "", {}):
        default = ""
    else:
        default = f"default: {option.default}"
    yield f"`{option.flag}{kind}`" + (f" <span class=default>{default}</span>" if default else "")
    text = " ".join(option.description.split()).rstrip(".")
    yield f":   {text[:1].upper()}{text[1:]}."
    yield ""


def values(hint: Any) -> str:
    """What can be given for a type, as people read it: `auto|none|all`, `PATH`, `N`."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        known = dict.fromkeys(values(one) for one in get_args(hint) if one not in (NoneType, bool))
        return "|".join(known)
    if get_args(hint):
        return f"{values(get_args(hint)[0])} ..."
    return KINDS.get(hint, getattr(hint, "__name__", str(hint)).upper())


def raises(function: Callable[..., Any]) -> Iterator[str]:
    """What goes wrong, from the docstring."""
    _, _, text = (inspect.getdoc(function) or "").partition("Raises:")
    text = " ".join(text.split()).removeprefix("UserError: ")
    if text:
        yield from ("## Errors", "", f"{text[:1].upper()}{text[1:]} See [Errors](../errors.md).")


def api() -> str:
    """A block of mkdocstrings for each public name."""
    names = [getattr(striate, name) for name in striate.__all__]
    return "\n\n".join(f"::: {one.__module__}.{one.__qualname__}" for one in names)

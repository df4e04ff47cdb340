"""The options of a verb: the parameters of its function, and the fields of the option dataclasses among them.

`Annotated[TrainOptions, Only("steps batch")]`: of these fields two are options, the others keep their defaults.

The command line, its help and the sections of a sweep file are built from these. The signature is read from the
source of a verb: its module imports torch and transformers, which takes seconds, and help and wrong options need
neither.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import Namespace

import striate
from striate.errors import flag

# The command line always shows progress, the library only on request.
ALWAYS = {"progress": True}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Only:
    """The fields of an option dataclass, separated by spaces, that a verb has as options."""

    names: str


@dataclass(frozen=True)
class Option:
    """One option. `default` is `inspect.Parameter.empty` where a value is required."""

    name: str
    hint: Any
    default: Any
    description: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def several(self) -> bool:
        """Whether it takes more than one word: `--data a.json b.json`."""
        return "Sequence" in str(self.hint)

    @property
    def switch(self) -> bool:
        """Whether the flag alone is enough: `--resume`, even if it also accepts a word, `--resume auto`."""
        return self.hint is bool or bool in get_args(self.hint)

    @property
    def flag(self) -> str:
        """The option on the command line: `--save-steps`."""
        return flag(self.name)


def options_of(function: Callable[..., Any]) -> Iterator[Option]:
    """All options of a verb, in the order of its signature."""
    hints = get_type_hints(function, include_extras=True)
    described = _descriptions(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ALWAYS:
            continue
        if not (names := _fields(hints[name])):
            yield Option(_option_name(name), hints[name], parameter.default, described.get(name, ""))
            continue
        kind = type(parameter.default)
        field_hints, field_texts = get_type_hints(kind), _descriptions(kind)
        for field in names:
            yield Option(field, field_hints[field], getattr(parameter.default, field), field_texts.get(field, ""))


def call_arguments(function: Callable[..., Any], values: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """The arguments of the function, option dataclasses included, from values by option name."""
    hints = get_type_hints(function, include_extras=True)
    call: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ALWAYS:
            call[name] = ALWAYS[name]
        elif names := _fields(hints[name]):
            call[name] = replace(parameter.default, **{field: values[field] for field in names})
        else:
            call[name] = values[_option_name(name)]
    return call


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a verb as options by name: the fields of an option dataclass in its place."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= vars(value) if is_dataclass(value) else {name: value}
    return found


def kind_of(hint: Any) -> str:
    """A description of the values of this type."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(kind_of(one) for one in get_args(hint) if one is not NoneType)
    return KINDS.get(get_origin(hint) or hint, str(hint))


def _option_name(name: str) -> str:
    """A parameter's name without the underscore after a Python keyword: `import_`."""
    return name.rstrip("_")


def _fields(hint: Any) -> list[str]:
    """The fields of an option dataclass that are options; none for any other type."""
    kind, only = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if not (is_dataclass(kind) and isinstance(kind, type)):
        return []
    return only.names.split() if only else [field.name for field in fields(kind)]


def _descriptions(thing: Any) -> dict[str, str]:
    """The description of each parameter or field, inherited ones included."""
    found: dict[str, str] = {}
    for one in reversed(thing.__mro__[:-1]) if isinstance(thing, type) else [thing]:
        for item in docstring_parser.parse_from_object(one).params:
            found[item.arg_name] = (item.description or "").replace("\n", " ").strip()
    return found


REAL = ("striate.errors",)  # imported as they are: they import nothing slow, and their classes are caught elsewhere


@cache
def signature_of(place: str) -> Callable[..., Any]:
    """The function at `module:function`, without its body; the dataclasses of options among its parameters are copies.

    Defined is what the signature names, in its module and where that imports it from, and nothing else.
    """
    module, _, name = place.partition(":")
    return _find(module, name)


def _find(module: str, name: str) -> Any:
    """What a module binds to a name."""
    for statement in _statements(module):
        if name not in _bound(statement):
            continue
        if isinstance(statement, ast.Import):
            return import_module(name)
        if isinstance(statement, ast.ImportFrom):
            source, origin = str(statement.module), _bound(statement)[name]
            if source.startswith("striate.") and source not in REAL:
                return _find(source, origin)
            return getattr(import_module(source), origin)
        return _define(module, name, statement)
    raise LookupError(f"{module} has no {name}")


@cache
def _define(module: str, name: str, statement: ast.stmt) -> Any:
    """Run a statement of a module, after those that it needs."""
    if isinstance(statement, ast.FunctionDef):
        statement.body, statement.returns = statement.body[:1], None  # the docstring stays
    if isinstance(statement, ast.ClassDef):  # of a dataclass, its fields
        statement.body = [line for line in statement.body if not isinstance(line, ast.FunctionDef)]
    known = {one for other in _statements(module) for one in _bound(other)} - vars(builtins).keys() - {name}
    read = (node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    needed = {node.id for node in read} & known
    scope = ModuleType(f"{__name__}:{module}:{name}")
    scope.__file__ = str(_file(module))
    sys.modules[scope.__name__] = scope  # dataclasses look their module up, docstrings of fields its file
    vars(scope).update({one: _find(module, one) for one in needed})
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, statement], []), scope.__file__, "exec"), vars(scope))
    return vars(scope)[name]


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(_file(module).read_text(encoding="utf-8")).body)


def _file(module: str) -> Path:
    path = Path(striate.__file__).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _bound(statement: ast.stmt) -> dict[str, str]:
    """The names that a statement binds, and what each is called where it is imported from."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name: alias.name for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name: statement.name}
    return {node.id: node.id for node in _targets(statement) if isinstance(node, ast.Name)}


def _targets(statement: ast.stmt) -> Iterator[ast.expr]:
    if isinstance(statement, ast.Assign):
        yield from statement.targets
    elif isinstance(statement, ast.AnnAssign):
        yield statement.target


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
    more = f"{rest} more option{'s' * (rest > 1)}: striate {verb} --help-all" if rest > 0 and not everything else None
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
    elif option.default not in (None, "") and not option.switch and "default:" not in text.lower():
        text += f"; default: {option.default}"
    text = text.replace("%", "%%")
    if option.hint is bool:
        group.add_argument(option.flag, action="store_true", help=text)
        return
    values = metavar(option.hint) + " ..." * option.several
    group.add_argument(option.flag, metavar=f"[{values}]" if option.switch else values, help=text)

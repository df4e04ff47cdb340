"""A verb's signature and docstring, read from its source: its module imports torch and transformers, which takes
seconds, and help and wrong options need neither."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import striate

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

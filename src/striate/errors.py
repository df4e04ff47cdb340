"""`UserError`, and the checks that raise it most often: a name, a number, an optional package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what was found, what was expected, the fix.

    `see` is the section of docs/errors.md on this kind of error, with its cause and fix; empty if there is none. The
    command line prints that line and the section (with `--debug` also the traceback); library users can catch the
    error as a `ValueError`, and read the section in its traceback.
    """

    see = ""

    def __init__(self, message: str, see: str = ""):
        super().__init__(message)
        self.see = see or self.see
        if self.see:
            self.add_note(self.link)

    @property
    def link(self) -> str:
        """Where the section is."""
        return f"docs/errors.md#{self.see}" if self.see else ""


def need(package: str, what: str, *, extra: str = "") -> None:
    """Raise `UserError` when an optional package is not installed. `package` is its name on PyPI, `what` needs it."""
    if find_spec(package.replace("-", "_")) is None:
        wanted = f"'striate[{extra}]'" if extra else package
        raise UserError(
            f"{what} needs {package}, which is not installed: pip install {wanted}", see="package-not-installed"
        )


def at_least(least: int, **options: float | None) -> None:
    """Raise `UserError` when an option is below `least`; None means that the option was not set."""
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{flag(name)} {value}: at least {least} was expected")


def check_seed(seed: int) -> None:
    """Raise `UserError` when the random generators of NumPy and PyTorch do not both accept the seed."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: 0 to {2**32 - 1} was expected")


def nearest(name: str, known: Iterable[str]) -> str:
    """An unknown name, quoted, with the closest known names, or with all known names when none is close."""
    names = list(known)
    near = get_close_matches(name, names)
    return f"{name!r}; nearest: {', '.join(near)}" if near else f"{name!r}; there are: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, to quote in our own."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def flag(name: str) -> str:
    """The command-line flag of an option: `max_length` is `--max-length`."""
    return "--" + name.replace("_", "-")


def check_choices(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise `UserError` when a value is not in the `Literal` of its type hint: library calls pass no parser."""
    for name, hint in hints.items():
        if get_origin(hint) is Literal and name in values and values[name] not in get_args(hint):
            raise UserError(f"{flag(name)} {nearest(str(values[name]), get_args(hint))}")

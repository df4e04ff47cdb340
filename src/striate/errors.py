"""The one kind of error that is written for people."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can put right. Its text is one line: what was found, what was expected, what to do.

    The command line prints that line alone (a traceback only with `--debug`); library users catch it as a
    `ValueError`.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """An unknown name, quoted, with the nearest known ones, or all of them when none is near."""
    names = list(known)
    near = get_close_matches(name, names)
    return f"{name!r}; nearest: {', '.join(near)}" if near else f"{name!r}; there are: {', '.join(names)}"

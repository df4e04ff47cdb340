"""The console that text for users is printed to: a terminal, or a file in its place."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints text unchanged: `[` in a path does not start markup, `:car:` does not become an emoji.

    Style text with `style=` or `rich.text.Text`. The columns of a progress bar parse markup regardless: pass them
    `rich.markup.escape(name)`.
    """
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

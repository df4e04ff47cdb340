"""How every figure looks: colours, shapes, type, and the three kinds of file it can become."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from striate.errors import UserError
from striate.region import Region

INK = "#1a1a1b"  # text, axes and the reference; `svg` makes it the colour of the page's text
# Told apart by colour-blind readers, each far enough from white; `DARK` has the same hues for a dark page.
PALETTE = ("#0072b2", "#d55e00", "#00876a", "#a6468f", "#a87900", "#3d5a80", "#c23b4e")
DARK = ("#58aee8", "#f28e4c", "#3fc4a0", "#dd8fcb", "#dcb04a", "#93b4d9", "#f08a98")
SHAPES = "sD^vPX"  # one less than colours, so that 42 runs differ; the reference is round
WIDTH = 4.8  # inches
NAME = 28  # letters of a run's or task's name that fit
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called "$\frac"
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.markersize": 5,
}


class Estimate(NamedTuple):
    """A measured number and its standard error (NaN where that is not known), in the same unit."""

    value: float
    stderr: float = math.nan


class Mark(NamedTuple):
    """How a run is drawn."""

    colour: str
    shape: str


def marks(names: Sequence[str], reference: str | None = None) -> dict[str, Mark]:
    """A colour and a shape for each run, in the order given; the reference gets the colour of the text."""
    others = [name for name in names if name != reference]
    chosen = {n: Mark(PALETTE[i % len(PALETTE)], SHAPES[i % len(SHAPES)]) for i, n in enumerate(others)}
    return {name: chosen.get(name, Mark(INK, "o")) for name in names}


def svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element for a web page: the same text every time, its words as words.

    Words and axes take the colour and the font of the page, runs the colours that `css` says. `salt` keeps
    the ids of several figures in one page apart.
    """
    buffer = io.StringIO()
    settings = STYLE | {"svg.fonttype": "none", "svg.hashsalt": salt, "font.sans-serif": ["DejaVu Sans"]}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # the page's fonts will have it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    for colour in (INK, *PALETTE):
        text = text.replace(f": {colour}", f": {css(colour)}")
    return text


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as `name`.svg, .png (200 dots an inch) and .pdf, on white, with the same bytes every time.

    Raises `UserError` when the folder cannot be written.
    """
    settings = STYLE | {"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
            for kind, about in (("svg", {"Date": None}), ("png", {}), ("pdf", {"CreationDate": None})):
                figure.savefig(folder / f"{name}.{kind}", dpi=200, metadata=about)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written: {error.strerror}") from None


def css(colour: str) -> str:
    """A run's colour for a web page: the text's own, or a variable `--run-0`, `--run-1`, ... of the page."""
    return "currentColor" if colour == INK else f"var(--run-{PALETTE.index(colour)}, {colour})"


def strip(axes: Axes, region: Region, row: float, colour: str) -> None:
    """One cell a layer from left to right; those of the region are filled."""
    step, gap = 1 / region.depth, 0.15 / region.depth
    for filled in (True, False):
        cells = [
            Rectangle((i * step, row + 0.05), step - gap, 0.26) for i in range(region.depth) if (i in region) == filled
        ]
        axes.add_collection(
            PatchCollection(cells, color=colour if filled else INK, alpha=1 if filled else 0.13, linewidth=0)
        )


def tidy(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Faint lines across, few round numbers, no box."""
    axes.grid(axis=grid, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def label(name: str) -> str:
    """A name on one line, with its middle left out when it is long."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[-(NAME // 2) + 1 :]}"

"""The style of all figures: colors, shapes, fonts, and their files as SVG, PNG and PDF."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from striate.errors import UserError
from striate.region import Region

INK = "#1a1a1b"  # text, axes and the reference; `svg` makes it the color of the page's text
# Distinct for color-blind readers, with enough contrast to white; `DARK` has the same hues for a dark page.
PALETTE = ("#0072b2", "#d55e00", "#00876a", "#a6468f", "#a87900", "#3d5a80", "#c23b4e")
DARK = ("#58aee8", "#f28e4c", "#3fc4a0", "#dd8fcb", "#dcb04a", "#93b4d9", "#f08a98")
SHAPES = "sD^vPX"  # one less than colors, so that 42 runs differ; the reference is round
WIDTH = 4.8  # inches
NAME = 28  # maximum number of letters of a run's or task's name
DASHES = (0, (4, 3))
TIP = "tip: "  # prefix of the id of an element with a tooltip
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
    """A measured value and its standard error (NaN if unknown), in the same unit."""

    value: float
    stderr: float = math.nan


class Mark(NamedTuple):
    """The color and shape of a run in figures."""

    color: str
    shape: str
    dashed: bool = False


def marks(names: Sequence[str], reference: str | None = None) -> dict[str, Mark]:
    """A color and a shape for each run, in the order given; the reference gets the color of the text."""
    others = [name for name in names if name != reference]
    chosen = {n: Mark(PALETTE[i % len(PALETTE)], SHAPES[i % len(SHAPES)]) for i, n in enumerate(others)}
    return {name: chosen.get(name, Mark(INK, "o")) for name in names}


def svg(figure: Figure, salt: str) -> str:
    """The figure as a reproducible `<svg>` element for a web page, with text as text.

    Text and axes take the color and the font of the page, runs the colors of `css`. `salt` makes the ids of several
    figures in one page distinct.
    """
    text = _svg(figure, {"svg.hashsalt": salt, "font.sans-serif": ["DejaVu Sans"]}, transparent=True)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    for color in (INK, *PALETTE):
        text = text.replace(f": {color}", f": {css(color)}")
    return text


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as `name`.svg, .png (200 dpi) and .pdf, on white, with reproducible bytes.

    Raises `UserError` when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text(_svg(figure, {"svg.hashsalt": name}), encoding="utf-8")
        with rc_context(STYLE | {"pdf.fonttype": 42}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
            for kind, about in (("png", {}), ("pdf", {"CreationDate": None})):
                figure.savefig(folder / f"{name}.{kind}", dpi=200, metadata=about)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written: {error.strerror}") from None


def tip(artist: Artist, text: str) -> None:
    """Add a tooltip, which browsers show for this part of the figure as SVG."""
    artist.set_gid(TIP + " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def _svg(figure: Figure, settings: Mapping[str, Any], *, transparent: bool = False) -> str:
    """The figure as an SVG file, with text as text, and tooltips as titles."""
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.fonttype": "none", **settings}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # the reader's fonts will have it
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    # A layout takes as long as the rendering; the next file reuses it.
    figure.set_layout_engine("none")
    return re.sub(f'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", buffer.getvalue())


def css(color: str) -> str:
    """A run's color for a web page: that of the text, or a variable `--run-0`, `--run-1`, ... of the page."""
    return "currentColor" if color == INK else f"var(--run-{PALETTE.index(color)}, {color})"


def region_cells(axes: Axes, region: Region, row: float, color: str) -> None:
    """One cell per layer from left to right; the layers of the region are filled."""
    step, gap = 1 / region.depth, 0.15 / region.depth
    for filled in (True, False):
        cells = [
            Rectangle((i * step, row + 0.05), step - gap, 0.26) for i in range(region.depth) if (i in region) == filled
        ]
        axes.add_collection(
            PatchCollection(cells, color=color if filled else INK, alpha=1 if filled else 0.13, linewidth=0)
        )


def key(figure: Figure, style: Mapping[str, Mark], *, lines: bool = False) -> None:
    """A legend of the runs above a figure, which grows by its height."""
    longest = max((len(label(name)) for name in style), default=0)
    size = 8 if longest > NAME - 8 else None
    columns = min(4, (66 if size else 51) // (5 + longest))  # letters that fit in a line
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.21 * math.ceil(len(style) / columns))
    handles = [
        Line2D(
            [], [], color=mark.color, marker="" if lines else mark.shape,
            linestyle=DASHES if mark.dashed else "-" if lines else "",
        )
        for mark in style.values()
    ]  # fmt: skip
    names = [label(name) for name in style]
    figure.legend(
        handles, names, loc="outside upper left", ncols=columns, handlelength=2.2 if lines else 1.2, fontsize=size
    )


def percent(mean: Estimate) -> str:
    """A fraction in percent, as "81.2 ± 1.1 %"."""
    error = "" if math.isnan(mean.stderr) else f" ± {100 * mean.stderr:.1f}"
    return f"{100 * mean.value:.1f}{error} %"


def tidy(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Faint grid lines, few round tick labels, no frame."""
    axes.grid(axis=grid, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def from_zero(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Start an axis at zero once all is plotted, with a margin above the largest value, also where all are alike."""
    if axis == "x":
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    else:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def label(name: str) -> str:
    """A name on one line, with its middle left out when it is long."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[-(NAME // 2) + 1 :]}"

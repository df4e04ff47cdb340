from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from striate import plot
from striate.plot import INK, PALETTE, Cost, Estimate
from striate.region import Region

NAMES = ("all", "uniform", "first", "backbone")
STYLE = plot.marks(NAMES, "all")
REGIONS = {"all": Region.parse("all", 4), "uniform": Region.parse("0,2", 4), "first": Region.parse("0,1", 4)}
VISUAL = {name: Estimate(0.8 - i / 10, 0.01) for i, name in enumerate(NAMES)}
HOSTILE = ("$\\frac", "_private", '"><script>alert(1)</script>', "emoji 🦆\n\x00\ud800", "x" * 500, "")


def accuracy(names: tuple[str, ...] = NAMES) -> Figure:
    style = plot.marks(names)
    means = {name: Estimate(0.5, 0.01) for name in names}
    return plot.accuracy(means, means, retention=means, regions=REGIONS, style=style)


def tasks(names: tuple[str, ...] = NAMES) -> Figure:
    return plot.tasks({task: {n: Estimate(0.5) for n in names} for task in ("read", *names)}, plot.marks(names))


def losses(names: tuple[str, ...] = NAMES) -> Figure:
    return plot.losses({name: [(1, 2.0), (2, 1.0)] for name in names}, plot.marks(names))


def cost(names: tuple[str, ...] = NAMES) -> Figure:
    costs = {name: Cost(i + 1.0, math.nan if i else 2.0) for i, name in enumerate(names)}
    return plot.cost(costs, {name: Estimate(0.5, 0.01) for name in names}, plot.marks(names))


figures = pytest.mark.parametrize("draw", [accuracy, tasks, losses, cost])


@figures
def test_svg_is_the_same_every_time_and_takes_the_colours_of_the_page(draw: Callable[[], Figure]) -> None:
    text = plot.svg(draw(), "salt")
    assert text == plot.svg(draw(), "salt")
    assert "currentColor" in text
    assert "var(--run-1, #d55e00)" in text
    assert INK not in text
    assert "#000000" not in text.replace("stroke: #000000; stroke-width: 0.8", "")  # ticks, which have no length
    assert "uniform" in [element.text for element in ElementTree.fromstring(text).iter() if element.text]


@figures
def test_names_are_only_text(draw: Callable[[tuple[str, ...]], Figure]) -> None:
    text = plot.svg(draw(HOSTILE), "salt")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert tags <= {"svg", "g", "path", "defs", "style", "use", "text", "clipPath", "rect"}
    words = {element.text for element in ElementTree.fromstring(text).iter() if element.text}
    assert "$\\frac" in words
    assert "_private" in words
    assert "x" * 14 + "…" + "x" * 13 in words


def test_ids_of_two_figures_differ() -> None:
    one, other = (plot.svg(losses(), salt) for salt in ("one", "other"))

    def ids(text: str) -> set[str]:
        return {element.attrib["id"] for element in ElementTree.fromstring(text).iter() if "id" in element.attrib}

    assert ids(one)
    assert not ids(one) & ids(other)


def test_a_run_is_drawn_the_same_in_every_figure_and_unlike_any_other() -> None:
    names = [f"run {i}" for i in range(42)]
    marks = plot.marks([*names, "all"], "all")
    assert marks["all"].colour == INK
    assert len(set(marks.values())) == 43
    assert plot.css(INK) == "currentColor"
    assert [plot.css(colour) for colour in PALETTE][1] == "var(--run-1, #d55e00)"


def test_strips_show_the_layers_of_the_region() -> None:
    figure = plot.accuracy(VISUAL, {}, retention={}, regions=REGIONS, style=STYLE)
    strips, bars = figure.axes
    cells = [[len(collection.get_paths()) for collection in strips.collections[i : i + 2]] for i in (0, 2, 4)]
    assert cells == [[4, 0], [2, 2], [2, 2]]
    widths = [bar.get_width() for bar in bars.patches]
    assert widths[1::2] == pytest.approx([80, 70, 60, 50])


def test_a_run_without_results_leaves_its_row_empty() -> None:
    figure = plot.accuracy({"all": Estimate(0.8)}, {}, retention={"all": Estimate(1)}, regions={}, style=STYLE)
    assert [text.get_text() for text in figure.axes[0].texts] == list(NAMES)
    assert [text.get_text() for text in figure.axes[1].texts] == ["80.0", "100.0 % kept"]


@pytest.mark.parametrize("length", [1, 200, 201, 1000])
def test_a_long_loss_curve_becomes_block_means(length: int) -> None:
    figure = plot.losses({"all": [(i, 2.0 * i) for i in range(length)]}, STYLE)
    (line,) = figure.axes[0].lines
    steps, loss = line.get_data()
    size = math.ceil(length / plot.POINTS)
    assert len(steps) == math.ceil(length / size) <= plot.POINTS
    assert steps[0] == (size - 1) / 2
    assert list(loss) == pytest.approx([2 * step for step in steps])


def test_a_loss_that_blew_up_leaves_a_gap() -> None:
    assert "<svg" in plot.svg(plot.losses({"all": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]}, STYLE), "")


def test_global_settings_stay_as_they_were() -> None:
    before = dict(rcParams)
    for draw in (accuracy, tasks, losses, cost):
        plot.svg(draw(), "salt")
    assert dict(rcParams) == before

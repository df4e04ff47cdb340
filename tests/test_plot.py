from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from striate import plot
from striate.errors import UserError
from striate.plot import INK, PALETTE, Cost, Curve, Estimate, Profile, RevertProfile
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
    return plot.losses({name: [[(1, 2.0), (2, 1.0)]] for name in names}, plot.marks(names))


def cost(names: tuple[str, ...] = NAMES) -> Figure:
    costs = {name: Cost(i + 1.0, math.nan if i else 2.0) for i, name in enumerate(names)}
    return plot.cost(costs, {name: Estimate(0.5, 0.01) for name in names}, plot.marks(names))


def curves(names: tuple[str, ...] = NAMES) -> Figure:
    panel = plot.Panel({name: Curve([{1: 10.0, 3: 20.0}, {1: 30.0}], floor=15.0) for name in names}, "mean", "%", "%")
    style = {name: mark._replace(dashed=bool(i % 2)) for i, (name, mark) in enumerate(plot.marks(names).items())}
    return plot.curves([panel, *(panel._replace(title=name) for name in names)], style, across="layers")


def profiles(names: tuple[str, ...] = NAMES) -> Figure:
    values = (0.5, math.nan, 0.25, 1.0)
    some = Profile(values, (0.1, math.nan, 0.1, 0.1), {"image": values, "text": values, "unknown": values})
    return plot.profiles({name: some if i else Profile(values) for i, name in enumerate(names)}, REGIONS["uniform"])


def blocks() -> Figure:
    return plot.blocks([[0.3, 0.5, 0.9], [0.2, 0.4, math.nan], [0.1, math.nan, math.nan]])


def instances() -> Figure:
    return plot.instances([[0.1, 0.2, 0.3], [0.3, 0.2, math.nan], [math.nan] * 3])


def overlay() -> Figure:
    return plot.overlay(np.full((20, 30, 3), 128, dtype=np.uint8), np.random.default_rng(0).random((7, 2, 3)))


def reverted(names: tuple[str, ...] = NAMES) -> Figure:
    groups = {name: Estimate(4.0 + i, 0.1) for i, name in enumerate(names)}
    found = RevertProfile(groups, Estimate(5.0, 0.1), Estimate(6.0))
    return plot.revert_profiles({"visual": found, "text": found})


figures = pytest.mark.parametrize("draw", [accuracy, tasks, losses, cost, curves])
of_layers = pytest.mark.parametrize("draw", [profiles, blocks, instances, overlay, reverted])


@figures
def test_svg_is_the_same_every_time_and_takes_the_colors_of_the_page(draw: Callable[[], Figure]) -> None:
    text = plot.svg(draw(), "salt")
    assert text == plot.svg(draw(), "salt")
    assert "currentColor" in text
    assert "var(--run-1, #d55e00)" in text
    assert INK not in text
    assert "#000000" not in text.replace("stroke: #000000; stroke-width: 0.8", "")  # ticks, which have no length
    assert "uniform" in [element.text for element in ElementTree.fromstring(text).iter() if element.text]


@of_layers
def test_figures_of_layers_are_the_same_every_time(draw: Callable[[], Figure]) -> None:
    text = plot.svg(draw(), "salt")
    assert text == plot.svg(draw(), "salt")
    assert INK not in text
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert tags <= {"svg", "g", "path", "defs", "style", "use", "text", "clipPath", "rect", "image"}


@pytest.mark.parametrize("draw", [profiles, reverted])
def test_names_of_scores_and_groups_are_only_text(draw: Callable[[tuple[str, ...]], Figure]) -> None:
    text = plot.svg(draw(HOSTILE), "salt")
    words = {element.text for element in ElementTree.fromstring(text).iter() if element.text}
    assert "$\\frac" in words
    assert not [element for element in ElementTree.fromstring(text).iter() if element.tag.endswith("script")]


def test_a_panel_for_each_score() -> None:
    figure = profiles(("a_score", "b", "c"))
    one, two, three, empty = figure.axes
    assert [axes.get_title(loc="left") for axes in (one, two, three)] == ["a score", "b", "c"]
    assert not empty.axison
    assert len(one.lines) == 1  # no parts
    assert [line.get_color() for line in two.lines] == [PALETTE[1], PALETTE[0], INK]
    assert len(two.patches) == 2  # the region's layers


def test_a_panel_suits_its_score() -> None:
    wide = Profile((1.0, 100.0, 2.0), parts={"text": (1e9, 1.0, 1.0)})
    far = Profile((0.0, 1.0, 0.5), parts={"text": (1e9, 1.0, 1.0)})
    one, other = plot.profiles({"wide": wide, "far": far, "none": Profile((math.nan,) * 3)}).axes[:2]
    assert (one.get_yscale(), other.get_yscale()) == ("log", "linear")
    assert one.get_ylim()[1] == 150
    assert other.get_ylim()[1] == 1.25
    text = plot.svg(plot.profiles({"wide": wide}), "salt")
    assert ">100<" in text  # no mathematics


def test_the_block_that_changes_least_is_marked() -> None:
    (marks,) = blocks().axes[0].lines
    assert list(map(tuple, zip(*marks.get_data(), strict=True))) == [(2, 1), (1, 2), (0, 3)]
    (image,) = blocks().axes[0].images
    stretched = image.get_array()
    assert stretched[0].tolist() == pytest.approx([1.0, 0.5, 0.0])  # length 1 from layers 0, 1, 2
    assert stretched.mask.tolist() == [[False] * 3, [False, False, True], [False, True, True]]


def test_a_line_for_each_sample_and_their_mean() -> None:
    first, second, mean = instances().axes[0].lines  # the sample without any number has no line
    assert list(first.get_ydata()) == [0.1, 0.2, 0.3]
    assert list(mean.get_ydata()) == pytest.approx([0.2, 0.2, 0.3])
    assert mean.get_label() == "mean of 2 samples"
    assert (first.get_alpha(), second.get_alpha(), mean.get_alpha()) == (0.6, 0.6, None)  # the mean stands out


def test_arrows_lead_from_both_models() -> None:
    visual, text = reverted(("low", "high")).axes
    arrows = [(note.xyann[0], note.xy[0], note.arrowprops["color"]) for note in visual.texts]
    assert arrows == [
        (5.0, 4.0, PALETTE[0]), (6.0, 4.0, PALETTE[0]), (5.0, 5.0, PALETTE[1]), (6.0, 5.0, PALETTE[0]),
    ]  # fmt: skip
    assert (visual.get_title(loc="left"), text.get_title(loc="left")) == ("visual", "text")
    assert [label.get_text() for label in visual.get_yticklabels()] == ["low", "high"]


def test_what_was_reverted_is_read_from_results() -> None:
    cell = {"value": 4.0, "stderr": None, "n": 1}
    found = RevertProfile.from_json({"tuned": cell, "backbone": cell | {"stderr": 0.5}, "groups": {"0": cell}})
    assert found.backbone == Estimate(4.0, 0.5)
    assert math.isnan(found.groups["0"].stderr)


def test_a_small_image_for_each_layer() -> None:
    panels = overlay().axes
    assert len(panels) == 12
    assert [len(axes.images) for axes in panels] == [2] * 7 + [0] * 5
    assert panels[3].get_title(loc="left") == "3"
    assert list(panels[0].images[1].get_extent()) == [0, 30, 20, 0]


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        plot.save(profiles(), tmp_path / folder, "scores")
    names = ["scores.pdf", "scores.png", "scores.svg"]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        plot.save(profiles(), tmp_path / "a" / "scores.svg", "scores")


@figures
def test_names_are_only_text(draw: Callable[[tuple[str, ...]], Figure]) -> None:
    text = plot.svg(draw(HOSTILE), "salt")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert tags <= {"svg", "g", "path", "defs", "style", "use", "text", "title", "clipPath", "rect"}
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


def test_a_run_is_plotted_the_same_in_every_figure_and_unlike_any_other() -> None:
    names = [f"run {i}" for i in range(42)]
    marks = plot.marks([*names, "all"], "all")
    assert marks["all"].color == INK
    assert len(set(marks.values())) == 43
    assert plot.css(INK) == "currentColor"
    assert [plot.css(color) for color in PALETTE][1] == "var(--run-1, #d55e00)"


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
    figure = plot.losses({"all": [[(i, 2.0 * i) for i in range(length)]]}, STYLE)
    (line,) = figure.axes[0].lines
    steps, loss = line.get_data()
    size = math.ceil(length / plot.POINTS)
    assert len(steps) == math.ceil(length / size) <= plot.POINTS
    assert steps[0] == (size - 1) / 2
    assert list(loss) == pytest.approx([2 * step for step in steps])


def test_a_line_for_each_seed() -> None:
    figure = plot.losses({"all": [[(1, 2.0), (2, 1.0)], [(1, 3.0), (2, 2.0)]]}, STYLE)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[2.0, 1.0], [3.0, 2.0]]


def test_a_curve_is_the_mean_over_seeds_with_a_band_and_single_lines() -> None:
    curve = Curve([{1: 10.0, 3: 20.0}, {1: 30.0}], floor=15.0)
    assert curve.points() == {1: [10.0, 30.0], 3: [20.0]}
    figure = plot.curves([plot.Panel({"all": curve}, unit="%")], plot.marks(["all"]), across="layers")
    (axes,) = figure.axes
    first, second, mean, *dots, floor = axes.lines
    assert [list(line.get_ydata()) for line in (first, second, mean)] == [[10.0, 20.0], [30.0], [20.0, 20.0]]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[1.0, 20.0]], [[3.0, 20.0]]]
    assert list(floor.get_ydata()) == [15.0, 15.0]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((20 - math.sqrt(200), 20 + math.sqrt(200)))


def test_hovering_shows_the_value() -> None:
    text = plot.svg(plot.curves([plot.Panel({"a<b": Curve([{1: 10.0}, {1: 30.0}])}, unit="%")], plot.marks(["a<b"]),
                                across="layers"), "")  # fmt: skip
    titles = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("title")]
    assert titles == ["a<b, 1 layer: 20.0 ± 14.1 % (n = 2)"]
    assert "all: 80.0 ± 1.0 %" in plot.svg(plot.accuracy(VISUAL, {}, retention={}, regions={}, style=STYLE), "")


def test_panels_share_a_scale_or_have_their_own() -> None:
    low, high = (plot.Panel({"all": Curve([{1: top, 2: 2 * top}])}, ylabel=f"up to {top}") for top in (1.0, 100.0))
    shared, own = (plot.curves([low, high], STYLE, across="layers", shared=shared) for shared in (True, False))
    assert shared.axes[0].get_ylim() == shared.axes[1].get_ylim()
    assert own.axes[0].get_ylim()[1] < 10 < own.axes[1].get_ylim()[1]
    assert [axes.get_ylabel() for axes in own.axes] == ["up to 1.0", "up to 100.0"]


def test_the_panels_of_a_row_show_the_values_of_all() -> None:
    low, high = (plot.Panel({"all": Curve([{1: top, 2: 2 * top}])}) for top in (1.0, 100.0))
    figure = plot.grid([[low, high]], STYLE, across=["first", "last"])
    assert [axes.get_ylim()[0] for axes in figure.axes] == [0, 0]
    assert all(axes.get_ylim()[1] > 200 for axes in figure.axes)


def test_values_that_are_alike_keep_a_margin() -> None:
    costs = {name: Cost(3.0, 0.55 + i / 10_000) for i, name in enumerate(NAMES)}
    _, memory = plot.cost(costs, VISUAL, STYLE).axes
    assert memory.get_xlim()[0] == 0
    assert memory.get_xlim()[1] > 1.04 * 0.55
    (attention,) = plot.instances([[0.57, 0.571]]).axes
    assert attention.get_ylim()[1] > 1.04 * 0.57


@pytest.mark.parametrize("longest", range(3, 40, 2))
@pytest.mark.parametrize("name", ["uniform-25%", "seed-0_wide"])
def test_the_names_of_runs_fit_into_a_figure(name: str, longest: int) -> None:
    names = [f"{(4 * name)[: longest - 1]}{index}" for index in range(8)]
    figure = tasks(tuple(names))
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= 1.01 * figure.bbox.x1


def test_a_loss_that_blew_up_leaves_a_gap() -> None:
    assert "<svg" in plot.svg(plot.losses({"all": [[(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]]}, STYLE), "")


def test_global_settings_stay_as_they_were() -> None:
    before = dict(rcParams)
    for draw in (accuracy, tasks, losses, cost, curves, profiles, blocks, instances, overlay, reverted):
        plot.svg(draw(), "salt")
    assert dict(rcParams) == before


def test_a_spike_is_a_dot_on_its_line() -> None:
    style = plot.marks(["a"], "a")
    figure = plot.losses({"a": [[(1.0, 2.0), (2.0, 9.0)]]}, style, {"a": [(2.0, 9.0)]})
    lines = [tuple(zip(*map(list, line.get_data()), strict=True)) for line in figure.axes[0].lines]
    assert lines == [((1.0, 2.0), (2.0, 9.0)), ((2.0, 9.0),)]

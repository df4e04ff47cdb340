"""What came of the study: research/results/thirty_layers.json as tables, figures and paired tests.

    python examples/thirty_layers/table.py         # writes research/thirty_tables.md and research/figures/

Runs of one region over several seeds are averaged; differences from tuning all layers are paired: the same questions,
the same seeds (`striate.evaluate.statistics`). An interval that contains 0 is a tie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import predict
from results import load
from world import TASKS

from striate.evaluation.statistics import Interval, difference, mcnemar, retention, within_noise
from striate.plot.style import DASHES, INK, PALETTE, STYLE
from striate.scores.table import Scores

ROOT = Path(__file__).parents[2] / "research"
TABLES, FIGURES, GEMMA = ROOT / "thirty_tables.md", ROOT / "figures", ROOT / "results" / "gemma.json"
Run = dict[str, Any]
DEPTH, QUARTER = 30, 8
SIDES = {"visual": PALETTE[0], "facts": PALETTE[1]}


def tuned(runs: Iterable[Run], folder: str = "cells", **wanted: Any) -> dict[str, dict[int, Run]]:
    """Tuned runs of a folder by region and seed, of those with the options in `wanted`."""
    found: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        options = run["options"]
        here = run["verb"] == "tune" and run["run"].split("/")[0] == folder
        if here and all(options.get(key) == wanted.get(key) for key in ("samples", "route", "modules")):
            found[label(options["region"])][options["seed"]] = run
    return found


def label(region: str) -> str:
    """A region as the tables name it: spread:25%@scores:gradient as "spread:25% by gradient"."""
    form, at, score = region.partition("@")
    return f"{form} by {score.rpartition(':')[2]}" if at and ":" in score else region


def visual(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Scores of the visual questions by task, each averaged over the runs: several seeds do not make more questions."""
    return {
        task: [fmean(seeds) for seeds in zip(*(run["scores"][task] for run in runs), strict=True)] for task in TASKS
    }


def paired(runs: dict[int, Run], reference: dict[int, Run]) -> tuple[Interval, Interval] | None:
    """Difference from, and retention of, the reference, over the seeds that both have."""
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        return None
    sides = visual([runs[seed] for seed in seeds]), visual([reference[seed] for seed in seeds])
    return difference(*sides), retention(*sides)


def value(runs: Sequence[Run], task: str) -> float:
    """The mean of a task over runs: percent, or perplexity."""
    scale = 1 if task == "prose" else 100
    return scale * fmean(run["tasks"][task]["value"] for run in runs)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, runs: dict[int, Run], reference: dict[int, Run]) -> list[str]:
    """A region: what it sees by task, how it compares with all layers, what it kept of text, what it cost."""
    found = [runs[seed] for seed in sorted(runs)]
    compared = paired(runs, reference) if runs != reference else None
    apart = "" if compared is None else _said(compared[0])
    kept = "" if compared is None else f"{100 * compared[1].value:.1f}{_by_seed(runs, reference)}"
    cost = [f"{fmean(run['training'].get(key, run.get(key)) or 0 for run in found):.{digits}f}" for key, digits in COST]
    return [
        name, str(len(found)), spread([100 * run["visual"] for run in found]), apart, kept,
        *(f"{value(found, task):.0f}" for task in TASKS), *text_kept(found),
        *(cost if found[0]["verb"] == "tune" else ["", "", ""]),
    ]  # fmt: skip


def _by_seed(runs: dict[int, Run], reference: dict[int, Run]) -> str:
    """What each seed keeps of the reference, where there are several: an interval over questions does not show it."""
    seeds = sorted(runs.keys() & reference.keys())
    kept = [f"{100 * runs[seed]['visual'] / reference[seed]['visual']:.1f}" for seed in seeds]
    return f" ({', '.join(kept)})" if len(kept) > 1 else ""


def text_kept(runs: Sequence[Run]) -> list[str]:
    """Questions of general knowledge answered, and perplexity of prose."""
    return [f"{value(runs, 'facts'):.1f}", f"{value(runs, 'prose'):.2f}"]


COST = (("seconds", 0), ("peak_memory_gb", 2), ("loss", 3))
HEAD = ("tuned", "seeds", "visual", "minus all (95 %)", "kept %", *TASKS, "facts", "prose ppl", "seconds", "GB", "loss")


def _said(found: Interval) -> str:
    ends = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{ends}{' tie' if within_noise(found) else ''}"


def regions_table(runs: Sequence[Run], folder: str = "cells") -> str:
    """All tuned regions of a folder, the start first; nothing if there are none."""
    found = tuned(runs, folder)
    if not found:
        return ""
    reference = found.get("all", {})
    start = [run for run in runs if run["verb"] == "assemble"]
    rows = [row("nothing (the start)", {0: start[0]}, {})] if start else []
    rows += [row(name, by_seed, reference) for name, by_seed in found.items()]
    return table(HEAD, rows)


def route_table(runs: Sequence[Run], folder: str = "cells") -> str:
    """Image tokens through a part of the layers, each run against the one of its region without a route."""
    head = ("tuned", "seeds", "visual", "minus unrouted (95 %)", "kept of unrouted %", *HEAD[5:])
    return varied_table(runs, "route", "{region}, image tokens through {value}", head, folder)


def modules_table(runs: Sequence[Run]) -> str:
    """A part of the matrices of each layer, each run against the one that tunes all of them."""
    head = ("tuned", "seeds", "visual", "minus all matrices (95 %)", "kept of all matrices %", *HEAD[5:])
    return varied_table(runs, "modules", "{region}, {value}", head, "cells")


def varied_table(runs: Sequence[Run], option: str, title: str, head: Sequence[str], folder: str) -> str:
    """Runs with a value of an option, each against the one of its region without; nothing if there are none."""
    plain, rows = tuned(runs, folder), []
    for value in dict.fromkeys(run["options"][option] for run in runs if option in run["options"]):
        for region, by_seed in tuned(runs, folder, **{option: value}).items():
            rows.append(row(title.format(region=region, value=value), by_seed, plain.get(region, {})))
    return table(head, rows) if rows else ""


def pairs_table(runs: Sequence[Run], other: str = "uniform:25%") -> str:
    """Each region against the uniform one: the same questions and seeds; McNemar's test counts all questions alike."""
    found, rows = tuned(runs), []
    for name, by_seed in found.items():
        seeds = sorted(by_seed.keys() & found.get(other, {}).keys())
        if name != other and seeds:
            sides = visual([by_seed[seed] for seed in seeds]), visual([found[other][seed] for seed in seeds])
            rows.append([name, str(len(seeds)), _said(difference(*sides)), f"{mcnemar(*sides):.2g}"])
    return table(("tuned", "seeds", f"minus {other} (95 %)", "McNemar p"), rows)


def prediction_table(runs: Sequence[Run]) -> str:
    """How well each score of the start says which quarter sees most, in the seeds with eight quarters or more."""
    if not predict.SCORES.is_file():
        return ""
    quarters: dict[int, list[Run]] = defaultdict(list)
    for by_seed in tuned(runs).values():
        for seed, run in by_seed.items():
            if len(run["layers"]) == QUARTER:
                quarters[seed].append(run)
    scores = Scores.load(predict.SCORES)
    rows = [row for _, found in sorted(quarters.items()) if len(found) >= 8 for row in predict.rows(found, scores)]
    return table(predict.HEAD, rows) if rows else ""


def pruning_table(runs: Sequence[Run]) -> str:
    """Layers removed by angular distance from tuned models, before and after healing; nothing if there are none."""
    cut: dict[tuple[str, int, bool], list[Run]] = defaultdict(list)
    for run in runs:
        folder, _, name = run["run"].partition("/")
        if folder == "cells" and run["verb"] == "prune":
            region = name.split("+")[0].partition("_")[2].replace("-", ":")
            cut[region, int(run["options"]["remove"]), "heal" in run["options"]].append(run)
    whole = tuned(runs)
    for (region, _, _), found in [*cut.items()]:  # before the cut, the same seeds
        seeds = [run["options"]["seed"] for run in found]
        cut[region, 0, False] = [whole[region][seed] for seed in seeds if seed in whole.get(region, {})]
    rows = [
        [region, str(removed), "yes" if healed else "no", str(len(found)),
         spread([100 * run["visual"] for run in found]), f"{value(found, 'describe'):.0f}", *text_kept(found)]
        for (region, removed, healed), found in sorted(cut.items())
    ]  # fmt: skip
    head = ("tuned", "removed", "healed", "seeds", "visual", "describe", "facts", "prose ppl")
    return table(head, rows) if rows else ""


def healing_table(runs: Sequence[Run]) -> str:
    """Ways to heal a pruned model (healing.py), against the model before the cut; nothing if there are none."""
    by_name, rows = {run["run"]: run for run in runs}, []
    for run in runs:
        folder, _, name = run["run"].partition("/")
        if folder == "healing":
            whole = by_name[f"cells/{name.partition('_cut-')[0]}"]
            kept = retention(visual([run]), visual([whole]))
            rows.append(
                [run["options"]["remove"], run["options"].get("heal", "not healed"), f"{100 * run['visual']:.1f}",
                 f"{100 * kept.value:.1f} [{100 * kept.low:.1f}, {100 * kept.high:.1f}]",
                 f"{value([run], 'describe'):.0f}", *text_kept([run])]
            )  # fmt: skip
    head = ("removed", "healed by", "visual", "kept of the uncut % (95 %)", "describe", "facts", "prose ppl")
    return table(head, rows) if rows else ""


def data_table(runs: Sequence[Run]) -> str:
    """Regions by the share of the data that they were tuned on, equal steps; nothing if there is one share."""
    shares = {run["options"]["samples"] for run in runs if run["verb"] == "tune" and "samples" in run["options"]}
    rows = []
    for share in [*sorted(shares, key=len), None] if shares else []:
        found = tuned(runs, samples=share)
        rows += [
            [share or "100%", *row(region, by_seed, found.get("all", {}))[:5]] for region, by_seed in found.items()
        ]
    return table(("data", *HEAD[:5]), rows) if rows else ""


def figure(runs: Sequence[Run], out: Path) -> None:
    """A line a quarter, the best first: its layers; what each seed sees, and still knows, of what all layers do."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    every = tuned(runs)
    reference = every.pop("all")
    found = {name: seeds for name, seeds in every.items() if len(next(iter(seeds.values()))["layers"]) == QUARTER}
    kept = {key: {name: _kept(by_seed, reference, key) for name, by_seed in found.items()} for key in SIDES}
    names = sorted((name for name in found if kept["visual"][name]), key=lambda name: fmean(kept["visual"][name]))
    with rc_context(STYLE | {"svg.hashsalt": "thirty"}):  # the same file from the same runs
        drawing = Figure(figsize=(8.4, 1.2 + 0.3 * len(names)), layout="constrained")
        layers, *sides = drawing.subplots(1, 3, sharey=True, width_ratios=(5, 4, 4))
        for line, name in enumerate(names):
            trained = next(iter(found[name].values()))["layers"]
            for layer in range(DEPTH):
                layers.barh(line, 0.84, 0.7, layer - 0.42, color=PALETTE[0] if layer in trained else "#e4e7ea")
            for axes, (key, color) in zip(sides, SIDES.items(), strict=True):
                shares = kept[key][name]
                axes.plot(shares, [line] * len(shares), "o", color=color, alpha=0.5, markeredgewidth=0)
                axes.plot(fmean(shares), line, "|", color=INK, markersize=13)
        layers.set_yticks(range(len(names)), names)
        layers.set(xlabel="layers that are tuned\n(right: a dot a seed, a line the mean)", xlim=(-0.6, DEPTH - 0.4))
        for axes, key in zip(sides, SIDES, strict=True):
            axes.axvline(100, color=INK, linewidth=0.8, linestyle=DASHES)
            axes.set_xlabel(f"{key}, % of\ntuning all layers")
        for axes in (layers, *sides):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        out.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(out, metadata={"Date": None})


def _kept(runs: dict[int, Run], reference: dict[int, Run], key: str) -> list[float]:
    return [100 * run[key] / reference[seed][key] for seed, run in runs.items() if seed in reference]


def main() -> None:
    """Write the tables and the figure."""
    runs = load()
    sections = {
        "Regions": regions_table(runs), "Against the uniform quarter": pairs_table(runs),
        "Which score predicts": prediction_table(runs),
        "Data": data_table(runs),
        "Route": route_table(runs), "Matrices": modules_table(runs),
        "Pruning": pruning_table(runs), "Ways to heal": healing_table(runs),
        "A second language model: Gemma 3 270M, 18 layers": regions_table(load(GEMMA)) if GEMMA.is_file() else "",
        "LoRA": regions_table(runs, "lora"), "Three times the steps": regions_table(runs, "longer"),
        "Three times the steps, with a route": route_table(runs, "longer"),
    }  # fmt: skip
    parts = [
        "# Tables of the study on thirty layers", "Made by `python examples/thirty_layers/table.py` from"
        " `results/thirty_layers.json`; percent. ± is the standard deviation over seeds; intervals are over questions,"
        " each averaged over seeds; in parentheses is what each seed keeps.",
        *(f"## {title}\n\n{found}" for title, found in sections.items() if found),
    ]  # fmt: skip
    TABLES.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure(runs, FIGURES / "thirty_regions.svg")
    print(TABLES)


if __name__ == "__main__":
    main()

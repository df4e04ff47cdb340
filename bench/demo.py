"""The demo over several seeds: what each of its ways of tuning keeps, and what it costs, as a table.

    python bench/demo.py --seeds 0 1 2        # writes bench/results/demo.json; minutes a seed

Time and memory are also given relative to the usual recipe and to tuning all layers, within each seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from striate.studies.demo import demo

RESULTS = Path(__file__).parent / "results" / "demo.json"
MEASURED = {"train_seconds": 0, "peak_memory_gb": 2}


def main() -> None:
    """Run the seeds that are not there, write the figures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    for seed in options.seeds:
        if not (options.out / f"demo-{seed}" / "summary.json").is_file():
            demo(out=options.out / f"demo-{seed}", seed=seed)
    found = [json.loads((options.out / f"demo-{seed}" / "summary.json").read_bytes()) for seed in options.seeds]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """A line a way of tuning; medians, and each seed in parentheses."""
    titles = (
        "tuned",
        "visual %",
        "kept % of all",
        "text %",
        "s",
        "GB",
        "time of usual",
        "of all",
        "memory of usual",
        "of all",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in found[0]["runs"]:
        if name == "backbone":
            continue
        runs = [one["runs"] for one in found]
        cells = [spread([100 * run[name]["visual"] for run in runs]), ratios(runs, name, "all", "visual", 100)]
        cells += [spread([100 * run[name]["text"] for run in runs])]
        cells += [spread([run[name][key] for run in runs], digits) for key, digits in MEASURED.items()]
        cells += [ratios(runs, name, other, key) for key in MEASURED for other in ("usual", "all")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(runs: list[dict[str, Any]], name: str, other: str, key: str, scale: float = 1) -> str:
    """A figure relative to another way of tuning, within each seed."""
    return spread([scale * run[name][key] / run[other][key] for run in runs], 1 if scale > 1 else 2)


def spread(values: list[float], digits: int = 1) -> str:
    """The median, and all values."""
    return f"**{median(values):.{digits}f}** ({', '.join(f'{value:.{digits}f}' for value in values)})"


if __name__ == "__main__":
    main()

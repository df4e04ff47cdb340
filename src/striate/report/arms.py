"""Arms: runs that differ only in the seed, as one line of a table and one curve of a figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from striate.errors import UserError
from striate.plot import Estimate
from striate.region import PAPER, Region

if TYPE_CHECKING:
    from striate.report.comparison import Row

# Options that change where or how fast a run goes, not what comes out.
ASIDE = ("seed", "out", "progress", "device", "workers", "save_steps", "report_to", "dry_run")
# Options that name files or folders, which may be made anew for every seed.
FILES = ("model", "data", "images", "heal", "scores", "backbone", "visual", "text", "vision", "llm", "projector")
BLOCKS = ("uniform", "first", "last", "middle", "hybrid")


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ only in the seed (and in what was made from it: data, parent, a region drawn at random)."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """One run for what all of them share."""
        return self.rows[0]

    @property
    def measured(self) -> tuple[Row, ...]:
        """The runs with results."""
        return tuple(row for row in self.rows if row.tasks)

    @property
    def region(self) -> Region | None:
        """The region that all runs share."""
        regions = {row.region for row in self.rows}
        return self.first.region if len(regions) == 1 else None

    @property
    def size(self) -> int | None:
        """Number of layers that were trained, when it is the same in all runs."""
        sizes = {len(row.region) for row in self.rows if row.region is not None}
        return sizes.pop() if len(sizes) == 1 else None

    def mean(self, measure: Callable[[Row], Estimate | float | None]) -> Estimate | None:
        """What the runs measured: of one run its own number and standard error, else mean and standard deviation."""
        found = [value for row in self.rows if (value := measure(row)) is not None]
        if not found:
            return None
        estimates = [value if isinstance(value, Estimate) else Estimate(value) for value in found]
        values = [one.value for one in estimates]
        return estimates[0] if len(values) == 1 else Estimate(fmean(values), stdev(values))


def arms(rows: Sequence[Row]) -> tuple[Arm, ...]:
    """Rows put together that differ only in the seed, in the order of their first; a repeated seed stays apart."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        repeat = 0
        while any(_once(row) == _once(other) for other in groups.get((row.treatment, repeat), ())):
            repeat += 1
        groups.setdefault((row.treatment, repeat), []).append(row)
    names = _names(list(groups.values()))
    return tuple(Arm(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True))


def _once(row: Row) -> tuple[Any, ...]:
    return row.info.get("seed"), row.records


def _names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """A name for each: of single runs their own; of several the one that they share, perhaps but for the seed."""
    wanted = [_name(group) for group in groups]
    taken = {group[0].name for group in groups if len(group) == 1}
    return [
        name if len(group) == 1 or (wanted.count(name) == 1 and name not in taken) else f"{name} ({number})"
        for number, (name, group) in enumerate(zip(wanted, groups, strict=True), start=1)
    ]


def _name(group: Sequence[Row]) -> str:
    if len(group) == 1:
        return group[0].name
    own = {str(row.info.get("name") or row.run.path.name): row.info.get("seed") for row in group}
    shared = {re.sub(r"[-_ ]?(seed[-_=]?)?#", "", _unseeded(name, seed)) for name, seed in own.items()}
    for names in (set(own), shared):
        if len(names) == 1 and all(names):
            return names.pop()
    return " / ".join(sorted(own))[:60]


def treatment(name: str, info: Mapping[str, Any], region: Region | None) -> str:
    """The same text for runs that differ only in the seed, and for no others."""
    seed = info.get("seed")
    options = {
        key: _unseeded(value, seed) if key in FILES else value
        for key, value in (info.get("options") or {}).items()
        if key not in ASIDE
    }
    pruned = "prune" in info or info.get("verb") == "prune"
    if region is not None and not pruned:
        options["region"] = f"random {len(region)}" if kind(region) == "random" else str(region)
    # A run that does not say how it was made is like no other.
    alone = name if not options else ""
    parent = _unseeded(info.get("parent"), seed)
    return json.dumps([info.get("verb"), options, parent, alone], sort_keys=True, default=str)


def start(row: Row) -> str:
    """The model that a run started from, by the name of its folder, its size and its depth."""
    parent = _unseeded(row.info.get("parent"), row.info.get("seed"))
    name = Path(str(parent)).name if parent else ""
    size = row.training("total_parameters")
    depth = row.region.depth if row.region is not None else row.info.get("depth")
    return json.dumps([name, size, depth])


def kind(region: Region) -> str:
    """How the layers of a region were chosen: "uniform", "last", "top by gradient", ... or "listed"."""
    if len(region) in (0, region.depth):
        return str(region)
    form, _, rest = region.origin.partition(":")
    if form in ("top", "bottom", "spread") and rest:
        return f"{form} by {rest.rpartition(':')[2]}"
    if region.origin in PAPER:
        return region.origin
    if form in (*BLOCKS, "random"):
        _, _, shift = rest.partition("@")
        return f"{form}@{shift}" if shift.strip("0") and form == "uniform" else form
    for block in BLOCKS:
        if _same(region, f"{block}:{len(region)}"):
            return block
    shifted = (offset for offset in range(1, region.depth) if _same(region, f"uniform:{len(region)}@{offset}"))
    offset = next(shifted, None)
    return f"uniform@{offset}" if offset is not None else "listed"


def _same(region: Region, form: str) -> bool:
    try:
        return Region.parse(form, region.depth) == region
    except UserError:
        return False


def _unseeded(path: Any, seed: Any) -> Any:
    """A path with the run's seed left out: behind the word "seed", or, without that word, where it stands alone."""
    if not isinstance(path, str) or not isinstance(seed, int):
        return path
    end = rf"{seed}(?![^\W_]|\.\d)"
    named, times = re.subn(rf"(?<=seed)([-_=]?){end}", r"\1#", path)
    return named if times else re.sub(rf"(?<![^\W_])(?<!\.){end}", "#", path)

"""The plan of a sweep: its cells with their options and content, checked against model and data, and the
forecast of its time and memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from striate import __version__
from striate.data import read
from striate.errors import UserError, nearest
from striate.evaluation import resolve_all, sample_tasks
from striate.prune import Criterion, protected_layers
from striate.prune.plan import PruneRequest
from striate.region import AUTO, SCORES, Region, auto_size
from striate.routing import resolve as resolve_route
from striate.runs.options import call_arguments, options_of
from striate.runs.provenance import content_of, difference
from striate.runs.run import Run
from striate.scores.table import Scores
from striate.studies.sweep.cell import FILE, FINISHED, NOTES, Cell
from striate.studies.sweep.display import Forecast, ForecastRow
from striate.studies.sweep.sheet import VERBS, Sheet, Values, at, read_sheet
from striate.train import check_tuning, num_samples
from striate.train.memory import full_tuning_fits
from striate.train.options import total_steps
from striate.vlm import Selection, Vlm, load_on_meta, select
from striate.vlm.devices import default_device

LONGEST = 80  # characters of a cell's name
# In the digest of a run these paths stand for the content they lead to.
CONTENTS = ("model", "data", "heal", "scores")


@dataclass(frozen=True)
class Recipe:
    """Every option of the verbs of one cell, except the run folders.

    Where `tune` measures the region, `region` is a uniform one of the same size, for what it trains; a `route` that is
    measured, or follows such a region, is a text. `prunings` belong to the cell's runs but the first. `trainable`
    counts parameters.
    """

    cell: Cell
    region: Region
    route: Region | str | None
    tune: Values
    eval: Values
    prunings: tuple[Values, ...]
    trainable: int = 0

    @property
    def measured(self) -> bool:
        """Whether `tune` measures the region."""
        return str(self.tune["region"]).startswith(AUTO)

    @property
    def layers(self) -> str:
        """The layers that it trains, or how they will be measured."""
        return self.tune["region"] if self.measured else str(self.region)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep file checked against its model: one recipe per cell. `method` is that of "auto" for all cells."""

    sheet: Sheet
    recipes: tuple[Recipe, ...]
    method: str | None
    content_of: Callable[..., Values] = field(default_factory=lambda: cache(content_of), compare=False)  # read once

    @property
    def about(self) -> Values:
        """The fields of sweep.json other than the cells."""
        sheet = self.sheet
        return {
            "striate": __version__, "file": str(sheet.file), "model": sheet.model, "data": sheet.data,
            "method": self.method,
        }  # fmt: skip

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells, in the order of the grid."""
        return tuple(recipe.cell for recipe in self.recipes)

    def recipe(self, name: str) -> Recipe:
        """The recipe of a cell by its name."""
        for recipe in self.recipes:
            if recipe.cell.name == name:
                return recipe
        raise UserError(f"{self.sheet.file} has no cell {nearest(name, [cell.name for cell in self.cells])}")

    def made_from(self, recipe: Recipe) -> dict[str, Values]:
        """For each run folder of a cell, everything that decides its content."""
        tuned = {"striate": __version__, "layers": recipe.layers}
        tuned |= {"route": str(recipe.route)} if recipe.route else {}
        tuned |= self._describe("tune", recipe.tune) | self._describe("eval", recipe.eval)
        made = {recipe.cell.runs[0].name: tuned}
        for folder, pruning in zip(recipe.cell.runs[1:], recipe.prunings, strict=True):
            made[folder.name] = tuned | self._describe("prune", pruning)
        return made

    def _describe(self, verb: str, values: Values) -> Values:
        """The options as JSON values; paths are replaced by digests of their content."""
        described: Values = {}
        for key, value in values.items():
            if key in CONTENTS and value is not None:
                split = values.get("split", "train") if key in ("data", "heal") else None
                with at(self.sheet.file):
                    described |= self._content(f"{verb}.{key}", value, split)
            elif key not in ("model", "out"):
                described[f"{verb}.{key}"] = json.loads(_plain(value))
        return described

    def _content(self, key: str, value: Any, split: str | None) -> Values:
        if isinstance(value, list):
            numbered = (self._content(f"{key} {number}", one, split) for number, one in enumerate(value, start=1))
            return {name: found for content in numbered for name, found in content.items()}
        if key.endswith("scores") and Path(value).is_dir():
            value = Path(value) / SCORES
        return {
            f"{key}/{name}" if name else key: found for name, found in self.content_of(str(value), split=split).items()
        }

    def foreign(self, recipe: Recipe) -> Iterator[tuple[Path, str]]:
        """The run folders of the cell that were made from other options or content, and the difference.

        Raises:
            UserError: a folder is not the sweep's own.
        """
        noted = recipe.cell.note.made_from
        for name, now in self.made_from(recipe).items():
            folder = self.sheet.out / name
            if not folder.exists():
                continue
            if name not in noted:
                raise UserError(
                    f"{folder} was not made by this sweep: choose another `out` or remove it", see="folder-in-use"
                )
            if found := difference(noted[name], now):
                yield folder, found

    def finished(self, recipe: Recipe) -> bool:
        """Whether the cell is complete and was made from the present sweep file and content."""
        return recipe.cell.complete and not any(self.foreign(recipe))

    def check_folders(self, *, redo: bool) -> None:
        """Raise `UserError` if a folder is not the sweep's own or, without `redo`, holds another run."""
        found = [(folder, why) for recipe in self.recipes for folder, why in self.foreign(recipe)]
        if found and not redo:
            (folder, why), more = found[0], len(found) - 1
            others = f" (and {more} more folder{'s' * (more > 1)})" if more else ""
            raise UserError(
                f"{folder} holds another run: {why}{others}; --redo replaces it, another `out` keeps it",
                see="folder-in-use",
            )


def read_plan(file: Path, *, workers: int = 1) -> SweepPlan:
    """Read a sweep file and check it against its model: regions, layers to prune, files.

    `workers` are how many cells are to share the memory of a CPU, where "auto" has to choose a method.

    Raises:
        UserError: the file is invalid; the message names the key.
    """
    sheet = read_sheet(file)
    with at(file):
        with at("model"):
            vlm = load_on_meta(sheet.model)
        recipes = tuple(_check(recipe, vlm) for recipe in _recipes(sheet, vlm.depth))
    autos = [recipe for recipe in recipes if recipe.tune["method"] == "auto"]
    method = (_saved_method(sheet.out) or _method(autos, vlm, workers)) if autos else None
    decided = (
        replace(recipe, tune={**recipe.tune, "method": method}) if recipe in autos else recipe for recipe in recipes
    )
    return SweepPlan(sheet, tuple(_count_parameters(recipe, vlm) for recipe in decided), method)


def num_records(plan: SweepPlan) -> int:
    """The number of training records; all data is read, so that its errors show before anything runs."""
    sheet, settings = plan.sheet, plan.recipes[0].tune
    with at(sheet.file):
        with at("data"):
            found = read(sheet.data, images=sheet.images, on_bad=settings["on_bad_record"])
            for recipe in plan.recipes:
                if recipe.tune["samples"] is not None:
                    num_samples(recipe.tune["samples"], len(found))
        if plan.recipes[0].eval["data"]:
            _check_questions(plan.recipes[0].eval)
    return len(found)


def _check_questions(options: Values) -> None:
    """Read the records of an evaluation and choose its tasks among them."""
    settings = {"images": options["images"], "on_bad": options["on_bad_record"], "split": options["split"]}
    with at("eval.data"):
        found = (record for path in options["data"] for record in read(path, **settings))
        records, _ = resolve_all(found, stop=options["on_bad_record"] == "stop")
    with at("eval.tasks"):
        sample_tasks(records, tasks=options["tasks"])


def num_steps(recipe: Recipe, records: int) -> int:
    """Optimizer steps of a cell."""
    settings = recipe.tune
    sampled = records if settings["samples"] is None else num_samples(settings["samples"], records)
    return total_steps(sampled, **{name: settings[name] for name in ("steps", "epochs", "batch")})


def _recipes(sheet: Sheet, depth: int) -> Iterator[Recipe]:
    """The grid, cell by cell."""
    choices = [dict(zip(sheet.axes, chosen, strict=True)) for chosen in itertools.product(*sheet.axes.values())]
    pruned = [] if sheet.prune is None else itertools.product(*sheet.cuts.values())
    cuts = [dict(zip(sheet.cuts, chosen, strict=True)) for chosen in pruned]
    names, endings = _names(choices, "tuned"), _names(cuts, "pruned")
    for name, chosen in zip(names, choices, strict=True):
        tune = _defaults("tune") | sheet.tune | chosen
        tune |= {"model": sheet.model, "data": sheet.data, "images": sheet.images}
        with at("grid.region" if "region" in chosen else "tune.region"):
            size = auto_size("--region", tune["region"], depth)
            region = Region.parse(f"uniform:{size}" if size else tune["region"], depth)
        with at("grid.route" if "route" in chosen else "tune.route"):
            measured = size is not None or auto_size("--route", tune["route"], depth) is not None
            route = tune["route"] if measured else resolve_route(tune["route"], region)
        # Defaults that the sections override:
        evaluate = _defaults("eval") | {"images": sheet.images} | sheet.eval
        shared = {"data": sheet.data, "images": sheet.images, "seed": tune["seed"]}
        prune = _defaults("prune") | shared | (sheet.prune or {})
        folders = (sheet.out / name, *(sheet.out / f"{name}+{ending}" for ending in endings))
        cell = Cell(name, chosen, folders, tuple({f"prune.{key}": value for key, value in cut.items()} for cut in cuts))
        yield Recipe(cell, region, route, tune, evaluate, tuple(prune | cut for cut in cuts))


def _defaults(verb: str) -> Values:
    return {option.name: None if option.required else option.default for option in options_of(VERBS[verb][0])}


def _names(choices: list[Values], alone: str) -> list[str]:
    """A file name for each choice; one that is too long, or the same as another, ends in a digest of the choice."""
    names = ["_".join(_part(key, value) for key, value in choice.items()) or alone for choice in choices]
    taken = Counter(name.casefold() for name in [*names, NOTES, FILE])
    return [
        name
        if taken[name.casefold()] == 1 and len(name) <= LONGEST
        else f"{name[:LONGEST]}~{hashlib.sha256(_plain(choice).encode()).hexdigest()[:8]}"
        for name, choice in zip(names, choices, strict=True)
    ]


def _part(key: str, value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9.,%@=]+", "-", value if isinstance(value, str) else _plain(value)).strip("-.")
    return text if key == "region" else f"{key}-{text}"


def _check(recipe: Recipe, vlm: Vlm) -> Recipe:
    """The recipe, after a check of its options, and that its prunings are possible on this model.

    Raises:
        UserError: an option cannot have its value, a pruning is not possible, or the cell trains no parameter.
    """
    for verb, options in (("tune", recipe.tune), ("eval", recipe.eval), *(("prune", one) for one in recipe.prunings)):
        with at(f"{verb} of {recipe.cell.name}"):
            call_arguments(VERBS[verb][0], options)  # the dataclasses of options check their values
    with at(f"tune of {recipe.cell.name}"):
        check_tuning(**{name: recipe.tune[name] for name in ("method", "projector", "rank", "alpha", "dropout")})
        _selection(recipe, vlm)
    for values in recipe.prunings:
        with at(f"prune of {recipe.cell.name}"):
            request = PruneRequest(values["region"], values["remove"], values["layers"])
            kept = recipe.region | recipe.route if isinstance(recipe.route, Region) else recipe.region
            keep = Region.parse(values["region"], vlm.depth) if values["region"] else kept
            protected = protected_layers(vlm)
            candidates = [layer for layer in range(vlm.depth) if layer not in keep and layer not in protected]
            if values["layers"] is not None:
                known = keep if values["region"] or not recipe.measured else Region((), vlm.depth)
                request.named_layers(known, protected)  # of layers that will be measured, `prune` says it
                continue
            request.amount(candidates, keep, protected)
            saved = None if values["scores"] is None else Scores.load(values["scores"])
            Criterion(values["by"], saved, values["seed"]).check(data=True)
    return recipe


def _selection(recipe: Recipe, vlm: Vlm) -> Selection:
    tune = recipe.tune
    return select(vlm, recipe.region, modules=tune["modules"], projector=tune["projector"] != "freeze")


def _count_parameters(recipe: Recipe, vlm: Vlm) -> Recipe:
    """The recipe with the number of parameters that it trains."""
    plan = _selection(recipe, vlm)
    number = plan.trainable
    if recipe.tune["method"] == "lora":
        linear = [vlm.model.get_submodule(name) for name in vlm.linear_modules(recipe.region, plan.modules)]
        sides = sum(module.in_features + module.out_features for module in linear if isinstance(module, nn.Linear))
        number = plan.counts["projector"] + recipe.tune["rank"] * sides
    return replace(recipe, trainable=number)


def _saved_method(out: Path) -> str | None:
    """The method that was chosen when the sweep was first planned: free memory differs every time."""
    try:
        return json.loads((out / FILE).read_bytes())["method"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _method(recipes: list[Recipe], vlm: Vlm, workers: int) -> str:
    """The method for "auto", one for all cells so that they can be compared: full if the largest of them fits."""
    named = recipes[0].tune["device"]
    device = torch.device(named) if named else default_device()
    plans = [_selection(recipe, vlm) for recipe in recipes]
    # The frozen model is not in memory yet: in 16 bit its weights take an eighth of what a trained one takes.
    most = max(plan.trainable for plan in plans) + plans[0].total // 8
    return "full" if full_tuning_fits(most * (workers if device.type == "cpu" else 1), device) else "lora"


def _plain(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def forecast(plan: SweepPlan, records: int) -> Forecast:
    """The cells, what they train, and the time and memory of the unfinished ones; `records` is the size of the data."""
    finished = [recipe for recipe in plan.recipes if plan.finished(recipe)]
    rows = []
    for recipe in plan.recipes:
        done = recipe in finished
        status = FINISHED if done else recipe.cell.refresh().status
        row = ForecastRow(recipe.cell.name, status, recipe.layers, recipe.trainable)
        if not done:
            row = row._replace(seconds=predict(recipe, finished, records), memory=_measured_memory(recipe, finished))
        rows.append(row)
    return Forecast(tuple(rows))


def _measured_memory(recipe: Recipe, finished: Sequence[Recipe]) -> float | None:
    """Mean peak bytes of finished cells of the same region."""
    alike = [Run(other.cell.runs[0]).info["training"] for other in finished if other.region == recipe.region]
    return 1e9 * fmean(training["peak_memory_gb"] for training in alike) if alike else None


def predict(recipe: Recipe, finished: Sequence[Recipe], records: int) -> float | None:
    """Predicted seconds of a cell: mean training time per record and mean time of everything else of finished cells.

    Cells of the same region count alone where there are any. None when no cell has finished. Loading the model is
    not counted.
    """
    alike = [other for other in finished if other.region == recipe.region] or finished
    steps = num_steps(recipe, records)
    if not alike:
        return None
    return fmean(map(_seconds_per_record, alike)) * steps * recipe.tune["batch"] + fmean(map(_other_seconds, alike))


def _seconds_per_record(recipe: Recipe) -> float:
    training = Run(recipe.cell.runs[0]).info["training"]
    return training["seconds"] / max(1, training["samples"])


def _other_seconds(recipe: Recipe) -> float:
    """Seconds of evaluation and pruning."""
    runs = [Run(folder) for folder in recipe.cell.runs]
    return sum((run.results or {}).get("seconds", 0.0) for run in runs) + sum(run.info["seconds"] for run in runs[1:])

"""A proposal of what to train: scores, loss of a route, reasons, and the recipe for `striate tune --config`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Group
from rich.text import Text

from striate import routing
from striate.data import Batch
from striate.errors import UserError, first_line
from striate.region import Region
from striate.runs import terminal
from striate.scores.consensus import Sureness
from striate.scores.likelihood import AnswerTokens
from striate.scores.table import Scores
from striate.studies.choose.fitting import Budget, Fit
from striate.studies.sweep.display import duration
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

NOISE = 2.0
"""Standard errors within which a loss counts as none."""


@dataclass(frozen=True)
class Choice:
    """What to train, and why: the measured `scores`, what fits, how sure the layers are, what a route would cost.

    `model`, `data` and `images` are written into the recipe.
    """

    scores: Scores
    fit: Fit
    sureness: Sureness
    route_loss: RouteLoss
    budget: Budget
    num_records: int
    model: str = ""
    data: str = ""
    images: str = ""

    def of(self, *, model: str, data: Path, images: Path | None) -> Choice:
        """The same, for a recipe that names the model and the data."""
        return replace(self, model=model, data=str(data), images=str(images or ""))

    @property
    def region(self) -> Region:
        """The layers to train."""
        return self.fit.region

    @property
    def modules(self) -> str:
        """The matrices of these layers to train."""
        return self.fit.step.setup.modules

    @property
    def method(self) -> str:
        """full or lora."""
        return self.fit.step.setup.method

    @property
    def route(self) -> str:
        """none, or same: image tokens pass through the region and layer 0 alone."""
        return "same" if self.route_loss.harmless else "none"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Five lines: region, modules, method, route, how sure."""
        return (
            f"region {self.region}: {self._why_region()}",
            f"modules {self.modules}: {self._why_modules()}",
            f"method {self.method}: {self._why_method()}",
            f"route {self.route}: {self._why_route()}",
            f"sure: {self._how_sure()}",
        )

    def recipe(self) -> dict[str, Any]:
        """The options of `tune`."""
        setup = self.fit.step.setup
        named = {"model": self.model, "data": self.data, "images": self.images}
        chosen = {"region": str(self.region), "modules": self.modules, "method": self.method, "route": self.route}
        amount = {"steps": self.fit.steps} if self.fit.shortened else {}
        sizes = {"rank": setup.rank} if self.method == "lora" else {}
        return {
            **{key: value for key, value in named.items() if value},
            **chosen, **sizes, "batch": setup.batch, "micro_batch": setup.micro_batch, **amount,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the recipe with the reasons as comments: `striate tune --config PATH --out RUN`."""
        comments = "".join(f"# {line}\n" for line in self.reasons)
        text = comments + yaml.safe_dump(self.recipe(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def __rich__(self) -> Group:
        """The scores as heat strips, the region under them, and the reasons."""
        wide = terminal.layer_width(self.scores.depth)
        cells = [("■" if layer in self.region else "·") * wide for layer in range(self.scores.depth)]
        return Group(terminal.heat_strips(self.scores), Text("".join(cells), "bold cyan"), *map(Text, self.reasons))

    def _why_region(self) -> str:
        share = f"{len(self.region)} of {self.region.depth} layers"
        if self.sureness.trusted:
            return f"{share}; of each equal stretch of the depth the layer that {self._names()} rank highest"
        return f"{share}, evenly spread, as in the paper: the scores ({self._names()}) are no better guide here"

    def _why_modules(self) -> str:
        if self.method == "lora":
            return "adapters on every linear module; with trained weights not even gate_up fits"
        if self.modules == "all":
            return "whole layers fit. gate_up alone forgets less in one paper (arXiv 2510.08564); not measured here"
        return "whole layers do not fit; gate_up learned almost as much in one paper (arXiv 2510.08564)"

    def _why_method(self) -> str:
        step, steps = self.fit.step, f"{self.fit.steps} step{'s' * (self.fit.steps > 1)}"
        if self.fit.shortened:
            steps += f" of the {math.ceil(self.num_records / step.setup.batch)} of an epoch"
        recomputed = ", activations recomputed" if step.setup.checkpointing else ""
        refused = "".join(f"; {way} would take {size / 1e9:.3g} GB" for way, size in self.fit.refused[:1])
        seconds = self.fit.steps * step.seconds(*self.budget.machine.reached)
        return (
            f"predicted {step.memory.peak / 1e9:.3g} GB of {self.budget.memory / 1e9:.3g} GB{recomputed}, "
            f"{steps} in {duration(seconds)} on {self.budget.machine.name}{refused}"
        )

    def _why_route(self) -> str:
        lost = self.route_loss
        if lost.why:
            return f"not measured: {lost.why}"
        rise = f"{lost.rise:+.3g} ± {lost.stderr:.1g} nats per answer token without training (n {lost.n})"
        if self.route == "same":
            return f"images through the region and layer 0 alone cost nothing measurable: {rise}"
        return f"images through the region and layer 0 alone would cost {rise}"

    def _how_sure(self) -> str:
        return (
            f"{self.sureness.numbers} (n {self.scores.samples}). No measurement shows that they beat uniform: compare "
            f"with --region uniform:{len(self.region)}"
        )

    def _names(self) -> str:
        return ", ".join(self.scores.scores)


@dataclass(frozen=True)
class RouteLoss:
    """Mean rise of the answers' loss with the route `same`, in nats per answer token, its standard error, and the
    number of records; or `why` it was not measured."""

    rise: float = 0.0
    stderr: float = 0.0
    n: int = 0
    why: str = ""

    @property
    def harmless(self) -> bool:
        """Whether the rise is within noise, or the loss falls."""
        return self.n > 1 and self.rise <= NOISE * self.stderr


def route_loss(vlm: Vlm, region: Region, batches: Callable[[], Generator[Batch]]) -> RouteLoss:
    """The rise of the answers' loss when image tokens pass through `region` and layer 0 alone."""
    route = routing.resolve("same", region)
    if route is None or len(route) == vlm.depth:
        return RouteLoss(why="the region is the whole model")
    rises = []
    try:
        with closing(batches()) as stream, torch.no_grad(), eval_mode(vlm.model):
            for batch in stream:
                answers = AnswerTokens.of(batch)
                plain = answers.means(answers.nll(answers.logits(vlm, batch)))
                with routing.route(vlm, route):
                    routed = answers.means(answers.nll(answers.logits(vlm, batch)))
                rises.append((routed - plain)[batch.image_mask.any(dim=1)])
    except UserError as error:  # a family that cannot be routed
        return RouteLoss(why=first_line(error))
    found = torch.cat(rises).cpu()
    if len(found) < 2:
        return RouteLoss(why=f"{len(found)} record with an image is too few")
    return RouteLoss(float(found.mean()), float(found.std() / len(found) ** 0.5), len(found))

"""What watches a training: the step-1 audit, the run's log, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from torch import nn
from transformers import TrainerCallback

from striate.errors import UserError
from striate.processes import Rank
from striate.run import Run
from striate.train.finite import Losses
from striate.train.sharding import own


class Audit(TrainerCallback):
    """Fails the run after its first step if a parameter that should train got no gradient, or a frozen one changed.

    `visual` are the parameters that only pictures train; after a step without any (`saw` says so) they have no
    gradient, and the audit waits for one with. The longest records, which come first, are often text alone.
    """

    def __init__(
        self, model: nn.Module, trained: dict[str, nn.Parameter], *, visual: Collection[str], saw: Callable[[], bool]
    ) -> None:
        chosen = {id(parameter) for parameter in trained.values()}
        self.trained, self.visual, self.saw = trained, visual, saw
        self.frozen = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
        self.before: dict[str, int] | None = None
        self.stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the frozen weights."""
        self.before = {name: checksum(p) for name, p in self.frozen.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for missing gradients, once; a step whose records were all left out has none to look for."""
        idle = [name for name, parameter in self.trained.items() if parameter.grad is None]
        self.stepped = len(idle) < len(self.trained)
        if self.before is None or not self.stepped:
            return
        if idle and not self.saw() and all(name in self.visual for name in idle):
            self.stepped = False
        elif idle:
            raise UserError(f"{len(idle)} parameters should train but got no gradient, {idle[0]} among them")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for frozen weights that changed, once."""
        if self.before is None or not self.stepped:
            return
        moved = [name for name, p in self.frozen.items() if checksum(p) != self.before[name]]
        self.before = None
        if moved:
            raise UserError(f"{len(moved)} frozen parameters changed in the first step, {moved[0]} among them")


class Freeze(TrainerCallback):
    """Freezes parameters after a share of the steps, in [0, 1]; then nothing is computed for them any more."""

    def __init__(self, parameters: Sequence[nn.Parameter], share: float) -> None:
        self.parameters, self.share = parameters, share

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze when it is time; the first step, which is audited, trains all."""
        if state.global_step >= max(1, round(self.share * state.max_steps)):
            for parameter in self.parameters:
                parameter.requires_grad_(False)


def checksum(parameter: torch.Tensor) -> int:
    """The sum of a tensor's bit patterns as integers: any single changed value changes it.

    Where it is spread over processes, of the part that is here.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(own(parameter.detach()).contiguous().view(bits).sum(dtype=torch.int64))


class RunLog(TrainerCallback):
    """Writes one line a step into the run; when asked to, shows a bar, and above it the notes."""

    def __init__(self, run: Run, *, bar: bool, notes: Sequence[str] = ()) -> None:
        self.run, self.began, self.notes = run, 0.0, notes
        self.ids: list[str] = []  # of the step's records
        self.marks: dict[str, Any] = {}  # what else its line is to say
        self.losses = Losses()
        self.bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True, disable=not bar)
        self.task = self.bar.add_task("", start=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()
        done = [entry for entry in self.run.history() if entry["step"] <= state.global_step]
        self.losses = Losses([entry["loss"] for entry in done if entry["loss"] is not None])
        self.bar.start()
        if not self.bar.disable:
            for note in self.notes:
                self.bar.console.print(note, style="dim", markup=False, highlight=False)
        self.bar.start_task(self.task)
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step, description=self.run.path.name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the step's loss, gradient norm and learning rate, and whose records made the loss leap."""
        if not logs or "loss" not in logs:
            return
        seconds, marks, self.marks = round(time.monotonic() - self.began, 3), self.marks, {}
        loss = None if "not_finite" in marks else logs["loss"]
        if loss is not None and self.losses.spike(loss):
            marks["spike"] = self.ids
        entry: dict[str, Any] = {"step": state.global_step, "loss": loss, "lr": logs.get("learning_rate")}
        norm = logs.get("grad_norm") if loss is not None else None
        self.run.log(entry | {"grad_norm": norm, "seconds": seconds, **marks})
        self.bar.update(self.task, completed=state.global_step, description=f"loss {logs['loss']:.3f}")

    def warn(self, text: str) -> None:
        """Keep a warning in the run; with a bar, show it above it."""
        if not self.bar.disable:
            self.bar.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
        with suppress(UserError):  # a full disk is one of the things to be warned of
            self.run.warn(text)


class Interrupt(TrainerCallback):
    """On Ctrl-C, or SIGTERM from a scheduler: finish the step, save what a resumed run needs, stop. Another one, a
    second later or more, stops at once: a launcher passes on what the terminal has sent already."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SOON = 1.0  # seconds

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.asked: float | None = None  # when, by the monotonic clock
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals, where a handler can be set (in the main thread)."""
        try:
            self.previous = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        except ValueError:
            self.previous = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop when any process was asked; signals need not reach all of them in the same step."""
        first = next((asked for asked in self.rank.gathered(self.asked) if asked is not None), None)
        if first is not None:
            self.asked = self.asked or first
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.restore()

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _ask(self, *_: Any) -> None:
        now = time.monotonic()
        if self.asked is not None and now - self.asked > self.SOON:
            self.restore()
            raise KeyboardInterrupt
        self.asked = self.asked or now

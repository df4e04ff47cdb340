"""The training loop: the Hugging Face `Trainer` with our batches, answer loss, data order, and care about memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer

from striate.data import IGNORED, Batch, Examples, Skipped
from striate.errors import UserError
from striate.run import Run
from striate.train.checkpointing import Checkpointing
from striate.train.loss import Shortcuts, Teacher, answer_losses
from striate.train.order import LengthGrouped
from striate.train.thinning import Thinning
from striate.vlm import Vlm, first_line

TRAINED = "trained.safetensors"  # in a saved state: the parameters that train
MOST_SKIPPED = 0.01  # share of the records; more bad ones than this mean that the data is wrong, not a record


Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters of one part of the model (layers, projector, tower), by name, and their peak learning rate."""

    parameters: Named
    rate: float


class RegionTrainer(Trainer):
    """`Trainer` on `Batch`es. The loss is the mean over the answer tokens of one optimiser step, on all devices.

    `groups` are what trains; `most_skipped` is the share of records that may turn out to be bad before the run stops.
    With a `teacher` the loss is `distilled`. Where memory does not suffice, the step is done again with more layers
    computed again, as `checkpointing` allows.
    """

    model: PreTrainedModel
    train_dataset: Examples

    def __init__(
        self,
        *,
        vlm: Vlm,
        run: Run,
        groups: dict[str, Group],
        most_skipped: float,
        shortcuts: Shortcuts,
        checkpointing: Checkpointing,
        thinning: Thinning,
        teacher: Teacher | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.vlm, self.run, self.teacher = vlm, run, teacher
        self.groups, self.most_skipped = groups, most_skipped
        self.model_accepts_loss_kwargs = True  # the loss below is already a mean over the whole optimiser step
        self.shortcuts, self.checkpointing, self.thinning = shortcuts, checkpointing, thinning
        self.step: list[Batch] = []
        self.start: list[torch.Tensor] = []
        self.samples = 0
        self.clock = Clock()
        self.left_out: dict[str, Skipped] = {}  # by source: a bad record comes up again in every epoch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of one optimiser step and the number of answer tokens in them, on all devices."""
        began = time.monotonic()
        batches = list(islice(epoch_iterator, num_batches))
        self.clock.note_wait(began)
        batches = self.thinning.in_step(batches, self.state.global_step, self.state.max_steps)
        self.step, self.start = batches, _random_states(device)
        answers = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches if len(batch))
        return batches, self.accelerator.gather(torch.tensor(answers, device=device)).sum().clamp(min=1)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch; a batch of bad records only is passed over."""
        batch: Batch = inputs
        self._note_skipped(batch)
        if not len(batch):
            return torch.zeros((), device=self.args.device)
        self.samples += len(batch) * self.args.world_size
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            said = first_line(error)
        # Behind the handler: while it lasts, the error holds what the forward pass kept.
        return self._again(model, batch, num_items_in_batch, said)

    def _again(self, model: nn.Module, batch: Batch, num_items: Any, said: str) -> torch.Tensor:
        """The optimiser step up to this batch once more, from the same random numbers, with less memory."""
        if not self.checkpointing.tighten():
            raise UserError(
                f"out of memory ({said}): set --micro-batch below {len(batch)}, or --max-length, --method lora, "
                "--checkpointing auto"
            )
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        model.zero_grad(set_to_none=True)
        _set_random_states(self.start, self.args.device)
        loss = torch.zeros((), device=self.args.device)
        for earlier in self.step:
            if len(earlier):
                self.samples -= len(earlier) * self.args.world_size
                loss = self.training_step(model, earlier, num_items)
            if earlier is batch:
                break
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the answer tokens over their number in the optimiser step."""
        batch: Batch = inputs.to(self.args.device)
        losses = answer_losses(self.vlm, model, batch, shortcuts=self.shortcuts, teacher=self.teacher)
        loss = losses.sum() / num_items_in_batch
        return loss * self.accelerator.num_processes  # devices average their gradients; the mean is over all tokens

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each part that trains, with its own learning rate; no decay on norms and biases."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decaying = set(self.get_decay_parameter_names(self.model))
            groups = [
                {"params": parameters, "lr": group.rate, "weight_decay": decay}
                for group in self.groups.values()
                for parameters, decay in (
                    ([p for name, p in group.parameters.items() if name in decaying], self.args.weight_decay),
                    ([p for name, p in group.parameters.items() if name not in decaying], 0.0),
                )
                if parameters
            ]
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate (six FLOPs a parameter) is wrong where most layers are frozen."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(self.train_dataset.lengths, batch=step, seed=self.args.data_seed or self.args.seed)

    # The Trainer would save the whole model under the names of the hub and load it under the names in memory, which for
    # most LVLMs match nowhere: it resumes from the untrained weights with a warning. What trains is also all that is
    # worth writing while training.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / TRAINED), self._trained()
        if saved.keys() != trained.keys():
            raise UserError(f"{resume_from_checkpoint} holds other parameters than those that train now")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _trained(self) -> Named:
        return {name: parameter for group in self.groups.values() for name, parameter in group.parameters.items()}

    def _note_skipped(self, batch: Batch) -> None:
        for record in batch.skipped:
            if record.source not in self.left_out:
                self.left_out[record.source] = record
                self.run.skip({"source": record.source, "reason": record.reason})
        bad = [record for record in self.left_out.values() if not record.too_long]  # too long is not bad
        total = len(self.train_dataset)
        if len(bad) > self.most_skipped * total:
            raise UserError(
                f"{bad[-1].source}: {bad[-1].reason} ({len(bad)} bad records of {total}, {self.most_skipped:.0%} "
                f"allowed; see {self.run.path}/skipped.jsonl)"
            )
        if len(self.left_out) == total:
            last = batch.skipped[-1]
            raise UserError(f"no record is left to train on; the last one, {last.source}: {last.reason}")


@dataclass
class Clock:
    """How long training waits for its data, from the second step on: the first one starts the workers."""

    began: float = 0.0
    ended: float = 0.0
    waited: float = 0.0

    def note_wait(self, since: float) -> None:
        """The batches of a step were waited for since then, until now."""
        self.ended = time.monotonic()
        if self.began:
            self.waited += self.ended - since
        else:
            self.began = self.ended

    @property
    def share(self) -> float:
        """Time waited over all time, in [0, 1]."""
        return self.waited / (self.ended - self.began) if self.ended > self.began else 0.0


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

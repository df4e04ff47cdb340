"""The training loop: the Hugging Face `Trainer` with our batches, answer loss, data order, and care about memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from striate.data import IGNORED, Batch, Examples, Skipped
from striate.errors import UserError
from striate.processes import Rank
from striate.run import Run
from striate.train.callbacks import RunLog
from striate.train.checkpointing import Checkpointing
from striate.train.finite import not_finite
from striate.train.lockstep import Even
from striate.train.loss import Shortcuts, Teacher, answer_losses
from striate.train.order import LengthGrouped
from striate.train.saved import PART, missing_bytes, settle
from striate.train.sharding import optimizer_state, put, set_optimizer_state, whole
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


@dataclass(frozen=True)
class Share:
    """What one process brings to an optimiser step: answer tokens, the ids of the records and whether any has a
    picture, and the records left out. An example that stands in for others has no answer and is no record."""

    answers: int
    ids: tuple[str, ...]
    pictured: bool
    skipped: tuple[Skipped, ...]

    @classmethod
    def of(cls, batches: list[Batch]) -> Share:
        """That of its batches."""
        rows = [
            (count, name, pictured)
            for batch in batches
            if len(batch)
            for count, name, pictured in zip(
                (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist(), batch.ids,
                batch.image_mask.any(dim=1).tolist(), strict=True,
            )
            if count
        ]  # fmt: skip
        return cls(
            sum(count for count, _, _ in rows),
            tuple(name for _, name, _ in rows),
            any(pictured for _, _, pictured in rows),
            tuple(one for batch in batches for one in batch.skipped),
        )


class RegionTrainer(Trainer):
    """`Trainer` on `Batch`es. The loss is the mean over the answer tokens of one optimiser step, on all devices.

    `groups` are what trains; `most_skipped` is the share of records that may turn out to be bad before the run stops,
    `most_not_finite` the number of steps with a loss or gradients that are not finite. With a `teacher` the loss is
    `distilled`. A `sharded` model is spread over the processes already. Where memory does not suffice, the step is
    done again with more layers computed again, as `checkpointing` allows. What happens is told to `run_log`.
    """

    model: PreTrainedModel
    train_dataset: Examples | Even

    def __init__(
        self,
        *,
        vlm: Vlm,
        run: Run,
        run_log: RunLog,
        groups: dict[str, Group],
        most_skipped: float,
        most_not_finite: int,
        shortcuts: Shortcuts,
        checkpointing: Checkpointing,
        thinning: Thinning,
        teacher: Teacher | None = None,
        sharded: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        # To the Trainer, one that came sharded: it is not wrapped, and keeps its place.
        self.is_distributed_loading_by_transformers = sharded
        self.rank = Rank(self.args.process_index, self.args.world_size)
        self.vlm, self.run, self.run_log, self.teacher = vlm, run, run_log, teacher
        self.groups, self.most_skipped, self.most_not_finite = groups, most_skipped, most_not_finite
        self.model_accepts_loss_kwargs = True  # the loss below is already a mean over the whole optimiser step
        self.shortcuts, self.checkpointing, self.thinning = shortcuts, checkpointing, thinning
        self.step: list[Batch] = []
        self.losses: dict[int, tuple[Batch, torch.Tensor]] = {}  # of the step's batches, by their identity
        self.start: list[torch.Tensor] = []
        self.pictured = False  # whether any record of the step, of all processes, has a picture
        self.samples = 0
        self.clock = Clock()
        self.left_out: dict[str, Skipped] = {}  # by source: a bad record comes up again in every epoch
        self.not_finite = 0
        self.part: Path | None = None  # the folder of a state that is being written

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not isinstance(model, FSDPModule):  # it is where it belongs
            super()._move_model_to_device(model, device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of one optimiser step and the number of answer tokens in them, on all devices."""
        began = time.monotonic()
        batches = list(islice(epoch_iterator, num_batches))
        self.clock.note_wait(began)
        shares = self.rank.gathered(Share.of(batches))
        self._note_skipped([one for share in shares for one in share.skipped])
        batches = self.thinning.in_step(batches, self.state.global_step, self.state.max_steps)
        self.step, self.losses, self.start = batches, {}, _random_states(device)
        self.pictured = any(share.pictured for share in shares)
        self.run_log.ids = [name for share in shares for name in share.ids]
        self.samples += len(self.run_log.ids)
        return batches, torch.tensor(max(1, sum(share.answers for share in shares)), device=device)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch; a batch of bad records only is passed over."""
        batch: Batch = inputs
        if not len(batch):
            return torch.zeros((), device=self.args.device)
        try:
            return super().training_step(model, inputs, num_items_in_batch).nan_to_num(0, 0, 0)  # see _get_grad_norm
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            said = first_line(error)
        # Behind the handler: while it lasts, the error holds what the forward pass kept.
        return self._again(model, batch, num_items_in_batch, said)

    def _again(self, model: nn.Module, batch: Batch, num_items: Any, said: str) -> torch.Tensor:
        """The optimiser step up to this batch once more, from the same random numbers, with less memory."""
        if self.rank.of > 1 or not self.checkpointing.tighten():  # others would wait for this one's first try
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
        self.losses[id(inputs)] = (batch, losses.detach())
        loss = losses.sum() / num_items_in_batch
        return loss * self.accelerator.num_processes  # devices average their gradients; the mean is over all tokens

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients before they are used: what is not finite stops here, in every process."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = whole(norm) if isinstance(norm, torch.Tensor) else norm
        there = [losses.sum() for _, losses in self.losses.values()]
        total = torch.stack(there).sum() if there else torch.zeros((), device=self.args.device)
        total = total + 0 * torch.as_tensor(norm, device=total.device)
        if not all(self.rank.gathered(bool(total.isfinite()))):
            self._pass_over(model)
        elif self.rank.of > 1:
            self._forget_stand_ins()
        return norm

    def _forget_stand_ins(self) -> None:
        """Take away gradients that only examples standing in for others have left: they are 0, and would move Adam."""
        for part, group in self.groups.items():
            if not self.run_log.ids or (part != "layers" and not self.pictured):
                for parameter in group.parameters.values():
                    parameter.grad = None

    def _pass_over(self, model: nn.Module) -> None:
        """Leave the step's gradients unused, while the budget lasts."""
        ids = [name for found in self.rank.gathered(not_finite(self.losses.values())) for name in found]
        self.not_finite += 1
        listed = f"{', '.join(ids[:20])}{' ...' if len(ids) > 20 else ''}"
        said = f"loss or gradients of step {self.state.global_step + 1} are not finite; records: {listed}"
        if self.not_finite > self.most_not_finite:
            raise UserError(f"{said} (look at these, lower --learning-rate, or pass over some: --skip-nonfinite 3)")
        self.run_log.warn(f"{said}: passed over")
        self.run_log.marks |= {"not_finite": ids}
        model.zero_grad(set_to_none=True)

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
        lengths, total = self.train_dataset.lengths, len(self.train_dataset)
        return LengthGrouped(lengths, batch=step, seed=self.args.data_seed or self.args.seed, total=total)

    # The Trainer would save the whole model under the names of the hub and load it under the names in memory, which for
    # most LVLMs match nowhere: it resumes from the untrained weights with a warning. What trains is also all that is
    # worth writing while training.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trained = {name: whole(p.detach()).contiguous() for name, p in self._trained().items()}
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / TRAINED), self._trained()
        if saved.keys() != trained.keys():
            raise UserError(f"{resume_from_checkpoint} holds other parameters than those that train now")
        for name, parameter in trained.items():
            put(parameter, saved[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        state = optimizer_state(self.model, _inner(self.optimizer))
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_distributed_loading_by_transformers or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        assert self.lr_scheduler is not None
        set_optimizer_state(self.model, _inner(self.optimizer), state)
        self.lr_scheduler.load_state_dict(schedule)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Gradients are brought together after every micro-batch: to wait would keep those of whole layers."""
        yield

    def _trained(self) -> Named:
        return {name: parameter for group in self.groups.values() for name, parameter in group.parameters.items()}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.part or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a state under another name, and give it its own when it is whole and on the disk.

        Where there is no room for it, the run goes on without, with a warning.
        """
        state = Path(str(self.args.output_dir))
        state.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            shutil.rmtree(state / PART, ignore_errors=True)  # a kill left it
        self.rank.wait()
        self.part, failed, missing = state / PART, "", 0
        try:
            # All leave it out, or none: to write a state can take all.
            if missing := max(self.rank.gathered(missing_bytes(state, self._state_bytes()))):
                raise OSError(f"{missing / 1e9:.2f} GB more are needed")
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            if not missing and not missing_bytes(state, self._state_bytes()):
                raise
            failed = f"no room in {state} to save the state of step {self.state.global_step}: {first_line(error)}"
        finally:
            self.part = None
        failed = next(filter(None, self.rank.gathered(failed)), "")
        if failed:
            shutil.rmtree(state / PART, ignore_errors=True)
            self.run_log.warn(failed)
        elif self.args.should_save:
            settle(state / PART / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", state)
        self.rank.wait()

    def _state_bytes(self) -> int:
        """What a saved state takes: what trains, and the optimiser's moments."""
        assert self.optimizer is not None
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._trained().values(), *moments))

    def _note_skipped(self, skipped: list[Skipped]) -> None:
        for record in skipped:
            if record.source not in self.left_out:
                self.left_out[record.source] = record
                self.run.skip({"source": record.source, "reason": record.reason})
        bad = [record for record in self.left_out.values() if not record.too_long]  # too long is not bad
        total = len(self.train_dataset.lengths)
        if len(bad) > self.most_skipped * total:
            raise UserError(
                f"{bad[-1].source}: {bad[-1].reason} ({len(bad)} bad records of {total}, {self.most_skipped:.0%} "
                f"allowed; see {self.run.path}/skipped.jsonl)"
            )
        if len(self.left_out) == total:
            last = next(reversed(self.left_out.values()))
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


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser that `accelerate` has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

"""The training loop, from top to bottom: sample, encode, forward, backward, clip, audit, step, log, save.

It does not derive from `transformers.Trainer`, of which ten private methods would have to be overridden: batches are
not dicts, the loss is over the answer tokens of all devices, saved states leave out the frozen weights, a step is
repeated when memory runs out. Schedules come from `transformers`; PyTorch wraps the model for several processes (DDP,
or FSDP2 in `sharding`).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from striate.data import Batch, Examples, Skipped, collate
from striate.distributed import Rank
from striate.errors import UserError, first_line
from striate.roundtrip import free_memory
from striate.train.collator import DummyCollator
from striate.train.memory import Checkpointing, PeakMemory, is_out_of_memory
from striate.train.optimizer import Group, build_optimizer, build_schedule, forward_schedule
from striate.train.options import TrainOptions, micro_batch, num_workers, total_steps
from striate.train.records import check_skipped, length_grouped
from striate.train.saved import (
    MOMENTS,
    REST,
    TRAINED,
    StateWriter,
    last_saved,
    load_optimizer,
    missing_bytes,
    size_of,
    split_moments,
)
from striate.train.sharding import shard_like, whole
from striate.train.watch import Audit, Log, SpikeDetector, Stop, Wait, nonfinite_records
from striate.weights import file_tensors


@dataclass
class Position:
    """The progress of a training run; part of a saved state, so that a resumed run continues counting."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    """optimizer steps done in this epoch"""
    records: int = 0
    """trained on, over all epochs and processes"""
    seconds: float = 0.0
    peak_memory_gb: float = 0.0
    nonfinite: int = 0
    """steps skipped because of a non-finite loss or gradient"""


@dataclass(frozen=True)
class Contribution:
    """What one process contributes to an optimizer step: the number of answer tokens, the ids of its records, whether
    any has an image, and the skipped records. Dummy examples are not counted."""

    answers: int
    ids: tuple[str, ...]
    has_image: bool
    skipped: tuple[Skipped, ...]

    @classmethod
    def of(cls, batches: list[Batch]) -> Contribution:
        """The contribution of the process's batches, which are on the CPU."""
        records = [
            (count, name, has_image)
            for batch in batches
            if len(batch)
            for count, name, has_image in zip(
                batch.num_answer_tokens(), batch.ids,
                batch.image_mask.any(dim=1).tolist(), strict=True,
            )
            if count
        ]  # fmt: skip
        return cls(
            sum(count for count, _, _ in records),
            tuple(name for _, name, _ in records),
            any(has_image for _, _, has_image in records),
            tuple(one for batch in batches for one in batch.skipped),
        )


class Loop:
    """Trains `network` (the model, or its adapted form) in place.

    `losses` computes the loss of each labeled token of a batch [N], in nats, from the wrapped network. `groups` are the
    trainable parameters. `writer` saves states; the last one in its folder is resumed. The loss of a step is the mean
    over its answer tokens on all devices. When memory runs out, the step is repeated with more layers recomputed, as
    far as `checkpointing` allows.
    """

    def __init__(
        self,
        network: nn.Module,
        examples: Examples,
        groups: dict[str, Group],
        options: TrainOptions,
        *,
        losses: Callable[[nn.Module, Batch], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        checkpointing: Checkpointing,
        audit: Audit,
        memory: PeakMemory,
        log: Log,
        writer: StateWriter | None,
        device: torch.device,
        rank: Rank,
        pad_id: int,
    ) -> None:
        self.network, self.examples, self.groups, self.options = network, examples, groups, options
        self.losses, self.autocast, self.checkpointing = losses, autocast, checkpointing
        self.audit, self.memory, self.log, self.writer = audit, memory, log, writer
        self.device, self.rank = device, rank
        self.wait, self.stop, self.position, self.spikes = Wait(), Stop(rank), Position(), SpikeDetector()
        self.trained = {name: p for group in groups.values() for name, p in group.parameters.items()}
        self.unread = frozenset(log.skipped)  # sources of records that were skipped on reading
        self.micro = micro_batch(options, rank)
        self.accumulation = options.batch // (self.micro * rank.world_size)
        self.collate = (
            DummyCollator.of(examples, pad_id=pad_id) if rank.world_size > 1 else partial(collate, pad_id=pad_id)
        )
        self.total = total_steps(len(examples), steps=options.steps, epochs=options.epochs, batch=options.batch)
        self.optimizer = build_optimizer(groups, options)
        self.schedule = build_schedule(options, self.optimizer, self.total)
        self.wrapped: nn.Module = network
        if rank.world_size > 1 and not options.shard:
            self.wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
        from transformers import enable_full_determinism, set_seed  # slow to import: peft, and torch's compiler with it

        (enable_full_determinism if options.deterministic else set_seed)(options.seed)

    def run(self, before: float = 0.0) -> None:
        """Train to the last step, or to the step in which a signal arrived; `before`: seconds of preparation."""
        began = time.monotonic() - before - self.position.seconds
        self.spikes = SpikeDetector([entry["loss"] for entry in self.log.history if entry["loss"] is not None])
        self.network.train()
        self.audit.remember()
        with self.stop, self.writer or nullcontext():
            for batches in self._steps():
                self._step(batches, began)
                stopped = self.stop.requested_anywhere()
                due = self.position.step % self.options.save_steps == 0 or self.position.step == self.total
                if self.writer and (stopped or due):  # the last one, too: writing the checkpoint can fail
                    self._save(self.writer)
                if stopped:
                    break
            if self.writer:
                self._finish_save(self.writer)

    # Sample and encode.

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of this process for each remaining optimizer step."""
        while self.position.step < self.total:
            done = self.position.epoch_step * self.accumulation
            loader = iter(self._loader(self._micro_batches(self.position.epoch)[done:]))
            while self.position.step < self.total:
                began = time.monotonic()
                batches = list(islice(loader, self.accumulation))
                self.wait.note(began)
                if not batches:
                    break
                yield batches
            self.position.epoch, self.position.epoch_step = self.position.epoch + 1, 0

    def _micro_batches(self, epoch: int) -> list[list[int]]:
        """The record indices of each micro-batch of this process, in an order that depends on seed and epoch alone."""
        order = length_grouped(self.examples.lengths, self.options.batch, self.options.seed + epoch)
        batches = [order[start : start + self.micro] for start in range(0, len(order), self.micro)]
        batches += [[]] * (-len(batches) % self.rank.world_size)  # every process gets equally many
        return batches[self.rank.rank :: self.rank.world_size]

    def _loader(self, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            self.examples, batch_sampler=batches, collate_fn=self.collate, worker_init_fn=_ignore_signals,
            num_workers=num_workers(self.options, self.device),
            generator=torch.Generator(),  # its own: reading data must not advance the model's random state
        )  # fmt: skip

    # Forward, backward, step.

    def _step(self, batches: list[Batch], began: float) -> None:
        """One optimizer step; the run `began` at that time of the monotonic clock."""
        parts = self.rank.gather(Contribution.of(batches))
        self._skip([one for part in parts for one in part.skipped])
        answers, ids = sum(part.answers for part in parts), [name for part in parts for name in part.ids]
        has_image = any(part.has_image for part in parts)
        losses = self._forward_backward(batches, max(1, answers))
        norm = self._clip()
        marks: dict[str, Any] = {}
        if bad := self._nonfinite(batches, losses, norm):
            self._skip_step(bad)
            marks["nonfinite"] = bad
        elif self.rank.world_size > 1:
            self._drop_dummy_gradients(any_record=bool(ids), has_image=has_image)
        self.audit.check_gradients(has_image=has_image)
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.audit.check_frozen()
        self.position.step += 1
        self.position.epoch_step += 1
        self.position.records += len(ids)
        self.position.seconds = time.monotonic() - began
        loss = None if bad or not answers else self._mean(losses, answers)
        if loss is not None and self.spikes.spike(loss):
            marks["spike"] = ids
        entry = {"step": self.position.step, "loss": loss, "lr": rate, "grad_norm": None if loss is None else norm}
        self.log.step({**entry, "records": len(ids), "seconds": round(self.position.seconds, 3), **marks})

    def _forward_backward(self, batches: list[Batch], answers: int) -> list[Tensor]:
        """The losses of each batch's labeled tokens [N]; the gradients of their mean go into the parameters.

        When memory runs out, repeat everything from the same random state with more layers recomputed.
        """
        start = _random_state(self.device)
        while True:
            try:
                return [self._forward_backward_one(batch, answers, last=batch is batches[-1]) for batch in batches]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside of the handler: inside, the error's traceback keeps the activations alive.
            self._free_memory(reason)
            _set_random_state(start, self.device)

    def _forward_backward_one(self, batch: Batch, answers: int, *, last: bool) -> Tensor:
        """Forward and backward pass of one batch; nothing when all of its records were skipped."""
        if not len(batch):
            return torch.zeros(0, device=self.device)
        model = self.wrapped
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            with self.autocast():
                losses = self.losses(model, batch)
            # DDP averages gradients over processes; the mean is over the answer tokens of all of them.
            (losses.sum() / answers * self.rank.world_size).backward()
        return losses.detach()

    def _free_memory(self, reason: str) -> None:
        """Recompute more layers.

        Raises:
            UserError: all layers are recomputed already, or there are other processes, which would wait for this one.
        """
        if self.rank.world_size > 1 or not self.checkpointing.recompute_more():
            raise UserError(
                f"out of memory ({reason}): set --micro-batch below {self.micro}, or --max-length, --method lora, "
                "--checkpointing auto",
                see="out-of-memory",
            )
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()

    def _clip(self) -> float:
        """Clip the gradients to --max-grad-norm (0: no clipping); their norm before."""
        limit = self.options.max_grad_norm or math.inf
        with_gradient = [p for p in self.trained.values() if p.grad is not None]
        return float(whole(nn.utils.clip_grad_norm_(with_gradient, limit)))

    def _nonfinite(self, batches: list[Batch], losses: list[Tensor], norm: float) -> list[str]:
        """The ids of the records, of all processes, with a non-finite loss or gradient; usually empty."""
        total = torch.stack([loss.sum() for loss in losses]).sum() + 0 * norm
        if all(self.rank.gather(bool(total.isfinite()))):
            return []
        named = self.rank.gather(nonfinite_records(zip(batches, losses, strict=True)))
        return [name for found in named for name in found]

    def _skip_step(self, ids: list[str]) -> None:
        """Discard the step's gradients.

        Raises:
            UserError: there were more such steps than --skip-nonfinite allows.
        """
        listed = f"{', '.join(ids[:20])}{' ...' if len(ids) > 20 else ''}"
        text = f"non-finite loss or gradients in step {self.position.step + 1}; records: {listed}"
        self.position.nonfinite += 1
        if self.position.nonfinite > self.options.skip_nonfinite:
            raise UserError(
                f"{text} (check these, lower --learning-rate, or skip a few steps: --skip-nonfinite 3)",
                see="non-finite-loss",
            )
        self.log.warn(f"{text}: step skipped")
        self.optimizer.zero_grad(set_to_none=True)

    def _drop_dummy_gradients(self, *, any_record: bool, has_image: bool) -> None:
        """Remove gradients that come from dummy examples only: they are 0, not None, and would move Adam."""
        for part, group in self.groups.items():
            if not any_record or (part != "layers" and not has_image):
                for parameter in group.parameters.values():
                    parameter.grad = None

    def _mean(self, losses: list[Tensor], answers: int) -> float:
        own = float(torch.stack([loss.sum() for loss in losses]).sum())
        return sum(self.rank.gather(own)) / answers

    def _skip(self, skipped: list[Skipped]) -> None:
        """Log skipped records.

        Raises:
            UserError: too many records are bad, or all were skipped.
        """
        for record in skipped:
            self.log.skip(record)
        found = [record for source, record in self.log.skipped.items() if source not in self.unread]
        check_skipped(found, len(self.examples), self.options)
        if len(found) == len(self.examples):
            raise UserError(
                f"no record is left to train on; the last one, {found[-1].source}: {found[-1].reason}",
                see="bad-records",
            )

    # Save and resume.

    def _save(self, writer: StateWriter) -> None:
        """Save a state, once the one before is on the disk. When the disk is full, continue without, with a warning."""
        writer.folder.mkdir(parents=True, exist_ok=True)
        self._finish_save(writer)
        self.position.peak_memory_gb = max(self.position.peak_memory_gb, self.memory.gigabytes())
        moments, optimizer = split_moments(self.optimizer.state_dict())
        files = {TRAINED: dict[str, Tensor](self.trained), MOMENTS: moments}
        if missing := max(self.rank.gather(missing_bytes(writer.folder, size_of(files)))):
            self._warn_of_room(writer.folder, self.position.step, f"{missing / 1e9:.2f} GB more are needed")
            return
        rest = {
            "optimizer": optimizer,
            "random": self.rank.gather(_random_state(self.device)),
            "position": asdict(self.position),
        }
        writer.save(self.position.step, files, rest)

    def _finish_save(self, writer: StateWriter) -> None:
        """Wait until the last state is on the disk; warn when there was no room for it."""
        failed = writer.finish()
        if failed := next(filter(None, self.rank.gather(failed)), ""):
            self._warn_of_room(writer.folder, writer.step, failed)

    def _warn_of_room(self, folder: Path, step: int, reason: str) -> None:
        self.log.warn(f"no room in {folder} to save the state of step {step}: {reason}")

    def resume(self) -> int:
        """Load the last saved state, if there is one; the number of steps done."""
        saved = last_saved(self.writer.folder) if self.writer else None
        if saved is None:
            return 0
        weights = {one.name: one for one in file_tensors(saved / TRAINED)}
        if weights.keys() != self.trained.keys():
            raise UserError(
                f"{saved} holds other parameters than this run trains: resume with the same region",
                see="resume-refused",
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(shard_like(parameter, weights[name].read()))
        rest = torch.load(saved / REST, map_location="cpu", weights_only=True)
        load_optimizer(self.optimizer, saved / MOMENTS, rest["optimizer"])
        self.position = Position(**rest["position"])
        forward_schedule(self.schedule, self.position.step)
        if len(rest["random"]) == self.rank.world_size:
            _set_random_state(rest["random"][self.rank.rank], self.device)
        return self.position.step


def _ignore_signals(_: int) -> None:
    """In a data worker: the main process handles Ctrl-C and SIGTERM, and ends its workers itself."""
    for number in Stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

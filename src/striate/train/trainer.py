"""The training loop: the Hugging Face `Trainer` with our batches, answer loss, data order and step-1 audit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from striate.data import IGNORED, Batch, Examples, Skipped
from striate.errors import UserError
from striate.run import Run
from striate.vlm import Vlm

TRAINED = "trained.safetensors"  # in a saved state: the parameters that train
MOST_SKIPPED = 0.01  # share of the records; more bad ones than this mean that the data is wrong, not a record


Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters of one part of the model (layers, projector, tower), by name, and their peak learning rate."""

    parameters: Named
    rate: float


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode whose answers are learnt as well, and its `share` of the loss, in (0, 1]."""

    vlm: Vlm
    share: float


class RegionTrainer(Trainer):
    """`Trainer` on `Batch`es. The loss is the mean over the answer tokens of one optimiser step, on all devices.

    `groups` are what trains; `most_skipped` is the share of records that may turn out to be bad before the run stops.
    With a `teacher` the loss is `distilled`.
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
        teacher: Teacher | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.vlm, self.run, self.teacher = vlm, run, teacher
        self.groups, self.most_skipped = groups, most_skipped
        self.model_accepts_loss_kwargs = True  # the loss below is already a mean over the whole optimiser step
        self.samples = 0
        self.left_out: dict[str, Skipped] = {}  # by source: a bad record comes up again in every epoch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of one optimiser step and the number of answer tokens in them, on all devices."""
        batches = list(islice(epoch_iterator, num_batches))
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
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the answer tokens over their number in the optimiser step."""
        batch: Batch = inputs.to(self.args.device)
        logits = answer_logits(self.vlm, model, batch)
        losses = F.cross_entropy(logits, batch.targets()[1], reduction="none")
        if self.teacher:
            with torch.no_grad():
                taught = answer_logits(self.teacher.vlm, self.teacher.vlm.model, batch)
            losses = distilled(losses, logits, taught, share=self.teacher.share)
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


def answer_nll(vlm: Vlm, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of each of the batch's N labelled tokens [N], in nats, from `answer_logits`."""
    return F.cross_entropy(answer_logits(vlm, model, batch), batch.targets()[1], reduction="none")


def answer_logits(vlm: Vlm, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits, in float32, from which each of the batch's N labelled tokens is predicted [N, V], row after row.

    `model` is what runs (the plain model, or a wrapper of it for LoRA or many devices), `vlm` knows its head.
    Logits exist at labelled positions only.
    """
    positions, _ = batch.targets()
    with vlm.head_at(positions):
        logits = model(**batch.inputs, use_cache=False).logits[0]  # N V
    return logits.float()


def distilled(losses: torch.Tensor, logits: torch.Tensor, taught: torch.Tensor, *, share: float) -> torch.Tensor:
    """(1 - share) * negative log-likelihood + share * KL(teacher || student) of each token [N], in nats.

    `losses` [N] are the negative log-likelihoods, `logits` and `taught` [N, V] the student's and the teacher's.

    Hinton et al. 2015, "Distilling the knowledge in a neural network" (arXiv 1503.02531), at temperature 1.
    """
    student, teacher = logits.log_softmax(dim=-1), taught.log_softmax(dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return (1 - share) * losses + share * divergence


class LengthGrouped(Sampler[int]):
    """Indices grouped so that the records of one optimiser step are about equally long, the groups in random order.

    The order is a function of seed and epoch alone. The longest group comes first: too little memory shows at once.
    """

    def __init__(self, lengths: list[int], *, batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # `transformers` leaves the groups sorted by length, fifty at a time: training would see long records, then
        # short ones, over and over.
        indices = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        groups = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        full, rest = (groups[:-1], groups[-1:]) if len(groups[-1]) < self.batch else (groups, [])
        shuffled = torch.randperm(max(len(full) - 1, 0), generator=generator).tolist()
        order = [*full[:1], *(full[1 + place] for place in shuffled), *rest]
        return (index for group in order for index in group)


class Audit(TrainerCallback):
    """Fails the run after its first step if a parameter that should train got no gradient, or a frozen one changed."""

    def __init__(self, model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
        chosen = {id(parameter) for parameter in trained.values()}
        self.trained = trained
        self.frozen = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
        self.before: dict[str, int] | None = None
        self.stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the frozen weights."""
        self.before = {name: checksum(p) for name, p in self.frozen.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for missing gradients, once; a step whose records were all left out has none to look for."""
        self.stepped = any(parameter.grad is not None for parameter in self.trained.values())
        if self.before is None or not self.stepped:
            return
        idle = [name for name, parameter in self.trained.items() if parameter.grad is None]
        if idle:
            raise UserError(f"{len(idle)} parameters should train but got no gradient, {idle[0]} among them")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for frozen weights that changed, once."""
        if self.before is None or not self.stepped:
            return
        moved = [name for name, p in self.frozen.items() if checksum(p) != self.before[name]]
        self.before = None
        if moved:
            raise UserError(f"{len(moved)} frozen parameters changed in the first step, {moved[0]} among them")


def checksum(parameter: torch.Tensor) -> int:
    """The sum of a tensor's bit patterns as integers: any single changed value changes it."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(bits).sum(dtype=torch.int64))


class RunLog(TrainerCallback):
    """Writes one line a step into the run, and shows a bar when asked to."""

    def __init__(self, run: Run, *, bar: bool) -> None:
        self.run, self.began = run, 0.0
        self.bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True, disable=not bar)
        self.task = self.bar.add_task("", start=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()
        self.bar.start()
        self.bar.start_task(self.task)
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step, description=self.run.path.name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the step's loss, gradient norm and learning rate."""
        if not logs or "loss" not in logs:
            return
        seconds = round(time.monotonic() - self.began, 3)
        entry: dict[str, Any] = {"step": state.global_step, "loss": logs["loss"], "lr": logs.get("learning_rate")}
        self.run.log(entry | {"grad_norm": logs.get("grad_norm"), "seconds": seconds})
        self.bar.update(self.task, completed=state.global_step, description=f"loss {logs['loss']:.3f}")


class Interrupt(TrainerCallback):
    """On Ctrl-C: finish the step, save what a resumed run needs, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over Ctrl-C, where a handler can be set (in the main thread)."""
        try:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:
            self.previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop when asked."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        self.restore()

    def restore(self) -> None:
        """Put the previous handler back."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def _ask(self, *_: Any) -> None:
        if self.asked:
            self.restore()
            raise KeyboardInterrupt
        self.asked = True

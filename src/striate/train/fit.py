"""One training run: probe the model, verify fast paths, plan memory, run the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from striate import routing
from striate.data import Batch, Examples, Records, collate
from striate.distributed import Rank
from striate.errors import UserError, first_line
from striate.region import FILE, Region
from striate.roundtrip import save
from striate.train.loop import Loop
from striate.train.loss import FastPaths, answer_losses, verify_fast_paths
from striate.train.memory import (
    MOMENT_BYTES,
    SHARE,
    Activations,
    Checkpointing,
    PeakMemory,
    activations,
    free_bytes,
    is_out_of_memory,
    reachable_parameters,
    recompute,
)
from striate.train.optimizer import Group
from striate.train.options import TrainOptions, micro_batch
from striate.train.packing import record_by_record
from striate.train.records import warn_of_too_long
from striate.train.saved import StateWriter
from striate.train.sharding import shard, unshard, unsharded_parameters
from striate.train.watch import Audit, Log
from striate.vlm import Vlm
from striate.vlm.devices import default_device, has_native_bfloat16
from striate.vlm.modes import eval_mode

# A thread that has a core for less of its time shares it with other programs; seconds from which that is measurable.
SHARED, MEASURABLE = 0.8, 0.1  # alone 0.94 to 1, beside another 0.53 to 0.64 (bench/threads.py)
FEW = 20  # steps: the default batch, 128, is for hundreds of thousands of records


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it was trained.

    `vlm` is the model, trained in place (of the layers of `region` the `modules`: all, attention, ...), and routed if
    there was a `route`; `log` has one entry per step. `seconds` and `seen` (records trained on, over all epochs) count
    from the first start, also when the training was resumed; `left_out` of the `records` were skipped. `groups` has the
    number of trained parameters of each part. `stopped`: by a signal, before the last step; if the state was saved,
    adapters are taken off then, and the same call resumes.
    """

    vlm: Vlm
    region: Region
    modules: str
    route: Region | None
    log: Log
    method: str
    dtype: str
    packing: bool
    recomputed_layers: tuple[int, ...]
    peak_memory_gb: float
    total_parameters: int
    groups: dict[str, int]
    steps: int
    total_steps: int
    seen: int
    records: int
    left_out: int
    seconds: float
    data_wait: float
    stopped: bool

    def save(self, folder: str | Path) -> None:
        """Write a plain checkpoint into a new folder and read it back.

        Raises:
            UserError: the checkpoint differs; or layers were dropped since: then `Pruned.save` saves the model.
        """
        region = Region.of(self.region, self.vlm.depth)
        save(self.vlm, Path(folder))
        region.save(Path(folder) / FILE, self.route, modules=self.modules)

    def to_json(self) -> dict[str, Any]:
        """The entry `training` of run.json."""
        return {
            "method": self.method,
            "dtype": self.dtype,
            "packing": self.packing,
            "recomputed_layers": list(self.recomputed_layers),
            "peak_memory_gb": round(self.peak_memory_gb, 4),
            "total_parameters": self.total_parameters,
            "seconds": round(self.seconds, 3),
            "data_wait": round(self.data_wait, 4),
            "steps": self.steps,
            "samples": self.seen,
            "samples_per_second": round(self.seen / self.seconds, 3),
            "records": self.records,
            "left_out": self.left_out,
            "trainable_parameters": sum(self.groups.values()),
            "groups": self.groups,
        }


def fit(
    vlm: Vlm,
    network: nn.Module,
    region: Region,
    records: Records,
    groups: dict[str, Group],
    options: TrainOptions,
    *,
    modules: str = "all",
    route: Region | None = None,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
    log: Log | None = None,
    state: Path | None = None,
) -> Trained:
    """Train `network` (the model, or its adapted form) in place.

    `modules` names the matrices of the region in `groups`; `route`: the layers that image tokens pass through
    meanwhile; default: all. `state` is the folder for saved states, the last of which is resumed; without it nothing is
    saved.

    Raises:
        UserError: the step-1 audit failed, too many records are bad, memory ran out, the model does not support an
            option.
    """
    examples = Examples(
        records.records, vlm.processor, max_length=options.max_length, truncate_text=options.truncate_text
    )
    device = torch.device(options.device) if options.device else default_device()
    log, memory, began = log or Log(), PeakMemory(device), time.monotonic()
    memory.start()
    bf16 = in_bfloat16(options.dtype, device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    with ExitStack() as stack, _out_of_memory_in_one_line():
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        recompute(vlm, ())  # whatever was asked for before
        stack.callback(recompute, vlm, ())
        probe = _probe(examples, vlm, micro_batch(options, rank))
        if route is not None:
            with autocast():
                routing.verify(vlm, route, probe.batch.to(vlm.device, vlm.model.dtype if options.shard else None))
            stack.enter_context(routing.route(vlm, route))
        if options.shard:  # before the probes: they run on the devices then
            groups = _shard_groups(vlm, network, groups, device, rank, bf16=bf16)
        fast_paths, notes = verify_fast_paths(
            vlm, probe.batch, packing=options.packing, sharded=options.shard, autocast=autocast, network=network
        )
        if fast_paths.packing:
            stack.enter_context(record_by_record(vlm))
        kept, reachable, running = _try_forward(vlm, network, probe, fast_paths, autocast)
        groups = _freeze_unreachable(groups, reachable, log)
        tokens = probe.largest(packing=fast_paths.packing)
        checkpointing = _plan_checkpointing(vlm, tokens, kept, groups, options, device, rank)
        writer = _plan_saves(state, checkpointing, groups, options, device, rank) if state else None
        audit = Audit(network, groups, images=records.has_images)
        loop = Loop(
            network, examples, groups, options, autocast=autocast, checkpointing=checkpointing, log=log, writer=writer,
            losses=lambda model, batch: answer_losses(vlm, model, batch, fast_paths=fast_paths),
            audit=audit, memory=memory, device=device, rank=rank, pad_id=vlm.pad_token_id,
        )  # fmt: skip
        stack.callback(log.end)
        log.begin(loop.resume(), loop.total, [*notes, *_notes(loop, running)])
        loop.run(time.monotonic() - began)
        if options.shard:
            unshard(network, rank)
    total = len(records.records) + len(records.skipped)
    warn_of_too_long(log, total, options)
    return Trained(
        vlm,
        region,
        modules,
        route,
        log,
        method="full" if network is vlm.model else "lora",
        dtype="bfloat16" if bf16 else "float32",
        packing=fast_paths.packing,
        recomputed_layers=checkpointing.layers,
        peak_memory_gb=max(memory.gigabytes(), loop.position.peak_memory_gb),
        total_parameters=sum(p.numel() for p in network.parameters()),
        groups={part: sum(p.numel() for p in group.parameters.values()) for part, group in groups.items()},
        steps=loop.position.step,
        total_steps=loop.total,
        seen=loop.position.records,
        records=total,
        left_out=len(log.skipped),
        seconds=loop.position.seconds,
        data_wait=loop.wait.share,
        stopped=loop.position.step < loop.total,
    )


def _notes(loop: Loop, running: float) -> Iterator[str]:
    """What to know before the first step; `running` is the share of the probe's time in which it had a core."""
    if loop.writer and not loop.writer.background:
        yield "training waits while a state is saved: there is no memory for a copy of it"
    if loop.device.type == "cpu" and running < SHARED:
        yield (
            f"other programs use this machine's cores: the probe had one for {running:.0%} of its time, and "
            "training will be as slow; threads that wait for each other make it worse (OMP_NUM_THREADS=1)"
        )
    if loop.options.steps is None and loop.total < FEW:
        steps = f"{loop.total} step{'s' * (loop.total > 1)} of --batch {loop.options.batch}"
        yield f"all of the training is {steps}: a smaller --batch or more --epochs makes more"
    yield str(loop.checkpointing)


def in_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether `TrainOptions.dtype` runs GEMMs in bfloat16 on this device, else in float32."""
    return dtype == "bfloat16" or (dtype == "auto" and has_native_bfloat16(device))


@dataclass(frozen=True)
class Probe:
    """Two records to try the model on, and the first of them alone; the largest micro-batch has about `scale` times the
    tokens of both, with padding `padded_scale` times."""

    one: Batch
    batch: Batch
    scale: float
    padded_scale: float

    def tokens(self, *, packing: bool) -> int:
        """Tokens of both records, with padding if they are not packed."""
        return int(self.batch.inputs["attention_mask"].sum()) if packing else self.batch.labels.numel()

    def largest(self, *, packing: bool) -> float:
        """Tokens of the largest micro-batch."""
        return self.tokens(packing=packing) * (self.scale if packing else self.padded_scale)

    def steps(self, *, packing: bool) -> float:
        """The tokens that the largest micro-batch has beyond both records, over those that both have beyond the first
        one."""
        both = self.tokens(packing=packing)
        return (self.largest(packing=packing) - both) / (both - self.one.labels.numel())


def _probe(examples: Examples, vlm: Vlm, micro: int) -> Probe:
    """The two shortest readable records, records with images first: long ones could take more memory than training.

    Raises:
        UserError: none of the records can be read.
    """
    found, lengths = list(islice(examples.shortest(), 2)), examples.lengths
    (first, one), (second, other) = found[0], found[-1]
    longest = sorted(lengths)[-micro:]
    scale = sum(longest) / max(1, lengths[first] + lengths[second])
    padded_scale = len(longest) * longest[-1] / max(1, 2 * lengths[first], 2 * lengths[second])
    alone, both = (collate(chosen, pad_id=vlm.pad_token_id) for chosen in ([one], [one, other]))
    return Probe(alone, both, scale, padded_scale)


def _try_forward(
    vlm: Vlm,
    network: nn.Module,
    probe: Probe,
    fast_paths: FastPaths,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[Activations, set[str], float]:
    """The activations of the largest micro-batch, the parameters that the answers of two records depend on, and the
    share of the time in which this thread had a core."""
    losses: list[torch.Tensor] = []

    def measured(batch: Batch) -> Activations:
        losses[:] = []
        batch = batch.to(vlm.device)
        with autocast():
            return activations(vlm, lambda: losses.append(answer_losses(vlm, network, batch, fast_paths=fast_paths)))

    with _with_dropout(network), unsharded_parameters(vlm, network) as parameters:
        one = measured(probe.one)  # loads what it reads: not timed
        began, ran = time.perf_counter(), time.thread_time()
        both = measured(probe.batch)
        seconds, ran = time.perf_counter() - began, time.thread_time() - ran
        reachable = reachable_parameters(losses[0])
    steps = probe.steps(packing=fast_paths.packing)
    running = ran / seconds if seconds > MEASURABLE else 1.0
    return both.beyond(one, steps), {name for name, p in parameters.items() if p in reachable}, running


@contextmanager
def _with_dropout(network: nn.Module) -> Iterator[None]:
    """Dropout as in training, whose masks take memory, too; all else as in evaluation."""
    with eval_mode(network):
        for module in network.modules():
            module.training = isinstance(module, nn.Dropout)
        yield


@contextmanager
def _out_of_memory_in_one_line() -> Iterator[None]:
    """Outside of forward and backward passes, which the loop repeats: in the probe, clipping, the optimizer's step."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({first_line(error)}): set a smaller --micro-batch, --max-length or --region, or "
            "--method lora"
        ) from error


def _freeze_unreachable(groups: dict[str, Group], reachable: set[str], log: Log) -> dict[str, Group]:
    """Freeze parameters that no answer depends on, with a warning: LLaVA's tower has layers above the one whose
    features are used, routers of experts have a bias for load balancing, text alone does not use the projector.

    Raises:
        UserError: no trainable parameter is left.
    """
    found: dict[str, Group] = {}
    for part, group in groups.items():
        idle = [name for name in group.parameters if name not in reachable]
        for name in idle:
            group.parameters[name].requires_grad_(False)
        own = {name: parameter for name, parameter in group.parameters.items() if name in reachable}
        found |= {part: replace(group, parameters=own)} if own else {}
        if idle and not own and part != "layers":
            log.warn(f"the probed records have no image: the {part} is not trained")
        elif idle:
            log.warn(f"{len(idle)} parameters of the {part} stay frozen: no answer depends on {', '.join(idle[:3])}")
    if not found:
        raise UserError(
            "no parameter to train: the answers depend on none of the region and the projector; choose other layers",
            see="parameters-without-gradient",
        )
    return found


def _plan_checkpointing(
    vlm: Vlm,
    tokens: float,
    kept: Activations,
    groups: dict[str, Group],
    options: TrainOptions,
    device: torch.device,
    rank: Rank,
) -> Checkpointing:
    """Choose the layers to recompute, from the tokens of the largest micro-batch and its activations `kept` without
    recomputation."""
    hidden = vlm.model.config.get_text_config(decoder=True).hidden_size
    width = torch.finfo(vlm.model.dtype).bits // 8
    reserved = (4 + MOMENT_BYTES[options.optimizer]) * _num_trained(groups)  # gradients and moments
    if options.shard:  # each process holds its share
        reserved //= rank.world_size
    checkpointing = Checkpointing(
        vlm,
        kept=kept,
        free=SHARE * free_bytes(device) - reserved,
        inputs=tokens * hidden * width,
        fixed=options.checkpointing != "auto",
    )
    checkpointing.choose(options.checkpointing)
    if options.shard:  # recomputing a layer gathers its weights, a collective operation of all processes
        checkpointing.at_least(max(rank.gather(len(checkpointing.layers))))
    return checkpointing


def _plan_saves(
    state: Path, checkpointing: Checkpointing, groups: dict[str, Group], options: TrainOptions, device: torch.device,
    rank: Rank,
) -> StateWriter:  # fmt: skip
    """The writer of states: in the background where the CPU's memory holds a copy of a state beside everything else."""
    copy = (4 + MOMENT_BYTES[options.optimizer]) * _num_trained(groups)
    if device.type == "cpu":
        room = checkpointing.free - checkpointing.needed(len(checkpointing.layers))
    else:
        room = SHARE * free_bytes(torch.device("cpu"))
    return StateWriter(state, rank, background=copy <= room)


def _num_trained(groups: dict[str, Group]) -> int:
    return sum(p.numel() for group in groups.values() for p in group.parameters.values())


def _shard_groups(
    vlm: Vlm, network: nn.Module, groups: dict[str, Group], device: torch.device, rank: Rank, *, bf16: bool
) -> dict[str, Group]:
    """Shard the model over the processes; the groups, with the sharded parameters."""
    sharded = shard(vlm, network, device, rank, bf16=bf16)
    return {
        part: replace(group, parameters={name: sharded[name] for name in group.parameters})
        for part, group in groups.items()
    }

"""What a cost shows: a table of a region and all layers, and a figure over the number and the place of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from matplotlib.figure import Figure
from rich.table import Table

from striate.plot import Curve, Mark, Panel, grid, marks
from striate.region import Region
from striate.routing import multiply_adds
from striate.studies.cost.fake_model import FakeModel
from striate.studies.cost.machine import Machine
from striate.studies.cost.step import Counts, Memory, Parallelism, Setup, Step

KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations",
    "logits": "logits and loss",
    "temporary": "temporary",
    "peak": "peak",
}
UNSEEN = "\nThe tower, which needs a real image, is counted by its weights, not run."


ACROSS = ("layers trained,\nevenly spread", "first of a quarter,\nprojector frozen")
POINTS = 8  # steps along the depth


@dataclass(frozen=True)
class Cost:
    """A step that trains a region of the model `name`, and one that trains `everything`, on a machine or several."""

    name: str
    step: Step
    everything: Step
    machine: Machine
    parallelism: Parallelism
    fake_model: FakeModel

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Of the decoder's forward pass over one record: routed, and with all tokens in all layers."""
        vlm, setup, everything = self.fake_model.vlm, self.step.setup, self.everything.region
        tokens = {"image": setup.image_tokens, "text": setup.text_tokens + setup.answer_tokens}
        return multiply_adds(vlm, self.step.route or everything, **tokens), multiply_adds(vlm, everything, **tokens)

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return self.parallelism.seconds(self.step, *self.machine.reached)

    def __rich__(self) -> Table:
        """One row per quantity: for the region, for all layers, and their ratio."""
        setup, region = self.step.setup, self.step.region
        shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title_justify="left", caption_justify="left")
        shown.title = f"{self.name}\n{_layers(region.layers)} of {region.depth} layers, {_method(self.step)}"
        if self.step.route:
            shown.title += f",\nimage tokens through {_layers(self.step.route.layers)} of them"
        shown.add_column("")
        for title in (f"{len(region)} layers", "all layers", "share"):
            shown.add_column(title, justify="right", no_wrap=True)
        for title, own, whole, unit in self._quantities():
            share = f"{own / whole:.0%}" if whole else ""
            shown.add_row(title, _quantity(own, unit), _quantity(whole, unit), share)
        not_run = UNSEEN if self.fake_model.tokens_per_image is None else ""
        shown.caption = (
            f"A record: {setup.image_tokens} image, {setup.text_tokens} text, {setup.answer_tokens} answer tokens.\n"
            f"A step: {setup.batch} records, {setup.micro_batch} per pass"
            f"{', activations recomputed' if setup.checkpointing else ''}.\n{_machine_line(self.machine)}"
            f"{_parallelism_line(self.parallelism, setup.devices)}{not_run}\n"
        )
        return shown

    def _quantities(self) -> list[tuple[str, float, float, str]]:
        """Title, the region's, all layers', unit."""
        steps = (self.step, self.everything)
        (forward, backward), (all_forward, all_backward) = (step.record_flops for step in steps)
        rows: list[tuple[str, float, float, str]] = [
            ("trained parameters", self.step.trainable, self.everything.trainable, ""),
            ("forward, per record", forward, all_forward, "FLOP"),
            ("backward, per record", backward, all_backward, "FLOP"),
        ]
        if self.step.route:
            rows.append(("multiply-adds, per record", *self.multiply_adds, ""))
        for kind in fields(Memory):
            own, whole = (float(getattr(step.memory, kind.name)) for step in steps)
            rows.append((f"memory: {KINDS[kind.name]}", own, whole, "B"))
        if self.step.setup.devices > 1:
            held = [self.parallelism.memory(step, self.fake_model) for step in steps]
            sent = [self.parallelism.sent(step) for step in steps]
            rows.append(("memory of each device: peak", held[0], held[1], "B"))
            rows.append(("sent by each device, per step", sent[0], sent[1], "B"))
        own, whole = (self.parallelism.seconds(step, *self.machine.reached) for step in steps)
        rates = self.step.setup.batch / own, self.everything.setup.batch / whole
        return [*rows, ("time of a step", own, whole, "s"), ("records per second", *rates, "")]


def _quantity(value: float, unit: str) -> str:
    """A number with its unit: 1,640,046,592; 9.80 TFLOP; 17.4 GB; 20.4 s."""
    if isinstance(value, int):
        return f"{value:,}"
    if unit in ("s", ""):
        return f"{value:.3g} {unit}".strip() if value < 1000 else f"{value:,.0f} {unit}".strip()
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _layers(layers: tuple[int, ...]) -> str:
    text = ",".join(map(str, layers))
    return f"{len(layers)}" if len(text) > 30 else text or "none"


def _method(step: Step) -> str:
    method = f"LoRA of rank {step.setup.rank}" if step.setup.method == "lora" else "full weights"
    modules = "" if step.setup.modules == "all" else f" of {step.setup.modules.replace(',', ', ')}"
    return f"{method}{modules}, projector {'trained' if step.setup.projector else 'frozen'}"


def _parallelism_line(parallelism: Parallelism, devices: int) -> str:
    if devices == 1:
        return ""
    way = "weights sharded" if parallelism.shard else "weights whole on each"
    return f"\n{devices} of them, {way}, each sending {parallelism.link / 1e9:g} GB/s while it computes."


def _machine_line(machine: Machine) -> str:
    rate, bandwidth = machine.reached
    share = f" ({machine.efficiency:.0%} of its peak)" if machine.efficiency < 1 else ""
    return f"Time on {machine.name}: {rate / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:,.0f} GB/s{share}."


def cost_figure(models: Mapping[str, tuple[FakeModel, Setup]], machine: Machine) -> Figure:
    """FLOPs, time and memory of each model, by full fine-tuning and by LoRA (dashed)."""
    plain = marks(list(models))
    style: dict[str, Mark] = {}
    lines: tuple[dict[str, dict[int, Step]], ...] = ({}, {})
    for name, (fake, setup) in models.items():
        for method in ("full", "lora"):
            title = f"{name} LoRA" if method == "lora" else name
            style[title] = plain[name]._replace(dashed=method == "lora")
            for line, steps in zip(lines, (_by_number, _by_start), strict=True):
                line[title] = steps(fake, replace(setup, method=method))
    measures = (
        ("TFLOP per record", lambda step: sum(step.record_flops) / 1e12),
        (f"ms per record\n({machine.name})", lambda step: 1e3 * step.seconds(*machine.reached) / step.setup.batch),
        ("peak memory, GB", lambda step: step.memory.peak / 1e9),
    )
    rows = [
        [
            Panel({title: Curve([{x: measure(step) for x, step in steps.items()}]) for title, steps in line.items()},
                  ylabel=label)
            for line in lines
        ]
        for label, measure in measures
    ]  # fmt: skip
    return grid(rows, style, across=ACROSS)


def _by_number(fake: FakeModel, setup: Setup) -> dict[int, Step]:
    depth = fake.vlm.depth
    counts = Counts(fake, setup)
    numbers = sorted({max(1, round(depth * point / POINTS)) for point in range(POINTS + 1)})
    return {number: counts.step(Region.parse(f"uniform:{number}", depth)) for number in numbers}


def _by_start(fake: FakeModel, setup: Setup) -> dict[int, Step]:
    depth = fake.vlm.depth
    counts, size = Counts(fake, replace(setup, projector=False)), max(1, depth // 4)
    starts = sorted({round((depth - size) * point / POINTS) for point in range(POINTS + 1)})
    return {start: counts.step(Region(tuple(range(start, start + size)), depth)) for start in starts}

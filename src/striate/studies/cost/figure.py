"""Cost against how many layers train, and against where they start: the paper's Figure 3 and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from striate.plot import Curve, Mark, Panel, grid, marks
from striate.region import Region
from striate.studies.cost.fake_model import FakeModel
from striate.studies.cost.machine import Machine
from striate.studies.cost.step import Counts, Setup, Step

ACROSS = ("layers trained,\nevenly spread", "first of a quarter,\nprojector frozen")
POINTS = 8  # steps along the depth


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

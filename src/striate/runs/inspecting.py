"""The verb `inspect`: the parts of a model, the parameters that a region trains, and one encoded record."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from striate.data import IGNORED, Example, encode, read
from striate.errors import UserError
from striate.prune.protected import protected_layers
from striate.region import KNOWN, Region
from striate.vlm import Selection, Vlm, load_on_meta, select
from striate.vlm.template import end_tokens

STYLES = {"image": "magenta", "prompt": "cyan", "answer": "bold green"}


def inspect(
    model: str,
    *,
    data: Path | None = None,
    images: Path | None = None,
    region: str = "uniform:25%",
    modules: str = "all",
    record: int = 1,
) -> RenderableType:
    """Show the parts of a model, the parameters that a region trains, and one encoded record.

    Reads the config, and for a record the processor, but no weights.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records, to show one of them encoded, colored by role.
        images: the folder that image paths are relative to; default: the folder of the data.
        region: the layers to train.
        modules: the matrices of these layers that train: all, or some of attention, mlp, gate_up, down, qkv, o.
        record: number of the record to show, from 1.

    Raises:
        UserError: the model, region or record does not exist, or the record cannot be encoded.
    """
    vlm = load_on_meta(model)
    blocks: list[RenderableType] = [_parts(vlm, select(vlm, region, modules=modules))]
    if data is not None:
        found = read(data, images=images)
        records = found.records
        if not 1 <= record <= len(records):
            raise UserError(f"--record {record}: {data} has records 1 to {len(records)}")
        blocks += [Text(f"note: {note}") for note in found.notes]
        blocks += ["", *_record(vlm, encode(records[record - 1], vlm.processor, max_length=sys.maxsize))]
    return Group(*blocks)


def _parts(vlm: Vlm, plan: Selection) -> Table:
    region = plan.region
    sizes = dict(vlm.model.named_parameters())

    def count(*prefixes: str) -> str:
        return f"{sum(p.numel() for name, p in sizes.items() if name.startswith(prefixes)):,}"

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    table.add_row("model", f"{plan.total:,}", f"{type(vlm.model).__name__}, {dtype}")
    table.add_row("tower", count(vlm.parts.tower), f"{vlm.parts.tower} ({type(vlm.tower).__name__})")
    table.add_row("projector", count(*vlm.parts.projector), ", ".join(vlm.parts.projector))
    table.add_row("layers", count(vlm.parts.layers), f"{vlm.parts.layers} (depth {vlm.depth})")
    table.add_row("head", count(vlm.parts.head), vlm.parts.head)
    table.add_row("image token", "none" if vlm.image_token_id is None else str(vlm.image_token_id), "")
    table.add_row("region", f"{len(region)} of {region.depth}", str(region))
    diagram = Text.assemble(*(("■", "bold cyan") if layer in region else ("·", "dim") for layer in range(region.depth)))
    table.add_row("", "", diagram)
    for group, number in plan.counts.items():
        if number:
            own = f", {plan.modules}" if group == "layers" and plan.modules != "all" else ""
            table.add_row(f"trains: {group}", f"{number:,}", f"{number / plan.total:.1%} of the model{own}")
    for name, sets in KNOWN.items():
        if vlm.depth in sets:
            table.add_row("published", name, f"{sets[vlm.depth]} (found for LLaVA-1.5 of this depth)")
    for reason, items in groupby(protected_layers(vlm).items(), key=lambda item: item[1]):
        layers = Region(tuple(layer for layer, _ in items), vlm.depth)
        table.add_row("never cut", str(layers), reason)
    return table


def _record(vlm: Vlm, example: Example) -> list[RenderableType]:
    """The tokens of a record; of a sequence of image tokens only the number."""
    ids = example.inputs["input_ids"].tolist()
    roles = [
        "image" if image else "prompt" if label == IGNORED else "answer"
        for image, label in zip(example.image_mask.tolist(), example.labels.tolist(), strict=True)
    ]
    text = Text()
    for role, group in groupby(zip(roles, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        words = f"[{len(tokens)} image tokens]" if role == "image" else vlm.tokenizer.decode(tokens)
        text.append(words, STYLES[role])
    ends = vlm.tokenizer.convert_ids_to_tokens(list(end_tokens(vlm.processor)))
    legend = Text.assemble(
        f"{example.source}: {len(ids)} tokens: ",
        *((f"{roles.count(role)} {role}  ", style) for role, style in STYLES.items()),
        f"answers end with {' or '.join(ends)}",
    )
    return [legend, text]

"""The model card of a checkpoint, and the verb `card`, which writes it anew with the run's results.

Above `MARK` stands what the run did, and what anybody added; below it what can be read off the run folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, hf_hub_download
from huggingface_hub.repocard_data import eval_results_to_model_index

from striate.region import Region
from striate.routing import ENTRY as ROUTE
from striate.runs.run import Run
from striate.vlm.reading import model_folder

CARD = "README.md"
MARK = "<!-- From here on, `striate card` writes it anew. -->"
TAG = "striate"
CARRIED = ("license", "license_name", "license_link", "language")
"""What the card of the base says that is true of what is made from it."""

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_USE = """\
## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```

Or `vllm serve path/to/this/folder`. {needs}{routed}
"""
_ROUTED = " Both send images through all layers; `striate.load` turns on the route, with which it was trained."
_UNLICENSED = (
    "The card of the base names no license: look it up, and set `license` above before this checkpoint is published."
)


def card(run: Path) -> str:
    """Write the model card of a run anew: base model, license, results, how to load it, limits.

    Text that was added above the comment on `striate card` is kept, and so is a license set by hand.

    Args:
        run: the run folder; its results.json is read.

    Returns:
        Where the card is, and the command that uploads the checkpoint.

    Raises:
        UserError: not a run folder, or one without a checkpoint.
    """
    opened = Run.open(run)
    model_folder(run)
    path = write_card(opened.checkpoint, opened.info, results=opened.results)
    return f"wrote {path}\nto publish it: hf upload YOUR_NAME/{opened.info['name']} {opened.checkpoint}"


def write_card(
    folder: Path, info: dict[str, Any], *, body: str | None = None, results: dict[str, Any] | None = None
) -> Path:
    """Write the card of a checkpoint.

    Args:
        folder: the checkpoint.
        info: the content of run.json.
        body: the Markdown above `MARK`, maybe with front matter of its own; default: that of the card that is there.
        results: the content of results.json.
    """
    path = folder / CARD
    front, text = split(body if body is not None else _read(path))
    front = front_matter(front, info, results)
    parts = [text.rstrip(), MARK, _results(results), _use(folder), _limits(info, front, results)]
    path.write_text(_join(front, "\n\n".join(filter(None, parts))), encoding="utf-8")
    return path


def add_text(folder: Path, info: dict[str, Any], text: str) -> Path:
    """Add Markdown above `MARK` to the card of a checkpoint, or to a new one."""
    before = _read(folder / CARD)
    front, body = split(before or f"# {info['name']}\n")
    return write_card(folder, info, body=_join(front, body.rstrip() + "\n" + text))


def split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, empty where it has none that can be read, and its text above `MARK`."""
    found = _FRONT.match(text)
    body = text[found.end() :] if found else text
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        front = {}
    return front if isinstance(front, dict) else {}, body.partition(MARK)[0].strip() + "\n"


def _join(front: dict[str, Any], body: str) -> str:
    written = yaml.safe_dump(front, sort_keys=False, allow_unicode=True) if front else ""
    return (f"---\n{written}---\n\n" if written else "") + body.strip() + "\n"


def front_matter(own: dict[str, Any], info: dict[str, Any], results: dict[str, Any] | None) -> dict[str, Any]:
    """What the hub reads: the license of the base unless `own` has one, the base model, tags, results by task."""
    parent = str(info["parent"])
    base, _ = split(base_card(parent))
    tags = own.get("tags") or []
    found: dict[str, Any] = {key: base[key] for key in CARRIED if key in base} | own
    found |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    found["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), TAG, "visual-region"]))
    if made_from := base.get("base_model") if TAG in (base.get("tags") or []) else _hub_id(parent):
        found["base_model"] = made_from
    found.pop("model-index", None)
    if tasks := (results or {}).get("tasks"):
        data = Path(str((results or {}).get("data") or "data")).stem
        measured = [
            EvalResult(
                task_type="image-text-to-text", dataset_type=data, dataset_name=task, metric_type=one["metric"],
                metric_value=round(one["value"], 4),
            )
            for task, one in tasks.items()
        ]  # fmt: skip
        found["model-index"] = eval_results_to_model_index(info["name"], measured)
    return found


def base_card(parent: str) -> str:
    """The card of a model folder, a run or a hub id; empty where there is none or it cannot be read."""
    source = Path(parent)
    if source.exists():
        checkpoint = source / "checkpoint"
        return _read((checkpoint if checkpoint.is_dir() else source) / CARD)
    try:
        return _read(Path(hf_hub_download(parent, CARD)))
    except (OSError, ValueError):  # not on the hub, or there is no network
        return ""


def _hub_id(parent: str) -> str | None:
    """The id of a model on the hub; None for a folder. A snapshot in the hub's cache has it in its path."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", parent):
        return f"{cached[1]}/{cached[2]}"
    return None if Path(parent).exists() else parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _results(results: dict[str, Any] | None) -> str:
    if not (tasks := (results or {}).get("tasks")):
        return ""
    rows = [
        f"| {task} | {one['metric']} | {one['value']:.3f}"
        + (f" ± {one['stderr']:.3f}" if one.get("stderr") is not None else "")
        + f" | {one['n']:,} |"
        for task, one in tasks.items()
    ]
    data = f" on `{results['data']}`" if results and results.get("data") else ""
    return "\n".join([f"## Results\n\nMeasured with `striate eval`{data}; ± is one standard error.\n",
                      "| task | metric | value | records |", "|---|---|---|---|", *rows])  # fmt: skip


def _use(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_bytes())
    written = str(config.get("transformers_version") or "")
    needs = "Needs transformers 5: version 4 does not read this config." if written.startswith("5.") else ""
    return _USE.format(needs=needs, routed=_ROUTED if ROUTE in config else "").rstrip()


def _limits(info: dict[str, Any], front: dict[str, Any], results: dict[str, Any] | None) -> str:
    base = front.get("base_model") or f"`{info['parent']}`"
    license = front.get("license")
    lines = [
        f"- The limits and biases of its base, {base}, are its own, too.",
        "- What other tasks lost by the training or the pruning was not measured."
        if (results or {}).get("tasks")
        else "- It was not evaluated: `striate eval` measures it, `striate card` adds the results here.",
        f"- License: {license}; the terms of its base apply." if license else f"- {_UNLICENSED}",
    ]
    return "\n".join(["## Limits\n", *lines])


TRAINED = """\
# {name}

`{parent}` after `striate {verb}`: {what}. All other weights are unchanged.

Region, {count} of {depth} decoder layers ({fraction:.0%}): `{region}`{origin}

{diagram}
{routed}
| | |
|---|---|
| parameters trained | {trainable:,} of {total:,} |
| steps, records | {steps:,}, {samples:,} |
| data | `{data}` |
| seconds | {seconds:.0f} |
| versions | {versions} |

The recipe, as it ran:

```json
{recipe}
```
"""


ROUTED = """
Route: image tokens pass only through layers `{route}`, in training and when it is turned on:
`striate.load("path/to/this/folder")`, or `striate.route(model)` on a model loaded with transformers.
"""


def training_text(info: dict[str, Any], region: Region, route: Region | None = None, *, modules: str = "all") -> str:
    """Markdown from the content of run.json, the region and the modules of it that were trained, and the route."""
    training = info["training"]
    own = "" if modules == "all" else f"the {modules.replace(',', ', ')} matrices of "
    parts = [f"{own}{len(region)} decoder layers"] * bool(region.layers)
    parts += [name for name in ("projector", "tower") if training["groups"].get(name)]
    return TRAINED.format(
        name=info["name"],
        parent=info["parent"],
        verb=info["verb"],
        what=f"trained {', '.join(parts)} ({training['method']})",
        count=len(region),
        depth=region.depth,
        fraction=region.fraction,
        region=region,
        origin=f" ({region.origin})" if region.origin and region.origin != str(region) else "",
        diagram="".join("■" if layer in region else "□" for layer in range(region.depth)),
        routed=ROUTED.format(route=route) if route else "",
        trainable=training["trainable_parameters"],
        total=training["total_parameters"],
        steps=training["steps"],
        samples=training["samples"],
        data=info["options"]["data"],
        seconds=training["seconds"],
        versions=", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        recipe=json.dumps(info["options"], indent=2, default=str),
    )


PRUNED = """
## Pruned with striate

`{parent}` after `striate prune`: {removed} of {depth} decoder layers were removed{by}. All other weights are unchanged,
bit for bit. Verified: this checkpoint gives the same logits and the same text as the model with these layers skipped,
with and without an image, with and without a key-value cache.

| | |
|---|---|
| layers cut (old numbers) | `{cut}` |
| layers left | {left} |
| kept region (new numbers) | `{region}` |
| old and new numbers | `prune.json` |

{diagram}
"""

HEALED = """
Healed: then {what} were trained on `{data}` ({steps} steps).
"""


def pruning_text(cut: dict[str, Any], *, parent: str) -> str:
    """Markdown: the description of the cut (the content of prune.json)."""
    removed, depth = cut["removed"], cut["depth"]["before"]
    return PRUNED.format(
        parent=parent,
        removed=len(removed),
        depth=depth,
        by=f" (chosen by {cut['by']})" if cut["by"] else "",
        cut=",".join(map(str, removed)),
        left=cut["depth"]["after"],
        region=cut["region"],
        diagram="".join("✂" if layer in removed else "□" for layer in range(depth)),
    )


def healing_text(info: dict[str, Any]) -> str:
    """Markdown: what was healed, from the run.json of the healing."""
    training, options = info["training"], info["options"]
    what = "the projector" if not training["groups"].get("layers") else f"layers `{options['region']}` (new numbers)"
    return HEALED.format(what=what, data=options["data"], steps=training["steps"])

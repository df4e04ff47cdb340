"""What the model card says of a training."""

from __future__ import annotations

import json
from typing import Any

from striate.region import Region

CARD = """\
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
    return CARD.format(
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

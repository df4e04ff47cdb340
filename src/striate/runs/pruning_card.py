"""What the model card says of a pruning."""

from __future__ import annotations

from typing import Any

SECTION = """
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
    return SECTION.format(
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

"""The model card of a pruned checkpoint."""

from __future__ import annotations

from typing import Any

HEAD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [striate, visual-region]
---

# {name}
"""

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


def pruned_card(before: str, cut: dict[str, Any], *, name: str, parent: str) -> str:
    """Markdown: the model's card, or a new one, and the description of the cut (the content of prune.json)."""
    removed, depth = cut["removed"], cut["depth"]["before"]
    section = SECTION.format(
        parent=parent,
        removed=len(removed),
        depth=depth,
        by=f" (chosen by {cut['by']})" if cut["by"] else "",
        cut=",".join(map(str, removed)),
        left=cut["depth"]["after"],
        region=cut["region"],
        diagram="".join("✂" if layer in removed else "□" for layer in range(depth)),
    )
    return (before.rstrip() + "\n" if before.strip() else HEAD.format(name=name)) + section


def healing_note(info: dict[str, Any]) -> str:
    """Markdown to append to the card, from the run.json of the healing."""
    training, options = info["training"], info["options"]
    what = "the projector" if not training["groups"].get("layers") else f"layers `{options['region']}` (new numbers)"
    return HEALED.format(what=what, data=options["data"], steps=training["steps"])

"""What a pruned checkpoint says about itself, in its model card."""

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

`{parent}` after `striate prune`: {removed} of {depth} decoder layers are gone{by}. Everything else is as it was, to the
bit: before saving, this checkpoint gave the same logits and the same text as the model that skips those layers, with an
image and without, with a key-value cache and without.

| | |
|---|---|
| layers cut (old numbers) | `{cut}` |
| layers left | {left} |
| kept region (new numbers) | `{region}` |
| old and new numbers | `prune.json` |

{strip}
"""

HEALED = """
Then {what} were trained for a short while on `{data}` ({steps} steps).
"""


def pruned_card(before: str, told: dict[str, Any], *, name: str, parent: str) -> str:
    """Markdown: the card that the model came with, or a new one, and what was cut.

    `told` is the content of prune.json.
    """
    removed, depth = told["removed"], told["depth"]["before"]
    section = SECTION.format(
        parent=parent,
        removed=len(removed),
        depth=depth,
        by=f" (chosen by {told['by']})" if told["by"] else "",
        cut=",".join(map(str, removed)),
        left=told["depth"]["after"],
        region=told["region"],
        strip="".join("✂" if layer in removed else "□" for layer in range(depth)),
    )
    return (before.rstrip() + "\n" if before.strip() else HEAD.format(name=name)) + section


def healed_note(info: dict[str, Any]) -> str:
    """Markdown, for the end of the card, from the run.json of the healing."""
    training, options = info["training"], info["options"]
    what = "the projector" if not training["groups"].get("layers") else f"layers `{options['region']}` (new numbers)"
    return HEALED.format(what=what, data=options["data"], steps=training["steps"])

"""Self-contained HTML pages: no network, one script that the page lets run, and data that cannot become markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from striate import plot
from striate.errors import UserError

GENERATOR = '<meta name="generator" content="striate">'


def render(template: str, css: str, script: str, content: Mapping[str, Any]) -> str:
    """A page from its template, which shows `content`, its style and its script, the only one that may run.

    Everything in `content` is escaped unless it is `Markup`. The template also gets `generator`, the `digest` of the
    script for its content security policy, and the `palettes` of figures.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        css=Markup(css), script=Markup(script), digest=digest, generator=Markup(GENERATOR),
        palettes=(plot.PALETTE, plot.DARK), **content,
    )  # fmt: skip


def check_writable(out: Path) -> None:
    """Raise `UserError` where `write` would replace a file that is not a page of striate."""
    try:
        if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
            raise UserError(f"{out} exists and is not a page of striate: choose another file")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None


def write(page: str, out: Path) -> None:
    """Write a page.

    Raises:
        UserError: the file exists and is not a page of striate, or cannot be written.
    """
    check_writable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None


def script_safe(content: Any) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def page_data(page: Path, name: str) -> Any:
    """What `script_safe` put into the element of this id in a page; None where it cannot be read."""
    try:
        text = page.read_text(encoding="utf-8")
        found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
        return json.loads(found[1]) if found else None
    except (OSError, ValueError):
        return None


def data_address(image: Image.Image, side: int) -> str:
    """A copy of an image, at most `side` pixels on each side, as a `data:` address, the shorter of PNG and JPEG."""
    image = image.copy()
    image.thumbnail((side, side))
    addresses = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        addresses.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(addresses, key=len)

"""`explore --live`: the page of a session, served on this machine by gradio."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import jinja2

from striate.console import console
from striate.errors import UserError
from striate.region import Region
from striate.studies.explore.page import SIZE, page
from striate.studies.explore.session import Answer, Session, merge

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
import gradio as gr
from starlette.middleware import Middleware

KEPT = 2
"""Rounds whose answers are side by side: the last ones."""
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""The browser loads nothing from other hosts, and sends nothing there."""
UPLOAD_BYTES = 32 * 2**20
"""The largest file that can be dropped into the page."""
CACHE = (3600, 86400)
"""Seconds between two looks for uploaded files, and those after which one is deleted. The end deletes all."""


def build(session: Session) -> gr.Blocks:
    """The page: an image, a question and layers to change; the answers, and a view of each model's layers."""
    subject = session.subjects[0]
    layers = [str(layer) for layer in range(subject.vlm.depth)]
    with gr.Blocks(title=f"striate: {subject.name}", analytics_enabled=False, delete_cache=CACHE) as blocks:
        rounds = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                # Unlike gradio's Image, it opens no file: files are opened with the limits of records.
                images = gr.Gallery(
                    label="Image", type="filepath", sources=["upload", "clipboard"], columns=2, fit_columns=False,
                    height="16rem", object_fit="contain", interactive=True, buttons=[],
                )  # fmt: skip
                question = gr.Textbox(label="Question", placeholder="What is in the image?")
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=3, min_width=320):
                answers = gr.HTML()
        with gr.Accordion(f"Change layers of {subject.name}"):
            with gr.Row():
                bypassed = gr.CheckboxGroup(layers, label="Bypass", info="Ticked layers pass all tokens on unchanged.")
                reverted = gr.CheckboxGroup(
                    layers, label="Revert", info="Ticked layers have the backbone's weights.",
                    visible=subject.backbone is not None,
                )  # fmt: skip
            with gr.Row():
                region = gr.Textbox(
                    label="Bypass a region",
                    info="Enter ticks its layers.",
                    placeholder="last:4, uniform:25%, 3-7, none",
                )
                route = gr.Textbox(
                    subject.route_form, label="Route", info="Image tokens pass through these layers only, a region."
                )
        with gr.Row():
            views = [_view_column() for _ in session.subjects]
        gr.on(
            [button.click, question.submit], partial(respond, session),
            [images, question, bypassed, reverted, route, rounds], [answers, *views, rounds],
            api_name="ask", show_progress="hidden",
        )  # fmt: skip
        region.submit(partial(_ticks, subject.vlm.depth), region, bypassed, api_visibility="private")
    return blocks


def respond(
    session: Session, images: list[tuple[str, str | None]] | None, question: str, bypassed: list[str],
    reverted: list[str], route: str, rounds: list[list[Answer]],
) -> Iterator[list[Any]]:  # fmt: skip
    """Ask; yield the answers, a view of each model's layers, and the rounds, as they come.

    `images` are files with captions, `bypassed` and `reverted` ticked layers, `rounds` the answers before, the newest
    first.
    """
    contents = [Path(file).read_bytes() for file, _ in images or ()]
    changes = {"bypassed": ",".join(bypassed), "reverted": ",".join(reverted), "route": route}
    latest: list[Answer] = []
    try:
        for latest in session.ask(question, contents, **changes):
            yield [_cards([latest, *rounds][:KEPT]), *[gr.skip()] * (len(session.subjects) + 1)]
    except UserError as error:
        raise _message(error) from error
    rounds = [latest, *rounds][:KEPT]
    yield [_cards(rounds), *map(_view, zip(*rounds, strict=True)), rounds]


def launch(blocks: gr.Blocks, *, host: str, port: int) -> str:
    """Serve the page from a thread of its own; its address."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    *_, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, show_error=True,
        ssr_mode=False, run_history=False, footer_links=[], max_file_size=UPLOAD_BYTES,
        theme=theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
        css=_read("live.css"), app_kwargs={"middleware": [Middleware(Policy)]},
    )  # fmt: skip
    return address


def serve(session: Session, *, host: str, port: int) -> None:
    """Serve the page until it is interrupted."""
    blocks = build(session)
    console().print(f"{launch(blocks, host=host, port=port)} (Ctrl-C ends it)")
    try:
        with suppress(KeyboardInterrupt):
            Event().wait()
    finally:
        blocks.close(verbose=False)


class Policy:
    """Adds the content security policy to every response: ASGI middleware."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[..., Any]) -> None:
        """Pass a request on."""

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _ticks(depth: int, form: str) -> list[str]:
    try:
        return [str(layer) for layer in Region.parse(form, depth)]
    except UserError as error:
        raise _message(error) from error


def _message(error: UserError) -> gr.Error:
    """The error as a message in the page, which reads it as markup."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def _cards(rounds: Sequence[Sequence[Answer]]) -> str:
    """The answers as HTML."""
    return jinja2.Environment(autoescape=True).from_string(_read("answers.html.jinja")).render(rounds=rounds)


def _view_column() -> gr.HTML:
    with gr.Column(min_width=320):
        return gr.HTML()


def _view(answers: Sequence[Answer]) -> str:
    """The page of `explore` about one model's answers, in a frame that nothing leaves."""
    document = html.escape(page(merge(answers), size=SIZE // 6 * len(answers)))
    return f'<iframe class="view" title="layer by layer" sandbox="allow-scripts" srcdoc="{document}"></iframe>'


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")

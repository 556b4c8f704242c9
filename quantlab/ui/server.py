"""Serving the page: address, theme, style sheet, and the language that the person chose."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantlab.estimate import measure_machine
from quantlab.ui.client import Client
from quantlab.ui.painter import paint
from quantlab.ui.services import services
from quantlab.ui.shared import TRANSLATOR

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans JP")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono")

CHOOSE_LANGUAGE = (
    b"<script>(() => { const chosen = document.cookie.match(/quantlab_language=(\\w+)/);"
    b" if (chosen) Object.defineProperty(navigator, 'language',"
    b" { configurable: true, get: () => chosen[1] }); })();</script>"
)
"""Gradio translates by `navigator.language` alone; this lets a cookie speak first. It has to run
before Gradio's own scripts, which is too early for `head=` (added when the page is built)."""

CALM = b"""<script>(() => {
  const ask = window.requestAnimationFrame.bind(window);
  let depth = 0;
  window.requestAnimationFrame = (draw) => {
    const own = depth + 1;
    const run = (now) => { depth = own; try { draw(now); } finally { depth = 0; } };
    return own < 600 ? ask(run) : setTimeout(() => ask(run), 5000);
  };
})();</script>"""
"""Slows what has asked for the next frame from every frame for ten seconds. Gradio's sign that the
page is loading does so for ever after it is gone (6.31, `StatusTracker`), which takes 7% of a core
from the run that the page watches."""


class ChosenLanguage:
    """ASGI middleware that puts `CHOOSE_LANGUAGE` and `CALM` at the start of the page's head."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def edited(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                scripts = b"<head>" + CHOOSE_LANGUAGE + CALM
                body = message.get("body", b"").replace(b"<head>", scripts, 1)
                headers = [pair for pair in start["headers"] if pair[0] != b"content-length"]
                if not message.get("more_body"):
                    headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                start, message = None, {**message, "body": body}
            await send(message)

        await self.app(scope, receive, edited)


def theme() -> gr.themes.Base:
    """Quiet surfaces and the system's own fonts: nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=[*(gr.themes.Font(name) for name in SANS), gr.themes.Font("sans-serif")],
        font_mono=[*(gr.themes.Font(name) for name in MONO), gr.themes.Font("monospace")],
    ).set(
        body_background_fill="#f5f6f8",
        body_background_fill_dark="#0e1116",
        body_text_color="#1c2430",
        body_text_color_dark="#e6e9ef",
        body_text_color_subdued="#5a6472",
        body_text_color_subdued_dark="#9aa4b2",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#161b24",
        background_fill_secondary="#f5f6f8",
        background_fill_secondary_dark="#1d2430",
        border_color_primary="#d9dee6",
        border_color_primary_dark="#2d3543",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161b24",
        block_info_text_color="#5a6472",
        block_info_text_color_dark="#9aa4b2",
        block_label_text_color="#1c2430",
        block_label_text_color_dark="#e6e9ef",
        block_title_text_color="#1c2430",
        block_title_text_color_dark="#e6e9ef",
        block_title_text_weight="600",
        block_border_width="1px",
        block_shadow="none",
        block_shadow_dark="none",
        input_background_fill="#ffffff",
        input_background_fill_dark="#0e1116",
        input_border_width="1px",
        input_border_color="#a3acb9",
        input_border_color_dark="#566175",
        button_primary_background_fill="#0b5cad",
        button_primary_background_fill_dark="#1f6fc2",
        button_primary_background_fill_hover="#094c90",
        button_primary_background_fill_hover_dark="#2a80d8",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#e9edf2",
        button_secondary_background_fill_dark="#242c39",
        button_secondary_background_fill_hover="#dce2ea",
        button_secondary_background_fill_hover_dark="#303a4a",
        button_cancel_background_fill="#ffffff",
        button_cancel_background_fill_dark="#161b24",
        button_cancel_text_color="#a8201a",
        button_cancel_text_color_dark="#ff8a80",
        button_cancel_border_color="#a8201a",
        button_cancel_border_color_dark="#ff8a80",
        button_border_width="1px",
        slider_color="#0b5cad",
        slider_color_dark="#6cb2ff",
        layout_gap="12px",
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`--host` and `--port`; the environment's GRADIO_SERVER_NAME and GRADIO_SERVER_PORT else."""
    parser = argparse.ArgumentParser(prog="python app.py", description="QuantLab's page.")
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to listen on (default: %(default)s, this machine only)",
    )
    port = os.environ.get("GRADIO_SERVER_PORT")
    parser.add_argument(
        "--port",
        type=int,
        default=int(port) if port else None,
        help="port to listen on (default: the first free one from 7860)",
    )
    return parser.parse_args(argv)


def launch(demo: gr.Blocks, argv: Sequence[str] | None = None, **options: Any) -> None:
    """Start the job queue and serve the page until it is stopped; prints the address."""
    given = arguments(argv)
    services()
    measure_machine()
    paint(Client(), "", {}, first=True)  # What the first visitor would wait for, as it takes once.
    # The style sheet is not given as `css_paths=`: Gradio would put a prefix before every comma,
    # also before those inside `:is(a, b)`.
    style = (ASSETS / "quantlab.css").read_text(encoding="utf-8")
    script = (ASSETS / "quantlab.js").read_text(encoding="utf-8")
    # Gradio looks for queued events a thousand times a second, which takes 6% of a core from the
    # run that the page watches; these are near what it does on Windows.
    demo._queue.sleep_when_free, demo._queue.progress_update_sleep_when_free = 0.02, 0.1
    demo.launch(
        server_name=given.host,
        server_port=given.port,
        theme=theme(),
        head=f"<style>{style}</style><script>{script}</script>",
        i18n=TRANSLATOR,
        footer_links=["settings"],
        run_history=False,
        mcp_server=find_spec("mcp") is not None,
        share=False,
        app_kwargs={"middleware": [Middleware(ChosenLanguage)]},
        **options,
    )

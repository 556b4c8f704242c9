"""The Runs tab: every past run, its environment, its files, and the command that repeats it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from quantlab import report
from quantlab.errors import QuantLabError
from quantlab.ui import form
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

FORMATS = ("json", "csv", "html")


@dataclass
class Runs:
    """`use` loads the settings of the run in view into the form; the page connects it."""

    pieces: dict[str, Any] = field(default_factory=dict)
    use: Any = None
    notice: Any = None


def build(shared: Shared) -> Runs:
    """Lay the tab out: the list on the left, the run in view on the right."""
    tab = Runs()
    with gr.Row(elem_id="runs", equal_height=False):
        with gr.Column(scale=1, min_width=320):
            tab.pieces["runs"] = html(
                "runs-list", "quantlab.forward(element, trigger, ['open'])", events=("open",)
            )
        with (
            gr.Column(scale=2, min_width=320, elem_id="run-detail"),
        ):
            tab.pieces["detail"] = html("detail")
            with gr.Row(elem_id="exports") as exports:
                tab.pieces["exports"] = exports
                for kind in FORMATS:
                    _export(kind, shared)
            with gr.Row(elem_id="run-actions"):
                tab.use = gr.Button(i18n("use_settings"), elem_id="use-settings", size="sm")
                delete = gr.Button(i18n("delete"), elem_id="delete", size="sm", variant="stop")
                tab.pieces["delete"] = delete
            with gr.Column(visible=False, elem_id="delete-question") as question:
                gr.Markdown(i18n("delete_sure"), elem_id="delete-sure")
                with gr.Row():
                    yes = gr.Button(
                        i18n("delete_yes"), variant="stop", size="sm", elem_id="delete-yes"
                    )
                    no = gr.Button(i18n("delete_no"), size="sm", elem_id="delete-no")
            tab.pieces["facts"] = html("facts")
    tab.notice = html("runs-message", "quantlab.message(element, watch)")
    _connect(tab, shared, delete, question, yes, no)
    return tab


def _export(kind: str, shared: Shared) -> None:
    """A button that writes the file when it is clicked, and a hidden one that hands it over."""
    button = gr.Button(i18n(f"export_{kind}"), elem_id=f"export-{kind}", size="sm")
    hidden = gr.DownloadButton(visible="hidden", elem_id=f"download-{kind}")
    written = button.click(
        lambda client, run_id: write(client, run_id, kind),
        [shared.client, shared.run_id],
        hidden,
        **BUSY,
    )
    written.then(None, None, None, js=f"() => quantlab.download('download-{kind}')")


def write(client: Client, run_id: str, kind: str) -> str:
    """Write a run as a file for download; returns its path. Raises: gr.Error for a lost run."""
    try:
        run = services().store.run(run_id)
    except QuantLabError as error:
        raise gr.Error(str(error)) from None
    text = {
        "json": lambda: report.to_json(run),
        "csv": lambda: report.to_csv(run),
        "html": lambda: report.to_html(run, client.language),
    }[kind]()
    folder = Path(tempfile.mkdtemp(prefix="quantlab-"))
    path = folder / f"quantlab-{run.id}.{kind}"
    path.write_text(text, encoding="utf-8")
    return str(path)


def _connect(tab: Runs, shared: Shared, delete: Any, question: Any, yes: Any, no: Any) -> None:
    opened = tab.pieces["runs"].open(
        _open, shared.client, [shared.run_id, tab.notice, question], **QUIET
    )
    shared.repaint.append(opened)
    delete.click(lambda: gr.Column(visible=True), None, question, **QUIET)
    no.click(lambda: gr.Column(visible=False), None, question, **QUIET)
    deleted = yes.click(
        _delete,
        [shared.client, shared.run_id],
        [shared.run_id, tab.notice, question],
        **QUIET,
    )
    shared.repaint.append(deleted)


def _open(client: Client, event: gr.EventData) -> tuple[Any, str, Any]:
    closed = gr.Column(visible=False)
    try:
        return services().comparison_of(str(event._data["value"])), "", closed
    except QuantLabError as error:
        return gr.skip(), error_message(error, client.language), closed


def _delete(client: Client, run_id: str) -> tuple[Any, str, Any]:
    closed = gr.Column(visible=False)
    try:
        services().store.delete_run(run_id)
    except QuantLabError as error:
        return gr.skip(), error_message(error, client.language), closed
    services().history(fresh=True)
    note = message(client.say("deleted", id=run_id), client.language)
    return services().first_in_view(""), note, closed


def settings(client: Client, run_id: str) -> tuple[dict[str, Any] | None, str]:
    """The form's values that make the run in view, and a note; None when there is no such run."""
    try:
        run = services().run(run_id)
    except QuantLabError as error:
        return None, error_message(error, client.language)
    note = client.say("use_settings_done", id=run.id)
    return form.values_of(run.spec), message(note, client.language)

"""What happens on the Compare tab: variants come and go, estimates follow, runs start and end."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from quantlab import pipeline
from quantlab.errors import QuantLabError
from quantlab.plots import numbers
from quantlab.plots.templates import render
from quantlab.runs import ACTIVE
from quantlab.types import Estimate
from quantlab.ui import form, options, variants
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services


def added(
    client: Client, data: list[dict[str, Any]], method: str, kind: str | None
) -> tuple[Any, Any, str]:
    try:
        more = variants.add(data, method, kind, client.say)
    except QuantLabError as error:
        return gr.skip(), gr.skip(), error_message(error, client.language)
    return more, options.options_html(more, client), ""


def removed(
    client: Client, data: list[dict[str, Any]], event: gr.EventData
) -> tuple[list[Any], str]:
    fewer = variants.remove(data, str(event._data["value"]))
    return fewer, options.options_html(fewer, client)


def uploaded(path: str) -> str:
    """Keep an uploaded text where it outlives the browser's temporary files; returns its path."""
    source = Path(path)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = services().store.root / "texts" / digest
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    shutil.copyfile(source, target)
    return str(target)


def placed(error: QuantLabError | None, client: Client, note: str = "") -> list[Any]:
    """The messages of all places and the accordions: one error where it belongs, else the note."""
    where = form.place_of(error) if error else "run"
    shown: list[Any] = [""] * len(form.PLACES)
    if error is not None:
        shown[form.PLACES.index(where)] = error_message(error, client.language)
    elif note:
        shown[form.PLACES.index("run")] = message(note, client.language)
    opened = [
        gr.Accordion(open=True) if error is not None and name == where else gr.skip()
        for name in ("texts", "prompts", "advanced")
    ]
    return [*shown, *opened]


def estimate_html(client: Client, cost: Estimate) -> str:
    """Time and memory of a run; where they cannot be known yet, the pipeline's note says why."""
    return render(
        "estimate.html",
        client.language,
        time=numbers.clock(max(cost.seconds, 1)) if cost.seconds else None,
        memory=numbers.gigabytes(cost.peak_bytes) if cost.peak_bytes else None,
        note=cost.note,
    )


def no_estimate(client: Client) -> str:
    return render("estimate_none.html", client.language)


@dataclass
class Pressed:
    """What Run said last in one browser tab. It is shared by the events of the tab as they run, so
    that a look that began before Run was pressed and ends later does not take the message away.

    `error` is why it refused `form`, None where it took it; then `run` is the run that the message
    tells of, for as long as that run's status is one of `told`."""

    form: dict[str, Any] | None = None
    error: QuantLabError | None = None
    run: str = ""
    told: tuple[str, ...] = ()

    def outdated(self) -> bool:
        """Whether the message tells of a run that has gone on since; then it is forgotten."""
        if not self.run:
            return False
        try:
            if services().store.run_head(self.run).status in self.told:
                return False
        except QuantLabError:
            pass  # Deleted.
        self.run = ""
        return True


def look(client: Client, pressed: Pressed, *values: Any) -> list[Any]:
    """The form has changed: estimate it again, keep it in the browser, show what is wrong. What Run
    refused stays refused until something is changed."""
    data = dict(zip(form.FIELDS, values, strict=True))
    problem = None
    try:
        spec = form.spec_of(data, client.say)
        shown = estimate_html(client, pipeline.estimate(spec))
    except QuantLabError as error:
        shown, problem = no_estimate(client), error
    if problem is None and data == pressed.form:
        problem = pressed.error
    messages = placed(problem, client)
    at_run = form.PLACES.index("run")
    if not messages[at_run]:  # What the Run button said last stays until it is pressed again.
        messages[at_run] = gr.skip()
    return [shown, data, *messages]


def start(client: Client, run_id: str, pressed: Pressed, *values: Any) -> list[Any]:
    """Queue the comparison of the form; an error stays beside the control it is about."""
    say = client.say
    pressed.form, pressed.error = dict(zip(form.FIELDS, values, strict=True)), None
    try:
        spec = form.spec_of(pressed.form, say)
        pipeline.validate(spec)
        queue = services().queue
        before = {queue.active(), *queue.waiting()} - {None}
        new = queue.submit(spec)
        view = queue.view(new)
    except QuantLabError as error:
        pressed.error, pressed.run = error, ""
        return [gr.skip(), *placed(error, client)]
    shown: Any = new
    told: tuple[str, ...] = ACTIVE
    if new in before:
        note, told = say("run_same", status=say(f"status_{view.status}")), (view.status,)
    elif before:
        # Whoever watches the running one goes on watching it; the queue shows the new one.
        shown = gr.skip() if run_id in before else new
        note, told = say("run_queued", position=max(view.position, 1)), ("queued",)
    else:
        note = say("run_started")
    pressed.run, pressed.told = new, told
    return [shown, *placed(None, client, note)]


def cancel(run_id: str) -> None:
    """Cancel the run in view, and with it the answers that are being generated for it."""
    queue = services().queue
    active = queue.active()
    if active and services().comparison_of(active) == run_id:
        queue.cancel(active)
    queue.cancel(run_id)


def cancel_other(event: gr.EventData) -> None:
    services().queue.cancel(str(event._data["value"]))


def show(event: gr.EventData) -> str:
    return services().comparison_of(str(event._data["value"]))

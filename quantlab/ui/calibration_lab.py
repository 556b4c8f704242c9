"""The calibration lab: a matrix of methods × calibration texts × evaluation texts, filled by the
queue cell by cell. `build` lays it out anywhere; `repaint` fills its pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components.plot import PlotData

from quantlab import labs, pipeline
from quantlab.errors import ConfigError, QuantLabError
from quantlab.methods import METHODS, parse_variants
from quantlab.models import CATALOGUE
from quantlab.plots import figures, lab, palette
from quantlab.plots.words import Words
from quantlab.runs import ACTIVE
from quantlab.types import RunSpec
from quantlab.ui import actions, form, views
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import Services, services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

if TYPE_CHECKING:
    from quantlab.ui.painter import Painting

SUGGESTED = ("gptq:4", "gptq:3", "awq:4", "awq:3", "smoothquant:8", "static_int8:8", "rtn:4")
CALIBRATIONS = ("project", "self", "wikitext2", "c4")
EVALUATIONS = ("project", "wikitext2", "c4")
NUMBERS = ("calibration_tokens", "calibration_length", "eval_tokens", "window", "group_size")


def build(shared: Shared, page: gr.Tab) -> dict[str, Any]:
    """Lay the lab out on the page and connect it; the pieces that the painter fills."""
    pieces: dict[str, Any] = {}
    with gr.Row(elem_id="lab", equal_height=False):
        with gr.Column(scale=1, min_width=300, elem_id="lab-form"):
            inputs = _form()
            estimate = html("lab-estimate")
            start = gr.Button(i18n("lab_start"), variant="primary", elem_id="lab-start")
            notice = html("lab-message", "quantlab.message(element, watch)")
        with gr.Column(scale=2, min_width=320, elem_id="lab-results"):
            pieces["lab_progress"] = html("lab-progress")
            pieces["lab_cancel"] = gr.Button(
                i18n("cancel"),
                variant="stop",
                elem_id="lab-cancel",
                visible=False,
                size="sm",
                min_width=110,
            )
            with gr.Column(visible=False, elem_id="lab-figure-column") as column:
                pieces["lab_column"] = column
                pieces["lab_figure"] = gr.Plot(
                    show_label=False,
                    container=False,
                    elem_id="lab-figure",
                    elem_classes="ql-figure",
                )
            pieces["lab_notes"] = html("lab-notes")
    started = start.click(_start, [shared.client, *inputs], notice, **BUSY)
    shared.repaint.append(started)
    shared.repaint.append(pieces["lab_cancel"].click(_cancel, None, None, **QUIET))
    gr.on(
        [page.select, *(one.change for one in inputs)],
        _look,
        [shared.client, *inputs],
        estimate,
        trigger_mode="always_last",
        **BUSY,
    )
    return pieces


def _form() -> list[Any]:
    """The inputs of `_start`, in its order."""
    standard = RunSpec()
    model = gr.Dropdown(
        [
            (i18n("model_bundled") if entry.id == "bundled" else entry.id, entry.id)
            for entry in CATALOGUE
        ],
        value=standard.model,
        label=i18n("model"),
        allow_custom_value=True,
        elem_id="lab-model",
    )
    known = [one for one in SUGGESTED if one.partition(":")[0] in METHODS]
    methods = gr.Dropdown(
        [(palette.variant_label(one), one) for one in known],
        value=known[:1] + [one for one in known if one == "awq:4"],
        label=i18n("lab_methods"),
        info=i18n("lab_methods_info"),
        multiselect=True,
        allow_custom_value=True,
        elem_id="lab-methods",
    )
    chosen = {}
    for name, texts, value in (
        ("calibration", CALIBRATIONS, ["project", "self"]),
        ("evaluation", EVALUATIONS, ["project"]),
    ):
        chosen[name] = gr.Dropdown(
            [(i18n(f"text_{one}"), one) for one in texts],
            value=value,
            label=i18n(f"lab_{name}s"),
            multiselect=True,
            allow_custom_value=True,
            elem_id=f"lab-{name}",
        )
    with gr.Accordion(i18n("lab_own"), open=False, elem_id="lab-own"):
        pasted = gr.Textbox(
            label=i18n("lab_paste"), lines=3, max_lines=8, elem_id="lab-paste", max_length=2_000_000
        )
        problem = html("lab-own-message")
        with gr.Row():
            for name, target in chosen.items():
                add = gr.Button(i18n(f"lab_add_{name}"), size="sm", elem_id=f"lab-add-{name}")
                add.click(_paste, [pasted, target], [target, problem], **BUSY)
        with gr.Row():
            for name, target in chosen.items():
                upload = gr.UploadButton(
                    i18n(f"lab_upload_{name}"),
                    file_types=["text", ".txt", ".md"],
                    size="sm",
                    elem_id=f"lab-upload-{name}",
                )
                upload.upload(_uploaded, [upload, target], target, **BUSY)
    counts = []
    with gr.Accordion(i18n("lab_sizes"), open=False, elem_id="lab-sizes"):
        for name in NUMBERS:
            field = name.replace("_", "-")
            counts.append(
                gr.Number(getattr(standard, name), label=i18n(name), elem_id=f"lab-{field}")
            )
    return [model, methods, chosen["calibration"], chosen["evaluation"], *counts]


def _paste(text: str, chosen: list[str]) -> tuple[Any, str]:
    """Keep a pasted text as a file, and choose it."""
    if not (text or "").strip():
        return gr.skip(), ""
    data = text.encode("utf-8", "replace")
    digest = hashlib.sha256(data).hexdigest()[:12]
    path = services().store.root / "texts" / digest / f"pasted-{digest[:6]}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return _with(str(path), chosen), ""


def _uploaded(path: str, chosen: list[str]) -> list[str]:
    return _with(actions.uploaded(path), chosen)


def _with(path: str, chosen: list[str]) -> list[str]:
    return [*(one for one in chosen or [] if one != path), path]


def plan_of(
    model: str,
    methods: Sequence[str] | None,
    calibrations: Sequence[str] | None,
    evaluations: Sequence[str] | None,
    counts: Sequence[float | None],
    say: Words,
) -> labs.Plan:
    """The lab that the form describes. Raises: ConfigError that names what is wrong."""
    if not methods:
        raise ConfigError(f"methods: {say('error_no_variants')}")
    whole: dict[str, Any] = {
        name: form.whole(name, value, say) for name, value in zip(NUMBERS, counts, strict=True)
    }
    variants = parse_variants(",".join(one.strip() for one in methods))
    spec = RunSpec(model=(model or "").strip(), variants=variants, **whole)
    return labs.Plan(spec, *(tuple(dict.fromkeys(t or ())) for t in (calibrations, evaluations)))


def _plan(client: Client, *given: Any) -> labs.Plan:
    """The lab of the form's inputs, in their order."""
    model, methods, calibrations, evaluations, *counts = given
    return plan_of(model, methods, calibrations, evaluations, counts, client.say)


def _look(client: Client, *given: Any) -> str:
    """What the matrix of the form will take; what is wrong with it is said when it is started."""
    try:
        cost = labs.cost(_plan(client, *given), pipeline.estimate)
    except QuantLabError:
        return actions.no_estimate(client)
    return actions.estimate_html(client, cost)


def _start(client: Client, *given: Any) -> str:
    """Queue the matrix; an error is one message beside the button."""
    try:
        plan = _plan(client, *given)
        labs.check(plan, pipeline.validate)
        labs.submit(services().store, services().queue, plan)
        services().history(fresh=True)
    except QuantLabError as error:
        return error_message(error, client.language)
    pairs = len(plan.calibrations) * len(plan.evaluations)
    note = client.say("lab_queued", cells=pairs * len(plan.spec.variants), pairs=pairs)
    return message(note, client.language)


def _cancel() -> None:
    """Cancel what is left of the newest lab; finished cells stay."""
    at = services()
    known = labs.latest(at.store)
    # Those that wait go first, so that none of them begins meanwhile.
    for run_id in reversed(known.runs if known else ()):
        if at.store.run_head(run_id).status in ACTIVE:
            at.queue.cancel(run_id)


def repaint(painting: Painting, client: Client, at: Services) -> None:
    """The newest lab as it stands; drawn anew only where a cell has changed."""
    known = labs.latest(at.store)
    mark = (labs.mark(at.store), client.language)
    statuses = {row[1]: row[2] for row in mark[0]}
    active = any(status in ACTIVE for status in statuses.values())
    painting.put("lab_cancel", active, lambda: gr.Button(visible=active))
    painting.html("lab_progress", _progress(client, at, known, statuses) if known else "")
    shown = known is not None
    painting.put("lab_column", shown, lambda: gr.Column(visible=shown))
    if known is None:
        return
    running = [run for run, status in statuses.items() if status == "running"]
    starts = [[v.state for v in at.queue.view(run).variants] for run in running]
    if painting.same("lab_notes", (mark, starts)) and painting.same(
        "lab_figure", (mark, starts, client.dark)
    ):
        return
    cells = labs.cells(known.plan, [at.queue.view(run) for run in known.runs])
    painting.put("lab_notes", (mark, starts), lambda: lab.notes(cells, client.language))
    painting.put(
        "lab_figure",
        (mark, starts, client.dark),
        lambda: PlotData(
            type="plotly", plot=figures.to_json(lab.figure(cells, client.dark, client.language))
        ),
    )


def _progress(client: Client, at: Services, known: labs.Lab, statuses: dict[str, str]) -> str:
    """How many comparisons have ended, and where the running one is."""
    ended = sum(status not in ACTIVE for status in statuses.values())
    line = client.say("lab_done", done=ended, total=len(statuses))
    running = next((run for run, status in statuses.items() if status == "running"), None)
    if running is None:
        return message(line, client.language)
    view = at.queue.view(running)
    texts = [lab.text_name(t) for t in (view.run.spec.calibration, view.run.spec.text)]
    where = client.say("lab_now", calibration=texts[0], evaluation=texts[1])
    return message(f"{line} {where}", client.language) + views.progress(client, view)

"""What the tabs show of a run, as HTML. Everything here is computed from a JobView in milliseconds
and can be called twice a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantlab import precomputed, report
from quantlab.jobs import JobView, VariantView
from quantlab.plots import fragments, numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.words import Words
from quantlab.runs import ACTIVE, SHIPPED, Run
from quantlab.ui.client import Client
from quantlab.ui.services import Services

FEATURES = ("amx_int8", "avx512_vnni", "avx512_bf16")
"""What the packed kernels live on; the header names those that this machine has."""


def header(client: Client, run: Run, machine: dict[str, Any]) -> str:
    """The slim header: name, promise, environment, run in view."""
    return render(
        "header.html",
        client.language,
        chips=environment_chips(machine, client.say),
        run_id="" if run.shipped else run.id,
        model=model_name(run.spec.model),
        when=moment(run.created),
    )


def environment_chips(machine: dict[str, Any], say: Words) -> list[dict[str, str]]:
    """The few facts of the machine that matter most, the rest on hover."""
    threads = machine.get("threads", machine.get("cores", "?"))
    found = machine.get("cpu_features", ())
    facts = {
        "threads": say("threads_count", count=threads),
        "gpu": str(machine.get("gpu") or say("gpu_none")),
        "features": ", ".join(one.upper() for one in FEATURES if one in found),
        "network": say("network_online" if machine.get("network") else "network_offline"),
    }
    chips = [{"text": fact, "tip": say(f"tip_chip_{key}")} for key, fact in facts.items() if fact]
    if cpu := machine.get("cpu") or machine.get("system"):
        chips.insert(0, {"text": str(cpu), "tip": ""})
    rows = [row for row in report.environment_rows(machine, say) if row[0] != "date"]
    chips[0]["tip"] = "\n".join(f"{name}: {value}" for name, value in rows)
    return chips


def shipped(client: Client, run: Run) -> str:
    """Where the precomputed comparison was measured, and how to measure it here."""
    machine = str(run.environment.get("cpu") or run.environment.get("system") or "")
    cores = run.environment.get("cores", "?")
    values = {"machine": machine, "cores": cores, "date": day(run), "time": took(run)}
    return render("shipped.html", client.language, told=client.say("shipped_told", **values))


def day(run: Run) -> str:
    """The day of a run, as its own machine counted it."""
    return str(run.environment.get("date") or "")[:10]


def progress(client: Client, view: JobView) -> str:
    """Where a run is: stage and block with time left while it goes on, one line when it ended."""
    say = client.say
    running = next((v for v in view.variants if v.state == "running"), None)
    settled = sum(v.state in ("finished", "failed", "cancelled") for v in view.variants)
    done = sum(v.state == "finished" for v in view.variants)
    values: dict[str, Any] = {
        "status": view.status,
        "line": "",
        "left": None,
        "percent": round(100 * view.fraction),
        "steps": [_step(v, say) for v in view.variants],
        "note": None,
        "error": view.run.error if view.status == "failed" else None,
        "notices": view.notices,
    }
    if view.status == "running":
        values["line"] = step_line(running, say) if running else preparing(view.message, say)
        if view.message == "cancelling":
            values["line"] = say("cancelling")
        elif view.seconds_left is not None:
            values["left"] = numbers.clock(view.seconds_left)
    elif view.status == "queued":
        values["line"] = say("waiting_line", ahead=max(view.position, 1))
    elif view.status == "finished":
        key = "done_answers" if view.run.kind == "answer" else "done_in"
        values["line"] = say(key, time=took(view.run))
        values["note"] = say("done_count", done=done, total=len(view.variants))
    elif view.status == "cancelled":
        values["line"] = say("cancelled_after", time=took(view.run))
        values["note"] = say("kept", count=done)
    else:
        values["line"] = say("failed_run")
        values["note"] = say("kept", count=done) if settled else None
    return render("progress.html", client.language, **values)


def step_line(variant: VariantView, say: Words) -> str:
    """`GPTQ 4-bit · quantizing · block 17/30`."""
    parts = [palette.variant_label(variant.label)]
    if variant.stage:
        parts.append(stage_name(variant.stage, say))
    if variant.total > 1:
        key = "block_of" if variant.stage == "quantize" else "step_of"
        parts.append(say(key, done=variant.done, total=variant.total))
    return " · ".join(parts)


def preparing(message: str, say: Words) -> str:
    """What happens before the first variant, from the queue's own words, part by part."""
    parts = [stage_name(part, say) for part in message.split(" · ")]
    return " · ".join(part for part in parts if part)


def stage_name(stage: str, say: Words) -> str:
    key = "stage_" + stage.replace(" ", "_")
    return say(key) if say.has(key) else stage.replace("_", " ")


def _step(variant: VariantView, say: Words) -> dict[str, str]:
    return {
        "state": variant.state,
        "method": variant.label.partition(":")[0],
        "label": palette.variant_label(variant.label),
        "note": say(f"state_{variant.state}"),
    }


def queue(client: Client, services: Services, run_id: str) -> str:
    """The job that runs and those that wait, where there is more to see than the run in view."""
    say = client.say
    active, waiting = services.queue.active(), services.queue.waiting()
    jobs = []
    for place, job in enumerate([*([active] if active else []), *waiting]):
        run = services.store.run_head(job)
        number = place if active else place + 1
        jobs.append(
            {
                "id": job,
                "model": model_name(run.spec.model),
                "variants": ", ".join(palette.variant_label(v.label) for v in run.spec.variants),
                "state": say("state_running")
                if job == active
                else say("queue_number", position=number),
                "current": job == run_id or run.parent == run_id,
                "waiting": job != active,
            }
        )
    if not waiting and all(job["current"] for job in jobs):
        jobs = []
    heading = say("queue_heading", count=len(waiting)) if waiting else ""
    return render("queue.html", client.language, jobs=jobs, heading=heading)


def table(client: Client, view: JobView) -> str:
    """The results, with a row for every variant of the run from the start."""
    say = client.say
    records = [v.record for v in view.variants if v.record is not None]
    pending = {
        v.label: fragments.Pending(
            v.label,
            v.state,
            stage_note(v, say),
            round(100 * v.done / v.total) if v.total else 0,
        )
        for v in view.variants
        if v.record is None
    }
    order = [v.label for v in view.variants]
    marks = [SHIPPED] if view.run.shipped else []
    return fragments.results_table(records, pending, order, client.language, marks)


def stage_note(variant: VariantView, say: Words) -> str:
    if variant.state == "running" and variant.stage:
        return step_line(variant, say).partition(" · ")[2]
    return say(f"state_{variant.state}")


def verdict(client: Client, view: JobView) -> str:
    records = [v.record for v in view.variants if v.record is not None]
    note = ""
    if view.run.shipped:
        note = " · ".join((client.say("badge_precomputed"), day(view.run)))
    elif view.status in ACTIVE:
        note = client.say("verdict_so_far")
    return fragments.verdict_box(records, note, client.language)


def answers(client: Client, views: Sequence[JobView]) -> str:
    """Answers of all views, in the order given; each prompt with one column a variant."""
    blocks = []
    for place, view in enumerate(views):
        for index, prompt in enumerate(view.run.spec.prompts):
            columns = tuple(
                fragments.Column(
                    v.label,
                    v.state,
                    v.record,
                    v.outputs[index] if index < len(v.outputs) else "",
                    stage_note(v, client.say),
                )
                for v in view.variants
            )
            note = _answer_note(client, view, asked_later=place < len(views) - 1)
            blocks.append(fragments.Block(view.run.id, prompt, index, columns, note))
    return fragments.answers(blocks, client.language)


def _answer_note(client: Client, view: JobView, asked_later: bool) -> str:
    notes = []
    if asked_later:
        notes.append(client.say("answers_added"))
    if not any(palette.style(v.label.partition(":")[0]).reference for v in view.variants):
        notes.append(client.say("answers_no_original"))
    if view.status == "queued":
        notes.append(client.say("waiting_line", ahead=max(view.position, 1)))
    if view.status == "failed" and view.run.error:
        notes.append(view.run.error)
    return " · ".join(notes)


def runs(client: Client, history: Sequence[Run], run_id: str) -> str:
    """Every past run, newest first."""
    say = client.say
    shown = []
    for run in [*history, precomputed.run()]:
        if run.spec.forced:  # A step in the fork explorer, where it is shown.
            continue
        done = sum(record.status == "finished" for record in run.records)
        notes = [say("run_rows", done=done, total=len(run.spec.variants))]
        if run.ended and run.started:
            notes.append(say("run_took", time=took(run)))
        shown.append(
            {
                "id": "" if run.shipped else run.id,
                "kind": run.kind,
                "shipped": run.shipped,
                "status": run.status,
                "model": model_name(run.spec.model),
                "variants": [
                    {"method": v.method, "label": palette.variant_label(v.label)}
                    for v in run.spec.variants
                ],
                "when": moment(run.created),
                "iso": datetime.fromtimestamp(run.created).astimezone().isoformat(),
                "note": " · ".join(notes),
                "current": not run_id if run.shipped else run_id in (run.id, run.parent),
            }
        )
    return render("runs.html", client.language, runs=shown, own=bool(history))


def detail(client: Client, run: Run) -> str:
    """The run in view by name, how it ended, and the command that reproduces it."""
    return render(
        "detail.html",
        client.language,
        run=run,
        shipped=Markup(shipped(client, run)) if run.shipped else "",
        command=report.reproduce_command(run.spec),
        command_id="reproduce-command",
    )


def facts(client: Client, run: Run) -> str:
    """Settings and environment of a run."""
    return render(
        "facts.html",
        client.language,
        settings=report.explained_settings(run.spec, client.say),
        environment=report.explained_environment(run.environment, client.say),
    )


def model_name(model: str) -> str:
    """A model as people call it: the last part of a path, a Hub id as it is."""
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or model.startswith(("./", "../", "~")) else model


def moment(epoch: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(epoch))


def took(run: Run) -> str:
    """How long a run worked: from its start to its end, or to now while it goes on."""
    if run.started is None:
        return numbers.clock(0)
    return numbers.clock((run.ended or time.time()) - run.started)

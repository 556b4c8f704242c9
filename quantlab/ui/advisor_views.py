"""What the Advisor tab shows, as HTML: the advice, and what others found beside what was measured.

Pure functions of what they are given; both answer in some ten milliseconds.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from quantlab.advisor import SHAPES, Advice, Row, advise, device
from quantlab.advisor import published as others
from quantlab.advisor.shapes import ModelShape
from quantlab.environment import machine
from quantlab.plots import numbers, palette
from quantlab.plots.templates import render
from quantlab.plots.words import Words
from quantlab.runs import Run
from quantlab.types import RunSpec
from quantlab.ui.client import Client
from quantlab.ui.views import FEATURES, model_name, shipped


def answer(client: Client, advice: Advice, run: Run | None) -> str:
    """The recommendation with its reason, the shape and device it is for, and every variant."""
    say = client.say
    at = advice.device
    return render(
        "advisor.html",
        client.language,
        choice=palette.variant_label(advice.choice.variant) if advice.choice else None,
        method=_method(advice.choice.variant) if advice.choice else "",
        variant=advice.choice.variant if advice.choice else "",
        reasons=_reasons(advice, run, say),
        guessed=advice.shape.guessed,
        shape=_shape(advice.shape, say),
        device=at.title if at.id not in ("this", "phone") else say(f"advisor_{at.id}"),
        memory=say(
            "advisor_device_memory",
            memory=numbers.gigabytes(at.memory),
            usable=numbers.gigabytes(at.usable),
        ),
        memory_tip=say(f"advisor_usable_{at.kind}"),
        bandwidth=(
            say("advisor_bandwidth_unknown")
            if at.bandwidth is None
            else say("advisor_bandwidth", speed=f"{at.bandwidth / 1e9:,.1f}")
        ),
        source=at.source,
        rows=[_row(one, advice) for one in advice.rows],
    )


def _method(variant: str) -> str:
    return variant.partition(":")[0]


def _shape(shape: ModelShape, say: Words) -> str:
    count = shape.parameters
    return say(
        "advisor_shape_of",
        layers=shape.layers,
        width=f"{shape.width:,}",
        inner=f"{shape.feed_forward:,}",
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        vocabulary=f"{shape.vocabulary:,}",
        parameters=f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M",
    )


def _reasons(advice: Advice, run: Run | None, say: Words) -> list[str]:
    """Why this one: the use, what was passed over, the memory, the speed, and what it lost here."""
    usable = numbers.gigabytes(advice.device.usable)
    choice = advice.choice
    if choice is None:
        least = min(advice.passed_over, key=lambda one: one.memory.total)
        return [
            say(
                "advisor_short",
                name=palette.variant_label(least.variant),
                needed=numbers.gigabytes(least.memory.total),
                usable=usable,
            )
        ]
    reasons = [say(f"advisor_why_{advice.use}")]
    if advice.passed_over:
        names = ", ".join(palette.variant_label(one.variant) for one in advice.passed_over)
        reasons.append(say("advisor_passed_over", names=names))
    total = numbers.gigabytes(choice.memory.total)
    reasons.append(say("advisor_needs", total=total, usable=usable))
    if choice.tokens_per_second is None:
        reasons.append(say("advisor_no_speed"))
    else:
        speed = numbers.speed(choice.tokens_per_second)
        reasons.append(say("advisor_at_most", speed=speed))
    for one in others.measured(run.records if run else ()):
        if others.plain_variant(one.record) == choice.variant:
            facts = []
            if one.record.kl_divergence is not None:
                kl = numbers.divergence(one.record.kl_divergence)
                facts.append(say("advisor_here_kl", kl=kl))
            if one.change is not None:
                facts.append(say("advisor_here_change", change=_change(one.change)))
            key = "advisor_here_shipped" if run and run.shipped else "advisor_here"
            reasons.append(say(key, facts=", ".join(facts) or numbers.NOTHING))
            break
    return reasons


def _row(row: Row, advice: Advice) -> dict[str, Any]:
    memory = row.memory
    cells = [
        ("bits", row.size.bits_per_weight, numbers.bits(row.size.bits_per_weight)),
        ("weights", memory.weights, numbers.gigabytes(memory.weights)),
        ("cache", memory.kv_cache, numbers.gigabytes(memory.kv_cache)),
        ("overhead", memory.total - memory.weights - memory.kv_cache, None),
        ("total", memory.total, numbers.gigabytes(memory.total)),
        ("speed", row.tokens_per_second, numbers.speed(row.tokens_per_second)),
        ("longest", row.longest_context, f"{row.longest_context:,}"),
    ]
    return {
        "variant": row.variant,
        "method": _method(row.variant),
        "label": palette.variant_label(row.variant),
        "fit": row.fit,
        "chosen": row is advice.choice,
        "cells": [
            (key, value, numbers.gigabytes(value) if text is None else text)
            for key, value, text in cells
        ],
    }


def beside(client: Client, run: Run | None) -> str:
    """The article's tables and papers' perplexities, each beside the records of `run`."""
    found = others.measured(run.records if run else ())
    say = client.say
    return render(
        "advisor_tables.html",
        client.language,
        measured=bool(found),
        run=_run(run.spec, say) if run else "",
        shipped=Markup(shipped(client, run)) if run and run.shipped else "",
        precisions=[_precision(one, found) for one in others.PRECISIONS],
        published=[_published(one, found, run, say) for one in others.PUBLISHED],
        speeds=[_speed(variant, speed) for variant, speed in others.SPEEDS],
        hardware=_hardware(say),
    )


def _run(spec: RunSpec, say: Words) -> str:
    return say(
        "advisor_run",
        model=model_name(spec.model),
        text=model_name(spec.text),
        tokens=f"{spec.eval_tokens:,}",
        window=f"{spec.window:,}",
        group=spec.group_size,
    )


def _change(value: float | None) -> str:
    """A relative change as a signed percentage; an explosion as a factor."""
    if value is None:
        return numbers.NOTHING
    return f"{100 * value:+.1f}%" if value < 10 else f"×{value + 1:,.0f}"


def _precision(row: others.Precision, found: tuple[others.Measured, ...]) -> dict[str, Any]:
    low, high = row.loss
    return {
        "name": row.name,
        "size": f"{100 * row.size:g}%",
        "loss": f"{low:g}–{high:g}%" if high else "0%",
        "here": [
            {
                "method": one.record.method,
                "label": palette.variant_label(one.record.variant),
                "size": numbers.percent(one.size),
                "change": _change(one.change),
            }
            for one in found
            if one.record.bits == row.bits
        ],
    }


def _published(
    row: others.Published, found: tuple[others.Measured, ...], run: Run | None, say: Words
) -> dict[str, Any]:
    context = numbers.NOTHING if row.context is None else f"{row.context:,}"
    theirs = {"model": row.model, "text": row.text, "context": context}
    here = next((m for m in found if others.plain_variant(m.record) == row.variant), None)
    if here is None or run is None:
        differs = say("advisor_differs_alone", **theirs)
        if row.group:
            differs += "; " + say("advisor_group", group=row.group)
    else:
        spec = run.spec
        differs = say(
            "advisor_differs",
            **theirs,
            here=model_name(spec.model),
            here_text=model_name(spec.text),
            window=f"{spec.window:,}",
        )
        own = here.record.config.get("group_size", spec.group_size)
        if row.group:
            differs += "; " + say("advisor_differs_group", group=row.group, here=own)
    return {
        "variant": row.variant,
        "method": _method(row.variant),
        "label": palette.variant_label(row.variant),
        "theirs": f"{row.baseline:.2f} → {row.perplexity:.2f}",
        "change": _change(row.change),
        "here": _change(here.change) if here else numbers.NOTHING,
        "differs": differs,
        "source": row.source,
    }


def _speed(variant: str, speed: float) -> dict[str, Any]:
    at = device(others.SPEED_DEVICE)
    rows = advise(SHAPES[others.SPEED_MODEL], 1, 1, at, "research").rows
    bound = next(one.tokens_per_second for one in rows if one.variant == variant)
    assert bound is not None
    return {
        "method": _method(variant),
        "label": palette.variant_label(variant),
        "speed": numbers.speed(speed),
        "bound": numbers.speed(bound),
        "share": numbers.percent(speed / bound),
    }


def _hardware(say: Words) -> list[dict[str, str]]:
    names = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}
    own = [one.upper() for one in FEATURES if one in machine().get("cpu_features", ())]
    features = ", ".join(own) or say("advisor_intel_none")
    return [
        {
            "name": names[vendor],
            "says": say(f"advisor_{vendor}"),
            "remark": say(f"advisor_{vendor}_remark", features=features),
        }
        for vendor in others.HARDWARE
    ]

"""The measurement of causal KL divergences, a process of its own, and its control panel; and the
button that gives a linear more bits in a mixed-precision variant of the Compare form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import gradio as gr

from quantlab.errors import ConfigError, QuantLabError
from quantlab.inspection.survey import Survey
from quantlab.methods.mixed_config import parse_pattern
from quantlab.types import VariantSpec
from quantlab.ui import variants
from quantlab.ui.captures import POLL, captures, progress_html
from quantlab.ui.client import Client
from quantlab.ui.inspection_source import Chosen, survey_of
from quantlab.ui.messages import error_message, message
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

MODULE = "quantlab.inspection.causal"
TOKENS = (256, 512, 1024, 2048, 4096)
RAISED = (5, 6, 8, 16)
"""Bits that a linear can be raised to; 16 leaves it alone."""


def build_measuring(shared: Shared, chosen: Any, bits: Any) -> Any:
    """Blocks, linears and tokens of a measurement; start, progress, cancel. Returns a State that
    changes when more is known."""
    seen = gr.State("")
    with (
        gr.Accordion(i18n("inspect_measure"), open=False, elem_id="inspect-measure"),
        gr.Row(equal_height=False),
    ):
        blocks = gr.Textbox(
            "0-1",
            label=i18n("inspect_blocks"),
            info=i18n("inspect_blocks_info"),
            elem_id="inspect-blocks",
            max_length=200,
            min_width=150,
        )
        linears = gr.Textbox(
            "",
            label=i18n("inspect_linears"),
            info=i18n("inspect_linears_info"),
            elem_id="inspect-linears",
            max_length=400,
            min_width=180,
        )
        tokens = gr.Dropdown(
            [(f"{one:,}", one) for one in TOKENS],
            value=1024,
            label=i18n("inspect_tokens"),
            info=i18n("inspect_tokens_info"),
            elem_id="inspect-tokens",
            min_width=130,
        )
        start = gr.Button(
            i18n("inspect_start"),
            variant="primary",
            elem_id="inspect-start",
            min_width=130,
            scale=0,
        )
    with gr.Row(elem_id="inspect-kl-state", elem_classes="ql-job", equal_height=False):
        progress = html("inspect-kl-progress", "quantlab.message(element, watch)", scale=1)
        cancel = gr.Button(
            i18n("cancel"),
            variant="stop",
            size="sm",
            visible=False,
            elem_id="inspect-kl-cancel",
            scale=0,
            min_width=110,
        )
    timer = gr.Timer(2 * POLL, active=False)
    watched = [progress, cancel, timer, seen]
    start.click(_start, [shared.client, chosen, bits, blocks, linears, tokens], watched, **QUIET)
    timer.tick(_look, shared.client, watched, **BUSY)
    cancel.click(_cancel, shared.client, watched, **BUSY)
    return seen


def numbers_of(text: str, count: int) -> set[int]:
    """Block numbers of `0-3, 12`; all of nothing. Raises: ConfigError."""
    found: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", (text or "").strip())):
        hit = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        first, last = (int(hit[1]), int(hit[2] or hit[1])) if hit else (1, 0)
        if first > last or last >= count:
            raise ConfigError(
                f"blocks: {part}; needs numbers from 0 to {count - 1}, such as 0-3, {count - 1}"
            )
        found.update(range(first, last + 1))
    return found or set(range(count))


def names_of(found: Survey, blocks: str, linears: str) -> list[str]:
    """The linears of these blocks whose path ends in one of these words. Raises: ConfigError."""
    wanted = numbers_of(blocks, found.blocks)
    words = tuple(filter(None, re.split(r"[,\s]+", (linears or "").strip())))
    for word in words:
        if not any(path.endswith(word) for path in found.paths):
            raise ConfigError(
                f"linears: no linear is called {word}; needs some of {', '.join(found.paths)}"
            )
    return [
        name
        for name, one in found.linears.items()
        if one.block in wanted and (not words or one.path.endswith(words))
    ]


def _start(
    client: Client, chosen: Chosen, bits: int, blocks: str, linears: str, tokens: int
) -> list[Any]:
    try:
        found = survey_of(chosen)
        names = names_of(found, blocks, linears)
        every = len(names) == len(found.linears)
        arguments = [f"--bits={bits}", f"--tokens={tokens}"]
        arguments += [] if every else ["--linears", *names]
        capture = captures(MODULE).start(found.origin.model, arguments)
    except QuantLabError as error:
        shown = error_message(error, client.language)
        return [shown, gr.Button(visible=False), gr.skip(), gr.skip()]
    shown = progress_html(client, capture)
    return [shown, gr.Button(visible=True), gr.Timer(active=True), gr.skip()]


def _over(shown: str, seen: str) -> list[Any]:
    return [shown, gr.Button(visible=False), gr.Timer(active=False), seen]


def _look(client: Client) -> list[Any]:
    """What the measurement has come to."""
    capture = captures(MODULE).current
    if capture is None:
        return _over("", "")
    seen = f"{capture.process.pid} {capture.stage} {capture.done} {capture.over}"
    if capture.error:
        error = QuantLabError(capture.error, capture.hint)
        return _over(error_message(error, client.language), seen)
    if capture.cancelled:
        return _over(message(client.say("inspect_kl_cancelled"), client.language), seen)
    if not capture.path:
        return [progress_html(client, capture), gr.skip(), gr.skip(), seen]
    note = client.say("inspect_kl_done", count=capture.total)
    return _over(message(note, client.language), seen)


def _cancel(client: Client) -> list[Any]:
    capture = captures(MODULE).current
    if capture is not None and not capture.over:
        capture.cancel()
    return _look(client)


# More bits for one linear


def raised(
    data: list[dict[str, Any]], name: str, bits: int, to: int
) -> tuple[list[dict[str, Any]], VariantSpec]:
    """The form's variants, in which a mixed-precision one gives the linear `to` bits, and that one.

    The first mixed variant whose bits are set by hand gets a rule more, or another number in the
    rule it has; without one there will be, with everything else at `bits`, rounded to nearest.
    """
    chips = variants.read(data)
    for place, one in enumerate(chips):
        options = dict(one.spec.options)
        if one.spec.method == "mixed" and not options.get("budget"):
            options["pattern"] = with_rule(str(options.get("pattern", "")), name, to)
            spec = dataclasses.replace(one.spec, options=tuple(sorted(options.items())))
            chips[place] = dataclasses.replace(one, spec=spec)
            return variants.write(chips), spec
    spec = VariantSpec(
        "mixed",
        None,
        (
            ("arithmetic", "rtn"),
            ("attention_bits", bits),
            ("feed_forward_bits", bits),
            ("pattern", with_rule("", name, to)),
        ),
    )
    return variants.write([*chips, variants.chip(spec)]), spec


def with_rule(pattern: str, name: str, to: int) -> str:
    """The pattern with `name=to` as its last rule, and no other rule for the same name."""
    try:
        rules = parse_pattern(pattern)
    except ConfigError:  # Half typed in the form: what it says there is that form's business.
        rules = []
    kept: Sequence[tuple[str, int]] = [*((n, b) for n, b in rules if n != name), (name, to)]
    return ";".join(f"{wanted}={bits}" for wanted, bits in kept)

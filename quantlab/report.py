"""A run as files: JSON, CSV, one self-contained HTML page, and the command that reproduces it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from quantlab.plots import FIGURES, figures, fragments, numbers, pairs
from quantlab.plots.templates import render
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord, document
from quantlab.types import RunSpec

if TYPE_CHECKING:
    from quantlab.store import Run

STYLE = Path(__file__).resolve().parents[1] / "assets" / "quantlab.css"

FLAGS = {
    "group_size": "--group-size",
    "calibration": "--calibration",
    "calibration_tokens": "--calibration-tokens",
    "calibration_length": "--calibration-length",
    "text": "--text",
    "eval_tokens": "--eval-tokens",
    "window": "--window",
    "max_new_tokens": "--max-new-tokens",
    "device": "--device",
    "threads": "--threads",
    "seed": "--seed",
}
"""Fields of a RunSpec and the options of `quantlab compare` that set them."""

CSV_FIELDS = (
    "variant",
    "method",
    "bits",
    "status",
    "error",
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "kl_divergence",
    "kl_divergence_low",
    "kl_divergence_high",
    "top1_agreement",
    "size_bytes",
    "bits_per_weight",
    "quantize_seconds",
    "peak_rss_bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token_seconds",
    "execution",
    "kernel",
    "activation_bits",
    "cached",
    "fallbacks",
    "config",
)


def reproduce_command(spec: RunSpec) -> str:
    """The command line that runs the same comparison; what is default is left out."""
    standard = RunSpec()
    methods = ",".join(variant.label for variant in spec.variants)
    parts = ["python -m quantlab compare", f"--model {shlex.quote(spec.model)}"]
    parts.append(f"--methods {shlex.quote(methods)}")
    for name, flag in FLAGS.items():
        value = getattr(spec, name)
        if value != getattr(standard, name):
            parts.append(f"{flag} {shlex.quote(str(value))}")
    for prompt in spec.prompts:
        # With an equals sign where the prompt would be taken for an option.
        parts.append(f"--prompt{'=' if prompt.startswith('-') else ' '}{shlex.quote(prompt)}")
    for string in spec.stop_strings:
        parts.append(f"--stop{'=' if string.startswith('-') else ' '}{shlex.quote(string)}")
    if spec.allow_pickle:
        parts.append("--allow-pickle")
    if spec.trust_remote_code:
        parts.append("--trust-remote-code")
    return " ".join(parts)


def to_json(run: Run) -> str:
    """The document `compare --json` writes, with the run it belongs to. No NaN or infinity."""
    data = document(run.environment, list(run.records))
    data["run"] = {
        "id": run.id,
        "kind": run.kind,
        "parent": run.parent,
        "status": run.status,
        "error": run.error,
        "created": run.created,
        "started": run.started,
        "ended": run.ended,
        "spec": run.spec.to_json(),
        "command": reproduce_command(run.spec),
    }
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(run: Run) -> str:
    """One row a variant; intervals in two columns, options and fallbacks as JSON."""
    target = io.StringIO()
    writer = csv.DictWriter(target, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in run.records:
        writer.writerow({name: _cell(value) for name, value in _flat(record).items()})
    return target.getvalue()


def to_html(run: Run, language: str | None = None) -> str:
    """One page that needs nothing else: table, verdict, figures, answers, environment, command.

    Plotly is inlined once; every text of a model or a person is escaped.
    """
    say = words(language)
    drawn = figures.drawn(run.records)
    data = {
        name: {
            theme: json.loads(figures.to_json(FIGURES[name](run.records, dark, language)))
            for theme, dark in (("light", False), ("dark", True))
        }
        for name in drawn
    }
    page = render(
        "report.html",
        language,
        run=run,
        language=say.language,
        style=Markup(STYLE.read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)),
        table=Markup(fragments.results_table(run.records, language=language)),
        verdict=Markup(fragments.verdict_box(run.records, language=language)),
        pairs=Markup(pairs.box(run.records, language)),
        answers=Markup(_answers(run, say)),
        figures=drawn,
        data=Markup(_script_json(data)),
        settings=settings(run.spec, say),
        environment=environment_rows(run.environment, say),
        command=reproduce_command(run.spec),
    )
    return page


def settings(spec: RunSpec, say: Words) -> list[tuple[str, str]]:
    """What a run was asked to do, as names and values for people."""
    return [(name, value) for name, value, _ in explained_settings(spec, say)]


def explained_settings(spec: RunSpec, say: Words) -> list[tuple[str, str, str]]:
    """The same, each with what explains its name."""
    rows = [
        ("model", spec.model),
        ("variants", ", ".join(variant.label for variant in spec.variants)),
        ("group_size", str(spec.group_size)),
        ("calibration", f"{spec.calibration} · {spec.calibration_tokens:,}"),
        ("evaluation", f"{spec.text} · {spec.eval_tokens:,} · {spec.window:,}"),
        ("device", spec.device),
        ("threads", str(spec.threads or say("setting_threads_auto"))),
        ("seed", str(spec.seed)),
    ]
    return [(say(f"setting_{key}"), value, say(f"tip_setting_{key}")) for key, value in rows]


def explained_environment(environment: Mapping[str, Any], say: Words) -> list[tuple[str, str, str]]:
    """`environment_rows`, each with what explains its name; '' for what is not known here."""
    return [
        (*row, say(tip) if say.has(tip := f"tip_environment_{key}") else "")
        for key, value in environment.items()
        for row in environment_rows({key: value}, say)
    ]


def environment_rows(
    environment: Mapping[str, Any], say: Words, prefix: str = ""
) -> list[tuple[str, str]]:
    """A nested environment as flat names and values, sizes and truths as people write them."""
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += environment_rows(value, say, f"{name} · ")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(map(str, value)) or numbers.NOTHING))
        elif isinstance(value, bool):
            rows.append((name, say("yes" if value else "no")))
        elif key.endswith("_bytes") and isinstance(value, int):
            rows.append((name.removesuffix(" bytes"), numbers.gigabytes(value)))
        else:
            rows.append((name, numbers.NOTHING if value is None else str(value)))
    return rows


def _answers(run: Run, say: Words) -> str:
    blocks = [
        fragments.Block(
            run.id,
            prompt,
            index,
            tuple(fragments.Column(r.variant, r.status, r) for r in run.records),
        )
        for index, prompt in enumerate(run.spec.prompts)
    ]
    return fragments.answers(blocks, say.language) if blocks else ""


def _flat(record: ResultRecord) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name in ("perplexity", "kl_divergence"):
        low, high = values[f"{name}_ci"] or (None, None)
        values[f"{name}_low"], values[f"{name}_high"] = low, high
    return {name: values[name] for name in CSV_FIELDS}


def _cell(value: Any) -> Any:
    """A CSV cell. Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character in it can end the element."""
    text = json.dumps(_finite(value))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text

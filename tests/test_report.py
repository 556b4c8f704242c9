"""A run as files: complete, readable by others, self-contained, and nothing in it can run."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from quantlab import report
from quantlab.cli import options, spread
from quantlab.cli.compare import compare as command
from quantlab.methods import parse_variants
from quantlab.plots.words import words
from quantlab.results import ResultRecord
from quantlab.types import RunSpec
from tests.records import failed, generation, record, run

HOSTILE = "</script><script>document.title='gone'</script><img src=x onerror=alert(1)>"


def full_run() -> Any:
    return run(
        record("bf16", outputs=(generation("", " the", " sea"),)),
        record("gptq:4", kl=0.05, outputs=(generation("", " the", " salt", first=1),)),
        record("rtn:4", kl=0.2, execution="simulated", fallbacks=("no kernel",)),
        failed("awq:4", "=broken"),
    )


def test_json_is_the_command_lines_document_with_its_run() -> None:
    one = full_run()
    data = json.loads(report.to_json(one))
    assert data["schema"] == 1
    assert data["environment"] == one.environment
    assert [ResultRecord.from_json(entry) for entry in data["results"]] == list(one.records)
    assert RunSpec.from_json(data["run"]["spec"]) == one.spec
    assert data["run"]["command"] == report.reproduce_command(one.spec)


def test_json_has_no_nan_or_infinity() -> None:
    one = run(record("gptq:4", perplexity=math.inf, kl_divergence_ci=(math.nan, 1.0)))
    (entry,) = json.loads(report.to_json(one), parse_constant=pytest.fail)["results"]
    assert entry["perplexity"] is None
    assert entry["kl_divergence_ci"] == [None, 1.0]


def test_csv_has_a_row_a_variant_and_a_column_a_measure() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv(full_run()))))
    assert [row["variant"] for row in rows] == ["bf16", "gptq:4", "rtn:4", "awq:4"]
    assert float(rows[1]["kl_divergence"]) == 0.05
    assert float(rows[1]["perplexity_low"]) == 28.0
    assert float(rows[1]["perplexity_high"]) == 32.0
    assert json.loads(rows[2]["fallbacks"]) == ["no kernel"]
    assert rows[3]["status"] == "failed"
    assert rows[3]["perplexity"] == ""


def test_csv_holds_no_formula() -> None:
    """A spreadsheet runs cells that begin with = + - @."""
    rows = list(csv.DictReader(io.StringIO(report.to_csv(full_run()))))
    assert rows[3]["error"] == "'=broken"


class Elements(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("language", ["en", "ja"])
def test_html_needs_nothing_else(language: str) -> None:
    html = report.to_html(full_run(), language)
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset"} & attributes.keys(), (tag, attributes)
    assert f'<html lang="{language}"' in html
    assert "url(" not in html.split("</style>")[0]
    assert html.count("plotly.js v") == 1


def test_html_shows_what_the_page_shows() -> None:
    one = full_run()
    html = report.to_html(one)
    text = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    for part in (
        "keeps the most",
        "GPTQ 4-bit",
        "=broken",
        "mend it",
        "ql-badge-simulated",
        "Why?",
        '<mark class="ql-first"',
        one.id,
        "a processor",
    ):
        assert part in text
    data = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.S).group(1))  # type: ignore[union-attr]
    assert set(data) == {"perplexity_size", "kl_bits", "speed", "size"}
    assert set(data["size"]) == {"light", "dark"}


def test_nothing_in_the_html_can_run() -> None:
    hostile = generation("", " the", HOSTILE, first=1)
    one = run(
        record("bf16", outputs=(generation(HOSTILE),), kernel=HOSTILE),
        record("gptq:4", outputs=(hostile,), config={HOSTILE: HOSTILE}),
        failed("awq:4", HOSTILE, HOSTILE),
        environment={HOSTILE: HOSTILE},
        error=HOSTILE,
    )
    spec = RunSpec(model=HOSTILE, variants=one.spec.variants, prompts=(HOSTILE,), text=HOSTILE)
    html = report.to_html(run(*one.records, spec=spec, environment=one.environment, error=HOSTILE))
    own = report.to_html(full_run())
    elements = [tag for tag, _ in Elements(html).found]
    assert elements.count("script") == [tag for tag, _ in Elements(own).found].count("script")
    assert "img" not in elements
    assert all("onerror" not in attributes for _, attributes in Elements(html).found)


def test_a_run_without_results_is_still_a_page() -> None:
    html = report.to_html(run(failed("gptq:4"), status="failed", error="the model is gone"))
    assert "the model is gone" in html
    assert "Plotly.newPlot" not in html


def parsed(line: str, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """The spec that the command line makes of a command."""
    import typer

    specs: list[RunSpec] = []

    def keep(spec: RunSpec, **_: object) -> list[ResultRecord]:
        specs.append(spec)
        raise typer.Exit(0)

    monkeypatch.setattr(sys.modules[command.__module__], "run", keep)
    app = typer.Typer()
    app.command("compare")(command)
    app.command("other")(lambda: None)
    words_of_line = shlex.split(line)
    assert words_of_line[:3] == ["python", "-m", "quantlab"]
    app(spread(words_of_line[3:]), standalone_mode=False)
    return specs[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompts": ('It\'s "quoted" & $HOME `x`', "--seed 3", "two words")},
        {"group_size": 128, "seed": 7, "threads": 2, "device": "cpu", "max_new_tokens": 5},
        {"model": "/a folder/with 'quotes'", "text": "my text.txt", "calibration": "self"},
        {"eval_tokens": 512, "window": 64, "calibration_tokens": 99, "calibration_length": 33},
        {"allow_pickle": True, "trust_remote_code": True},
    ],
)
def test_the_command_reproduces_the_spec(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = parse_variants("bf16,gptq:4:act_order=false:damp_percent=0.05,gguf:q4_k_m")
    spec = RunSpec(variants=variants, **changes)
    assert parsed(report.reproduce_command(spec), monkeypatch) == spec


def test_the_default_command_is_short() -> None:
    spec = RunSpec(variants=parse_variants(options.DEFAULT_METHODS))
    assert report.reproduce_command(spec) == (
        f"python -m quantlab compare --model bundled --methods {options.DEFAULT_METHODS}"
    )


def test_environments_are_flattened_for_people() -> None:
    rows = report.environment_rows(
        {"versions": {"torch": "2"}, "memory_bytes": 25_000_000_000, "gpu": None, "network": True},
        words("en"),
    )
    assert rows == [
        ("versions · torch", "2"),
        ("memory", "25.0 GB"),
        ("gpu", "–"),
        ("network", "yes"),
    ]

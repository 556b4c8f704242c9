"""The command line: what it passes on, prints, writes and refuses. Models run in
`test_cli_end_to_end.py`; here the pipeline is a stand-in that remembers its arguments."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quantlab
from quantlab.cli import main, spread
from quantlab.cli.options import DEFAULT_METHODS
from quantlab.cli.terminal import TerminalProgress
from quantlab.errors import ConfigError, ModelError
from quantlab.results import ResultRecord
from quantlab.types import (
    Event,
    Generation,
    Notice,
    OutputDelta,
    Progress,
    RunSpec,
    VariantFinished,
    VariantSpec,
    VariantStarted,
)

ROOT = Path(__file__).resolve().parents[1]


def record(variant: str, **values: Any) -> ResultRecord:
    method, _, bits = variant.partition(":")
    measured = {"status": "finished", "execution": "packed", "perplexity": 29.19, **values}
    return ResultRecord(variant, method, int(bits or 16), {}, **measured)


class FakePipeline(ModuleType):
    """Stands where `quantlab.pipeline` does; `calls` holds (function, arguments)."""

    def __init__(self) -> None:
        super().__init__("quantlab.pipeline")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.records = [record("bf16"), record("rtn:4", perplexity=36.83)]
        self.events: list[Event] = []
        self.error: BaseException | None = None

    def _answer(self, name: str, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        emit: Callable[[Event], None] = arguments["emit"]
        for event in self.events:
            emit(event)
        if self.error is not None:
            raise self.error

    def validate(self, spec: RunSpec) -> None:
        if spec.model == "missing":
            raise ModelError("model: no such file or folder: missing", "use bundled")

    def environment(self, spec: RunSpec) -> dict[str, Any]:
        return {"cpu": "a test", "load": math.nan}

    def compare(self, spec: RunSpec, **arguments: Any) -> list[ResultRecord]:
        self._answer("compare", spec=spec, **arguments)
        return self.records

    def quantize(
        self,
        spec: RunSpec,
        variant: VariantSpec,
        out: Path,
        format: str,
        emit: Callable[[Event], None],
    ) -> Path:
        self._answer("quantize", spec=spec, variant=variant, format=format, emit=emit)
        out.mkdir()
        (out / "weights").write_bytes(bytes(1_500_000))
        return out

    def evaluate(
        self, spec: RunSpec, emit: Callable[[Event], None]
    ) -> tuple[dict[str, Any], ResultRecord]:
        self._answer("evaluate", spec=spec, emit=emit)
        return {"cpu": "a test"}, self.records[0]

    def generate(self, spec: RunSpec, **arguments: Any) -> list[Generation]:
        self._answer("generate", spec=spec, **arguments)
        return [Generation(p, f" answer to {p}", (1,), ("x",)) for p in spec.prompts]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "quantlab.pipeline", fake)
    monkeypatch.setattr(quantlab, "pipeline", fake, raising=False)
    monkeypatch.setenv("QUANTLAB_HOME", str(tmp_path / "home"))
    return fake


def spec_of(pipeline: FakePipeline) -> RunSpec:
    (name, arguments), *more = pipeline.calls
    assert (name, more) == ("compare", [])
    spec: RunSpec = arguments["spec"]
    return spec


# --- compare ---------------------------------------------------------------------------------


def test_compare_without_options_is_the_default_comparison(pipeline: FakePipeline) -> None:
    assert main(["compare"]) == 0
    spec = spec_of(pipeline)
    assert [variant.label for variant in spec.variants] == DEFAULT_METHODS.split(",")
    assert spec == RunSpec(variants=spec.variants)


def test_reproduce_command_gives_the_same_spec_back(pipeline: FakePipeline) -> None:
    """What a report says to type is what ran: every field of a RunSpec has its option."""
    from quantlab.report import reproduce_command

    spec = RunSpec(
        model="some folder/model",
        variants=(VariantSpec("rtn", 3, (("symmetric", "true"),)), VariantSpec("bf16")),
        group_size=128,
        calibration="a text.txt",
        calibration_tokens=1000,
        calibration_length=100,
        text="wikitext2",
        eval_tokens=2000,
        window=200,
        prompts=('It\'s a "quoted" prompt', "second"),
        max_new_tokens=7,
        device="cpu",
        threads=3,
        seed=5,
        allow_pickle=True,
        trust_remote_code=True,
        stop_strings=("\n\n", "-- the end", " 'so'"),
    )
    program, dash_m, package, *arguments = shlex.split(reproduce_command(spec))
    assert (program, dash_m, package) == ("python", "-m", "quantlab")
    assert main(arguments) == 0
    assert spec_of(pipeline) == spec


def test_compare_prints_the_table_and_the_reasons(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = record("gptq:4", status="failed", error="out of\nmemory", hint="fewer tokens")
    pipeline.records.append(failed)
    assert main(["compare", "--methods", "bf16,rtn:4,gptq:4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("rtn:4 ")]
    assert "36.83" in row
    assert "packed" in row
    assert "gptq:4 failed: out of memory (fewer tokens)" in lines


def test_compare_where_nothing_finished_exits_with_1(pipeline: FakePipeline) -> None:
    pipeline.records = [record("rtn:4", status="failed", error="no", perplexity=None)]
    assert main(["compare", "--methods", "rtn:4"]) == 1


def test_json_is_the_document_and_valid_everywhere(pipeline: FakePipeline, tmp_path: Path) -> None:
    pipeline.records[1] = record("rtn:4", perplexity=math.inf, kl_divergence_ci=(0.5, math.nan))
    out = tmp_path / "out.json"
    out.write_text("older")
    assert main(["compare", "--methods", "bf16,rtn:4", "--json", str(out)]) == 0

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    data = json.loads(out.read_text(), parse_constant=refuse)
    assert data["schema"] == 1
    assert data["environment"] == {"cpu": "a test", "load": None}
    assert [row["method"] for row in data["results"]] == ["bf16", "rtn"]
    assert data["results"][0]["perplexity"] == 29.19
    assert data["results"][1]["perplexity"] is None
    assert data["results"][1]["kl_divergence_ci"] == [0.5, None]
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["out.json"]


def test_html_is_one_self_contained_page(pipeline: FakePipeline, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main(["compare", "--methods", "bf16,rtn:4", "--html", str(out)]) == 0
    page = out.read_text()
    assert "36.83" in page
    assert "<script src" not in page


def test_a_device_is_written_through_and_never_replaced(pipeline: FakePipeline) -> None:
    assert main(["compare", "--methods", "bf16", "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_leaves_the_older_file_and_the_table(
    pipeline: FakePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    out.write_text("older")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["compare", "--methods", "bf16,rtn:4", "--json", str(out)]) == 2
    told = capsys.readouterr()
    assert "36.83" in told.out
    assert told.err.splitlines()[-1].startswith(f"error: {out} could not be written: No space left")
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["out.json"]


def test_no_cache_uses_a_store_that_is_thrown_away(pipeline: FakePipeline, tmp_path: Path) -> None:
    assert main(["compare", "--methods", "bf16", "--no-cache"]) == 0
    root: Path = pipeline.calls[0][1]["store"].root
    assert not root.is_relative_to(tmp_path)
    assert not root.exists()
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("flag", ["", "--no-cache"])
def test_ctrl_c_says_what_was_kept(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    pipeline.events = [
        VariantFinished("bf16", {"status": "finished"}),
        VariantFinished("rtn:4", {"status": "failed", "error": "no"}),
    ]
    pipeline.error = KeyboardInterrupt()
    out = tmp_path / "out.json"
    arguments = ["compare", "--methods", "bf16,rtn:4,rtn:3", "--json", str(out), flag]
    assert main([argument for argument in arguments if argument]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 variants finished" in last
    assert ("nothing was kept" if flag else f"kept in {tmp_path / 'home'}") in last
    assert not out.exists()


# --- the other commands ----------------------------------------------------------------------


def test_quantize_passes_method_bits_and_settings(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quantized"
    arguments = ["quantize", "--method", "rtn", "--bits", "3", "--out", str(out)]
    assert main([*arguments, "--set", "symmetric=true", "clip=true", "--group-size", "32"]) == 0
    _, given = pipeline.calls[0]
    assert given["variant"] == VariantSpec("rtn", 3, (("clip", "true"), ("symmetric", "true")))
    assert (given["spec"], given["format"]) == (RunSpec(group_size=32), "quantlab")
    assert capsys.readouterr().out == f"wrote {out} (1.5 MB)\n"


def test_quantize_picks_the_format_that_the_method_is_for(
    pipeline: FakePipeline, tmp_path: Path
) -> None:
    arguments = ["--set", "type=q4_0", "--out", str(tmp_path / "x.gguf")]
    assert main(["quantize", "--method", "gguf", *arguments]) == 0
    _, given = pipeline.calls[0]
    assert given["format"] == "gguf"
    assert given["variant"].label == "gguf:q4_0"


def test_evaluate_writes_the_same_document(pipeline: FakePipeline, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["evaluate", "--model", "m", "--eval-tokens", "4096", "--json", str(out)]) == 0
    assert pipeline.calls[0][1]["spec"] == RunSpec(model="m", eval_tokens=4096)
    (row,) = json.loads(out.read_text())["results"]
    assert row["perplexity"] == 29.19


def test_evaluate_of_a_failure_exits_with_1(pipeline: FakePipeline) -> None:
    pipeline.records = [record("bf16", status="failed", error="no", perplexity=None)]
    assert main(["evaluate"]) == 1


def test_generate_streams_in_the_order_of_the_prompts(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.events = [
        OutputDelta("m", 0, " answer"),
        OutputDelta("m", 0, " to A"),
        OutputDelta("m", 1, " answer to"),
    ]
    options = ["--temperature", "0.5", "--stop", "\n", "END"]
    assert main(["generate", "--prompt", "A", "B", *options]) == 0
    assert capsys.readouterr().out == "> A\n answer to A\n\n> B\n answer to B\n"
    _, given = pipeline.calls[0]
    assert given["spec"] == RunSpec(prompts=("A", "B"), stop_strings=("\n", "END"))
    assert (given["temperature"], given["top_p"]) == (0.5, 1.0)


def test_generate_shows_what_came_before_ctrl_c(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.events = [OutputDelta("m", 0, " answer")]
    pipeline.error = KeyboardInterrupt()
    assert main(["generate", "--prompt", "A"]) == 130
    told = capsys.readouterr()
    assert told.out == " answer\n"
    assert len(told.err.splitlines()) == 1


def test_generate_prints_an_answer_that_was_not_streamed(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", "A"]) == 0
    assert capsys.readouterr().out == " answer to A\n"


def test_lists_name_everything_that_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    from quantlab.methods import METHODS
    from quantlab.models import CATALOGUE

    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in data["methods"]] == list(METHODS)
    for method in data["methods"]:
        assert method["title"] in text
        for option in method["options"]:
            assert f"{option['name']}=" in text
            assert option["help"]
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [model["id"] for model in data["models"]] == [entry.id for entry in CATALOGUE]
    assert all(entry.id in text for entry in CATALOGUE)


# --- wrong input -----------------------------------------------------------------------------

WRONG = [
    ("", "command"),
    ("conquer", "compare"),
    ("compare --colour red", "--colour"),
    ("compare --seed ten", "--seed"),
    ("compare --seed", "--seed"),
    ("compare --seed -1", "--seed"),
    ("compare --group-size 0", "--group-size"),
    ("compare --group-size 2.5", "--group-size"),
    ("compare --eval-tokens 0", "--eval-tokens"),
    ("compare --window 1", "--window"),
    ("compare --threads -2", "--threads"),
    ("compare --device tpu", "--device"),
    ("compare --methods rtn:4 extra", "extra"),
    ("compare --methods sorcery", "--methods"),
    ("compare --methods gptq:5", "--methods"),
    ("compare --methods rtn:4,rtn:4", "--methods"),
    ("compare --methods rtn:4:colour=red", "--methods"),
    ("compare --methods rtn:4:symmetric=maybe", "symmetric"),
    ("compare --methods ,", "--methods"),
    ("compare --model missing", "model"),
    ("compare --prompt ' '", "--prompt"),
    ("compare --json nowhere/out.json", "--json"),
    ("compare --json .", "--json"),
    ("compare --html nowhere/out.html", "--html"),
    ("quantize --out x", "--method"),
    ("quantize --method rtn", "--out"),
    ("quantize --method sorcery --out x", "--method"),
    ("quantize --method gptq --bits 5 --out x", "--bits"),
    ("quantize --method gptq --group-size 3 --out x", "--group-size"),
    ("quantize --method gptq --set group --out x", "--set"),
    ("quantize --method gptq --set colour=red --out x", "--set"),
    ("quantize --method gptq --set clip=true clip=false --out x", "--set"),
    ("quantize --method rtn --out file", "--out"),
    ("quantize --method rtn --out file/below", "--out"),
    ("evaluate --json nowhere/out.json", "--json"),
    ("generate", "--prompt"),
    ("generate --prompt ''", "--prompt"),
    ("generate --prompt x --top-p 2", "--top-p"),
    ("generate --prompt x --stop ''", "--stop: empty; give the text that ends an answer"),
    ("compare --stop END ''", "--stop: empty"),
    ("generate --prompt x --temperature -1", "--temperature"),
]


@pytest.mark.parametrize(("line", "named"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(
    pipeline: FakePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    named: str,
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file").write_text("older")
    monkeypatch.chdir(folder)
    assert main(shlex.split(line)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (message,) = told.err.splitlines()
    assert message.startswith("error: ")
    assert named in message
    assert pipeline.calls == []
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "older"


def test_a_refusal_of_the_pipeline_keeps_its_hint_on_the_line(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.error = ConfigError("window=9: needs\nmore", "try 10")
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err == "error: window=9: needs more (try 10)\n"


def test_several_values_may_follow_one_option() -> None:
    given = shlex.split("compare --prompt a b --seed 1 --set x=1 y=2 --prompt -c d")
    wanted = "compare --prompt a --prompt b --seed 1 --set x=1 --set y=2 --prompt -c --prompt d"
    assert spread(given) == shlex.split(wanted)


# --- progress and speed ----------------------------------------------------------------------

EVENTS: list[Event] = [
    Notice("a note"),
    VariantStarted("rtn:4"),
    Progress("rtn:4", "quantize", 1, 30, 0.1),
    Progress("rtn:4", "quantize", 2, 30, 0.2),
    Progress("rtn:4", "perplexity", 1, 8, 0.9),
    VariantFinished("rtn:4", {"status": "finished", "cached": True}),
    VariantFinished("gptq:4", {"status": "failed", "error": "no", "hint": "try"}),
]


def test_progress_without_a_terminal_is_one_line_a_stage() -> None:
    stream = io.StringIO()
    with TerminalProgress(stream) as progress:
        for event in EVENTS:
            progress(event)
    assert stream.getvalue().splitlines() == [
        "a note",
        "[ 10%] rtn:4 · quantize",
        "[ 90%] rtn:4 · perplexity",
        "rtn:4 finished (from the cache)",
        "gptq:4 failed: no (try)",
    ]
    assert progress.finished == ["rtn:4"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with TerminalProgress(stream) as progress:
        for event in EVENTS[:5]:
            progress(event)
        progress._bar.refresh()
    assert "rtn:4 · perplexity 1/8" in stream.getvalue()
    assert "90%" in stream.getvalue()


def test_help_needs_no_torch() -> None:
    code = """
import sys
from quantlab.cli import main
for arguments in (["--help"], ["compare", "--help"], ["compare", "--seed", "x"]):
    main(arguments)
    heavy = {"torch", "transformers", "numpy", "gradio", "plotly"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--methods" in done.stdout

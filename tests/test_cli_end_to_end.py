"""The command line as a person runs it: processes of their own, a tiny random model, real files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import saved

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--text", "text.txt", "--eval-tokens", "128", "--window", "32", "--threads", "1"]
CALIBRATED = [
    "--calibration",
    "text.txt",
    "--calibration-tokens",
    "64",
    "--calibration-length",
    "16",
]


class Terminal:
    """A folder to run commands in, as a user's would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "QUANTLAB_HOME": str(folder.parent / f"{folder.name}-home"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "quantlab", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        with self.start(arguments) as process:
            out, err = process.communicate(timeout=300)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two blocks with a small tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    saved(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return folder


@pytest.fixture
def terminal(tiny: Path, tmp_path: Path) -> Terminal:
    folder = tmp_path / "here"
    shutil.copytree(tiny, folder)
    return Terminal(folder)


def content(folder: Path) -> dict[str, int]:
    """Every file under `folder` with its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the whole walk --------------------------------------------------------------------------


def test_compare_measures_writes_and_remembers(terminal: Terminal) -> None:
    command = ["compare", "--model", "model", "--methods", "bf16,rtn:4,gptq:4", *SMALL, *CALIBRATED]
    command += ["--group-size", "32", "--prompt", "Hello", "--max-new-tokens", "4"]
    code, out, err = terminal.run(*command, "--json", "first.json", "--html", "report.html")
    assert code == 0, err
    data = json.loads((terminal.folder / "first.json").read_text())
    assert [row["status"] for row in data["results"]] == ["finished"] * 3
    assert [row["method"] for row in data["results"]] == ["bf16", "rtn", "gptq"]
    assert [row["bits"] for row in data["results"]] == [16, 4, 4]
    assert all(row["perplexity"] > 1 for row in data["results"])
    assert all(row["outputs"][0]["prompt"] == "Hello" for row in data["results"])
    assert data["environment"]["threads"] == 1
    assert out.splitlines()[0].startswith("variant")
    assert "<html" in (terminal.folder / "report.html").read_text()

    code, _, err = terminal.run(*command, "--json", "second.json")
    assert code == 0, err
    again = json.loads((terminal.folder / "second.json").read_text())
    assert all(row["cached"] for row in again["results"])
    for before, after in zip(data["results"], again["results"], strict=True):
        assert after["perplexity"] == before["perplexity"]


def test_quantize_evaluate_generate(terminal: Terminal) -> None:
    command = ["--model", "model", "--method", "rtn", "--bits", "8", "--group-size", "32"]
    code, out, err = terminal.run("quantize", *command, "--out", "quantized")
    assert code == 0, err
    assert out.startswith("wrote quantized (")
    code, _, err = terminal.run("evaluate", "--model", "quantized", *SMALL, "--json", "out.json")
    assert code == 0, err
    (row,) = json.loads((terminal.folder / "out.json").read_text())["results"]
    assert row["status"] == "finished"
    assert row["perplexity"] > 1
    arguments = ["--model", "quantized", "--prompt", "The quick", "--max-new-tokens", "8"]
    code, first, err = terminal.run("generate", *arguments)
    assert code == 0, err
    assert first.strip()
    assert terminal.run("generate", *arguments)[1] == first


def test_quantize_to_gguf_and_evaluate_the_file(terminal: Terminal) -> None:
    command = ["quantize", "--model", "model", "--method", "gguf", "--set", "type=q8_0"]
    code, _, err = terminal.run(*command, "--out", "tiny.gguf")
    assert code == 0, err
    code, _, err = terminal.run("evaluate", "--model", "tiny.gguf", *SMALL, "--json", "out.json")
    assert code == 0, err
    (row,) = json.loads((terminal.folder / "out.json").read_text())["results"]
    assert (row["method"], row["bits"], row["status"]) == ("gguf", 8, "finished")


def test_ctrl_c_keeps_what_finished(terminal: Terminal) -> None:
    labels = ["rtn:8", "rtn:4", "efficientqat:2"]  # The last takes long enough to be interrupted.
    command = ["compare", "--model", "model", "--methods", ",".join(labels), *SMALL, *CALIBRATED]
    with terminal.start([*command, "--json", "out.json"]) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("rtn:8 finished"):
                process.send_signal(signal.SIGINT)
                break
        err = process.stderr.read()
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("error: cancelled: ")
    assert "the same command goes on from there" in last
    assert not (terminal.folder / "out.json").exists()
    code, _, err = terminal.run(*command, "--json", "out.json")
    assert code == 0, err
    rows = json.loads((terminal.folder / "out.json").read_text())["results"]
    assert [row["variant"] for row in rows] == labels
    assert rows[0]["cached"]
    assert not rows[-1]["cached"]


# --- wrong input -----------------------------------------------------------------------------


def refused(terminal: Terminal, *arguments: str) -> str:
    """The one line on stderr of a command that must be refused and write nothing."""
    before = content(terminal.folder)
    code, out, err = terminal.run(*arguments)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert content(terminal.folder) == before
    return line


def compare(terminal: Terminal, *arguments: str) -> str:
    command = ["compare", "--methods", "bf16,rtn:4", *SMALL, "--json", "out.json"]
    return refused(terminal, *command, *arguments)


def test_no_such_folder(terminal: Terminal) -> None:
    assert "model: no such file or folder: ./nowhere" in compare(terminal, "--model", "./nowhere")


def test_no_such_model_on_the_hub(terminal: Terminal) -> None:
    assert "nobody/nothing" in compare(terminal, "--model", "nobody/nothing")


def test_no_such_text(terminal: Terminal) -> None:
    line = compare(terminal, "--model", "model", "--text", "nowhere.txt")
    assert "no such file: nowhere.txt" in line


def test_a_text_shorter_than_one_window(terminal: Terminal) -> None:
    (terminal.folder / "short.txt").write_text("Too short.")
    line = compare(terminal, "--model", "model", "--text", "short.txt")
    assert "short.txt" in line
    assert "window" in line


def test_fewer_tokens_than_one_window(terminal: Terminal) -> None:
    line = compare(terminal, "--model", "model", "--eval-tokens", "16")
    assert "eval_tokens: 16 is less than one window (32)" in line


def test_a_calibration_text_that_is_too_short(terminal: Terminal) -> None:
    (terminal.folder / "short.txt").write_text("Too short.")
    arguments = ["--methods", "gptq:4", "--calibration", "short.txt"]
    assert "short.txt" in compare(terminal, "--model", "model", *arguments)


def test_bits_that_a_method_does_not_have(terminal: Terminal) -> None:
    line = compare(terminal, "--model", "model", "--methods", "gptq:5")
    assert "--methods: gptq:5: gptq has no 5 bits" in line


def test_group_size_0(terminal: Terminal) -> None:
    assert "--group-size: " in compare(terminal, "--model", "model", "--group-size", "0")
    line = compare(terminal, "--model", "model", "--methods", "rtn:4:group_size=0")
    assert "group_size=0: needs at least" in line


@pytest.mark.parametrize("damage", ["corrupt", "truncated"])
def test_damaged_safetensors(terminal: Terminal, damage: str) -> None:
    file = terminal.folder / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000] if damage == "truncated" else b"\xff" * 64 + whole[64:])
    assert "model.safetensors is corrupt or truncated" in compare(terminal, "--model", "model")


@pytest.mark.parametrize("damage", ["corrupt", "truncated"])
def test_damaged_gguf(terminal: Terminal, damage: str) -> None:
    from gguf import GGUFWriter

    file = terminal.folder / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000] if damage == "truncated" else b"not a gguf" + whole[10:])
    for command in ("evaluate", "compare"):
        line = refused(terminal, command, "--model", "model.gguf", *SMALL)
        assert "model.gguf" in line
        assert "truncated" in line or "GGUF file" in line


class Trap:
    """Makes a file as soon as somebody unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


def test_a_pickle_is_refused_and_never_opened(terminal: Terminal) -> None:
    model = terminal.folder / "model"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "--allow-pickle" in compare(terminal, "--model", "model")
    assert "--allow-pickle" in refused(terminal, "generate", "--model", "model", "--prompt", "x")
    assert not (terminal.folder / "sprung").exists()


def test_remote_code_is_refused(terminal: Terminal) -> None:
    config = terminal.folder / "model" / "config.json"
    told = json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    config.write_text(json.dumps(told))
    assert "--trust-remote-code" in compare(terminal, "--model", "model")


def test_an_out_that_cannot_be_written(terminal: Terminal) -> None:
    (terminal.folder / "file").write_text("older")
    rtn = ["quantize", "--model", "model", "--method", "rtn", "--bits", "4"]
    for out in ("file", "file/below", "/proc/nowhere"):
        assert "--out" in refused(terminal, *rtn, "--out", out)
    for option in ("--json", "--html"):
        assert option in compare(terminal, "--model", "model", option, "/proc/nowhere/out")
    assert (terminal.folder / "file").read_text() == "older"


def test_a_folder_with_other_files_is_not_replaced(terminal: Terminal) -> None:
    rtn = ["quantize", "--model", "model", "--method", "rtn", "--bits", "4"]
    assert "model" in refused(terminal, *rtn, "--out", "model")

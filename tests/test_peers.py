"""`scripts/peers.py` and the bookkeeping of the benchmark; no peer is installed for the tests."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.contest import CONTESTS, Side
from benchmarks.phases import SOLVING, STATISTICS, watching
from benchmarks.quantize import clock
from quantlab import blockwise, calibration, variants
from quantlab.export import gguf, quantlab_format
from quantlab.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "scripts" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_peer_that_is_there_is_left_alone(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "FOLDER", tmp_path / ".venv-peers")
    monkeypatch.setattr(peers, "PEERS", {"awq": ("peer.txt", "json")})

    def refuse(command: list[str]) -> None:
        raise AssertionError(f"installs again: {command}")

    monkeypatch.setattr(peers, "run", refuse)
    (tmp_path / "peer.txt").write_text("torch\n")
    python = tmp_path / ".venv-peers" / "awq" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    stamp = python.parents[1] / ".quantlab-peer"
    stamp.write_text(hashlib.sha256(b"torch\n").hexdigest())
    peers.ensure("awq")
    assert "awq is ready" in capsys.readouterr().out
    stamp.write_text("another")
    with pytest.raises(AssertionError, match="installs again"):
        peers.ensure("awq")


def test_every_peer_runs_the_torch_of_the_product(peers: ModuleType) -> None:
    wanted = next(
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    for requirements, _ in peers.PEERS.values():
        assert wanted in (ROOT / requirements).read_text().splitlines()


def test_every_contest_has_its_worker_and_its_environment(peers: ModuleType) -> None:
    for contest in CONTESTS.values():
        worker = ROOT / "benchmarks" / "peers" / contest.worker
        assert "import quantlab" not in worker.read_text()
        assert "from quantlab" not in worker.read_text()
        assert contest.python in {"", *peers.PEERS}


def test_phases_are_exclusive_and_leave_nothing_behind() -> None:
    method = METHODS["gguf"]
    places = (
        (variants, "_load"),
        (calibration.BlockRunner, "collect"),
        (calibration.Accumulator, "add"),
        (blockwise, "advance_in_lockstep"),
        (type(method), "quantize_block"),
        (quantlab_format, "save"),
        (gguf, "write"),
    )
    before = [vars(owner)[name] for owner, name in places]
    with watching(METHODS["rtn"]) as phases:
        inner = phases.timed(STATISTICS, lambda: sum(range(200_000)))
        phases.timed(SOLVING, lambda: inner())()
    assert 0 <= phases.seconds[SOLVING] < phases.seconds[STATISTICS]
    assert [vars(owner)[name] for owner, name in places] == before
    assert "quantize_outer" not in vars(type(METHODS["rtn"]))


def test_a_part_of_the_blocks_is_never_shown_as_the_whole() -> None:
    side = Side("AutoAWQ", 50.0, scaled=1500.0, blocks=(1, 30))
    assert clock(side.__dict__) == "50.00 s, first 1 of 30 blocks (scaled 1500 s)"


def test_wrong_names_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.quantize", "--only", "gptq,autogptq"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "autogptq" in done.stderr

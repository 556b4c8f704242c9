"""`scripts/peers.py` and the bookkeeping of the benchmark; no peer is installed for the tests."""

from __future__ import annotations

import hashlib
import importlib.metadata
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


def test_a_changed_request_that_is_met_renews_the_stamp(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is installed where every version is there already, everything where one is not."""
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "FOLDER", tmp_path / ".venv-peers")
    monkeypatch.setattr(peers, "PEERS", {"awq": ("peer.txt", "json")})
    monkeypatch.setattr(peers, "run", lambda command: pytest.fail(f"installs: {command}"))
    python = tmp_path / ".venv-peers" / "awq" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = python.parents[1] / ".quantlab-peer"
    stamp.write_text("of an earlier request")
    torch = importlib.metadata.version("torch").partition("+")[0]
    there = f"# Peers\ntorch=={torch}\n# no-deps: numpy=={importlib.metadata.version('numpy')}\n"
    (tmp_path / "peer.txt").write_text(there)
    peers.ensure("awq")
    assert stamp.read_text() == hashlib.sha256(there.encode()).hexdigest()
    missing = f"{there}no-such-package==1.0\n"
    for unmet in ("torch==1.0.0\n", missing, "# no-deps: numpy==0.1\n", "torch\n", "-r all.txt\n"):
        (tmp_path / "peer.txt").write_text(unmet)
        assert not peers.satisfied(python, unmet)
        with pytest.raises(pytest.fail.Exception, match="installs"):
            peers.ensure("awq")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)


def test_every_peer_runs_the_torch_of_the_product(peers: ModuleType) -> None:
    wanted = next(
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    for requirements, _ in peers.PEERS.values():
        assert wanted in (ROOT / requirements).read_text().splitlines()


def test_every_peer_has_its_worker_and_its_environment(peers: ModuleType) -> None:
    for method in METHODS.values():
        if method.peer is not None:
            assert method.peer.worker.is_file()
            assert method.peer.environment in peers.PEERS or method.peer.gpu_only
            assert METHODS[method.peer.twin].packs
    for contest in CONTESTS.values():
        assert contest.peer is None or contest.peer.twin == contest.variant.method


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

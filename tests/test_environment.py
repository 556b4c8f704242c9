"""`scripts/environment.py`: says what is missing, and does nothing when all is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path("scripts") / "environment.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script and the requirements, and no environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    for name in ("requirements.txt", "requirements-onnx.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(checkout: Path, layer: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), layer],
        cwd=checkout,
        env=os.environ | {"CC": "", "CXX": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def stamped(checkout: Path) -> Path:
    """An environment that claims to be complete: this Python, and the stamps of all layers."""
    spec = importlib.util.spec_from_file_location("environment", checkout / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    for layer in ("product", "development"):
        (venv / f".quantlab-{layer}").write_text(environment.fingerprint(layer))
    return venv


def test_everything_that_is_missing_is_named_at_once(checkout: Path) -> None:
    done = run(checkout, "product", PATH=str(checkout / "nothing"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for name in ("a C compiler", "a C++ compiler", "CMake", "apt-get install"):
        assert name in line
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("layer", ["product", "development"])
def test_a_complete_environment_is_left_alone(checkout: Path, layer: str) -> None:
    """Not even a compiler is looked for: the second time is quick and works offline."""
    stamped(checkout)
    done = run(checkout, layer, PATH=str(checkout / "nothing"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_changed_requirements_are_noticed(checkout: Path) -> None:
    stamped(checkout)
    with (checkout / "requirements-dev.txt").open("a") as file:
        file.write("# changed\n")
    nothing = str(checkout / "nothing")
    assert run(checkout, "product", PATH=nothing).returncode == 0
    assert "missing" in run(checkout, "development", PATH=nothing).stderr


def test_without_a_chromium_the_way_to_one_is_named(checkout: Path) -> None:
    stamped(checkout)
    done = run(checkout, "browser", PATH=str(checkout / "nothing"))
    assert done.returncode == 1
    assert "install Chromium" in done.stderr

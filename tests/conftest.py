"""What every test may ask for: one thread, a home folder of its own, exact calibration."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kernels import build, dispatch

settings.register_profile("quantlab", deadline=None)  # A deadline tests the machine, not the code.
settings.load_profile("quantlab")

KERNELS = Path(__file__).resolve().parents[1] / "build" / "kernels"
os.environ.setdefault("QUANTLAB_KERNEL_CACHE", str(KERNELS))
"""Compiled kernels are kept from run to run, as users keep theirs, but in the checkout."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty QUANTLAB_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("QUANTLAB_HOME", str(folder))
    return folder


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that remain where nothing could be compiled."""
    kept = tuple(k for k in dispatch.KERNELS if not k.name.startswith("QuantLab native"))
    monkeypatch.setattr(dispatch, "KERNELS", kept)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration in float32 also where this CPU multiplies bfloat16: the same numbers anywhere."""
    monkeypatch.setattr("quantlab.texts.fast_bfloat16", lambda: False)


@pytest.fixture
def native_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in the pages that tests start: no native kernels, neither here nor remembered later."""
    monkeypatch.setenv("QUANTLAB_NATIVE", "off")
    dispatch.probe.cache_clear()
    yield
    dispatch.probe.cache_clear()


@pytest.fixture(scope="module", params=[level.name for level in build.LEVELS])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level in turn, chosen as a user would: by QUANTLAB_NATIVE."""
    name = str(request.param)
    levels = {level.name: level for level in build.supported()}
    if name not in levels:
        pytest.skip(f"this CPU has no {name}")
    folder = Path(os.environ["QUANTLAB_KERNEL_CACHE"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # One process compiles a level, the others find it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.build(levels[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_NATIVE", name)
        yield name

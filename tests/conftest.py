"""What every test may ask for: one thread, a home folder of its own, exact calibration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration in float32 also where this CPU multiplies bfloat16: the same numbers anywhere."""
    monkeypatch.setattr("quantlab.texts.fast_bfloat16", lambda: False)

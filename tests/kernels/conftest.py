"""The native kernels at every level that this machine runs; tests/conftest.py says where they lie."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import build


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

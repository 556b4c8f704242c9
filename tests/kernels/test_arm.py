"""The NEON level, compiled for Arm and run in an emulator: what it makes of random weights and
inputs is what this machine's portable level makes of them, which other tests hold to the reference.

Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu,
qemu-user-static). On an Arm machine all tests of kernels run the level itself.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernels import build
from tests.kernels.test_sanitizers import program

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
LEVELS = {level.name: level for level in build.LEVELS}
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", "-static")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"no {CROSS} and {EMULATOR}"
    ),
]


def results(*command: str | Path) -> list[np.ndarray]:
    """What the program writes: each result as its length (int64) and its numbers (float32)."""
    done = subprocess.run([*map(str, command), "write"], capture_output=True, check=True).stdout
    found, place = [], 0
    while place < len(done):
        count = int(np.frombuffer(done, np.int64, 1, place)[0])
        found.append(np.frombuffer(done, np.float32, count, place + 8))
        place += 8 + 4 * count
    return found


def test_neon_computes_what_the_portable_level_does(tmp_path: Path) -> None:
    here = program(build.compiler(), LEVELS["portable"], FLAGS, tmp_path / "here")
    arm = program(CROSS, LEVELS["neon"], FLAGS, tmp_path / "arm")
    expected, found = results(here), results(EMULATOR, arm)
    assert len(expected) == len(found) > 9000
    for one, other in zip(expected, found, strict=True):
        # Float32 sums of at most 2,200 products in another order, each 2^-24 of the largest sum
        # off; where they cancel, products of 8-bit codes, inputs and scales up to 1.
        bound = 2**-24 * (2200 * np.abs(one).max() + 256)
        np.testing.assert_allclose(other, one, rtol=0, atol=bound)

"""Compiles `cpu/*.cpp` for this machine, the first time it is wanted, and keeps the result.

One library a *level*, the instruction sets it may use; the best that the CPU has is taken. What
was built lies in the user's cache folder under a name made from the sources, the flags and the
compiler, so a change of any of them builds anew. Without a compiler, or where it fails, `library`
raises `BuildError` with the reason, and everything runs on the other kernels and the reference.

Environment: QUANTLAB_NATIVE=off (or a level) chooses, QUANTLAB_KERNEL_CACHE names the folder, CXX
the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

SOURCES = Path(__file__).parent / "cpu"
CPUINFO = Path("/proc/cpuinfo")
SECONDS = 300
"""A compiler that takes longer is stopped."""


class BuildError(RuntimeError):
    """Why there is no native library on this machine."""


@dataclass(frozen=True)
class Level:
    """A set of instructions. `number` is QL_LEVEL in the sources; `label` is shown to people."""

    name: str
    number: int
    label: str
    flags: tuple[str, ...]

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether it has products of bfloat16, on AMX tiles or on vectors."""
        return self.number >= 4


_AVX512 = (
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")),
    *("-mfma", "-mf16c"),
)
_BF16 = (*_AVX512, "-mavx512bf16")
LEVELS = (
    Level("amx", 5, "AMX", (*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
    Level("avx512bf16", 4, "AVX-512 BF16", _BF16),
    Level("avx512", 3, "AVX-512 VNNI", _AVX512),
    Level("avx2", 2, "AVX2", ("-mavx2", "-mfma", "-mf16c")),
    Level("neon", 1, "NEON", ("-march=armv8.2-a+dotprod",)),
    Level("portable", 0, "portable", ()),
)


@functools.cache
def supported() -> tuple[Level, ...]:
    """The levels that this CPU (and operating system) can run, best first."""
    machine = platform.machine().lower()
    usable = {"portable"}
    if machine in ("x86_64", "amd64"):
        usable |= _on_x86()
    elif machine in ("aarch64", "arm64") and _arm_has_dot_products():
        usable.add("neon")
    return tuple(level for level in LEVELS if level.name in usable)


def _on_x86() -> set[str]:
    """The names of levels that this x86 CPU has."""
    capability = torch.backends.cpu.get_cpu_capability()
    vnni = capability.startswith("AVX512") and torch.cpu._is_vnni_supported()
    bfloat16 = vnni and torch.cpu._is_avx512_bf16_supported()
    has = {
        "amx": bfloat16 and torch.cpu._is_amx_tile_supported() and sys.platform == "linux",
        "avx512bf16": bfloat16,
        "avx512": vnni,
        "avx2": capability.startswith(("AVX512", "AVX2")),
    }
    return {name for name, usable in has.items() if usable}


def _arm_has_dot_products() -> bool:
    """SDOT of Armv8.2: Apple's computers have it, a Raspberry Pi 4 has not."""
    if sys.platform == "darwin":
        return True
    try:
        return "asimddp" in CPUINFO.read_text().split()
    except OSError:
        return False


def chosen() -> Level:
    """The level to build: the best supported, or the one that QUANTLAB_NATIVE names.

    Raises: BuildError when it says off, or names what this machine cannot run."""
    wanted = os.environ.get("QUANTLAB_NATIVE", "")
    levels = {level.name: level for level in supported()}
    if wanted == "off":
        raise BuildError("native kernels are switched off (QUANTLAB_NATIVE=off)")
    if wanted and wanted not in levels:
        raise BuildError(f"QUANTLAB_NATIVE={wanted}: this machine runs {', '.join(levels)} or off")
    return levels[wanted] if wanted else next(iter(levels.values()))


def compiler() -> str:
    """The C++ compiler's path. Raises: BuildError where none is found."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if (path := shutil.which(name)) is not None:
            return path
    raise BuildError("no C++ compiler was found (c++, g++, clang++ or $CXX)")


def cache_folder() -> Path:
    named = os.environ.get("QUANTLAB_KERNEL_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("quantlab") / "kernels"


@functools.cache
def library(level: Level) -> ctypes.CDLL:
    """The loaded library of a level that this machine runs. Raises: BuildError."""
    try:
        found = ctypes.CDLL(str(build(level)))
    except OSError as error:
        raise BuildError(f"the compiled kernels do not load: {error}") from None
    if found.ql_init() != 0:
        raise BuildError(f"the operating system does not let this process use {level.label}")
    return found


def build(level: Level) -> Path:
    """Path of the library of `level`, compiled where it is not kept already. Raises: BuildError."""
    command = compiler()
    flags = (
        *("-std=c++17", "-O3", "-fPIC", "-pthread", "-Wno-psabi"),
        *(f"-DQL_LEVEL={level.number}", *level.flags),
    )
    key = hashlib.sha256("\0".join((version(command), *flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            key.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_folder() / f"quantlab-{level.name}-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = compile_all(command, flags, Path(folder))
            # Several processes may build at once: the last one's file replaces an equal one.
            made.replace(target)
    except OSError as error:
        raise BuildError(f"the kernels cannot be written: {error}") from None
    return target


def version(command: str) -> str:
    """The compiler's first line about itself, which may be empty. Raises: BuildError."""
    return _run([command, "--version"]).partition("\n")[0]


def compile_all(command: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Compile every source and link them in `folder`. Raises: BuildError with the first error."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        [command, *flags, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as workers:
        list(workers.map(_run, jobs))
    made = folder / "kernels.so"
    _run([command, "-shared", "-pthread", *map(str, objects), "-o", str(made)])
    return made


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name}: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0][:200]}")
    return done.stdout

"""Where no native library can be made, everything says why and runs on what is left."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels import build, dispatch, native, native_linear
from kernels.base import Problem
from kernels.build import LEVELS, BuildError

PORTABLE = LEVELS[-1]
INT3 = Problem(32, 64, 3, 32, False, None, "cpu", torch.float32)
"""Only the native kernels have 3 bits."""
INT8 = Problem(32, 64, 8, 64, True, "token", "cpu", torch.float32)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing remembered from other tests, and nothing left to them."""
    caches = (build.supported, build.library, native._native, dispatch.probe)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@dataclass(frozen=True)
class Compiler:
    """A shell script in the compiler's place; `calls` lists the outputs it was asked for."""

    path: Path

    @property
    def calls(self) -> list[str]:
        log = self.path.with_suffix(".log")
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, at the portable level."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUANTLAB_KERNEL_CACHE", str(folder))
    monkeypatch.setenv("QUANTLAB_NATIVE", "portable")
    return folder


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, compiles: str) -> Compiler:
    """$CXX: tells its version, and for anything else runs `compiles` with $out as its output."""
    script = folder / "compiler"
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo "compiler ${VERSION:-1}"; exit 0; }\n'
        'while [ "$1" != -o ]; do shift; done; out=$2\n'
        f'echo "$(basename "$out")" >> {script}.log\n{compiles}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return Compiler(script)


def assert_falls_back(reason: str) -> None:
    """The library and the kernels give `reason`; others or the reference take their place."""
    with pytest.raises(BuildError, match=re.escape(reason)):
        native.native()
    choice, kernel = dispatch.choose(INT3)
    assert kernel is None
    assert choice.execution == "simulated"
    assert reason in choice.why
    choice, kernel = dispatch.choose(INT8)
    assert kernel not in (native_linear.WEIGHT_ONLY, native_linear.W8A8)
    assert reason in choice.why
    if torch.cpu._is_vnni_supported():
        assert choice.execution == "packed"
        assert choice.why.startswith("8 bits, a grid a row")


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    assert_falls_back("no C++ compiler was found")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("compiles", "reason"),
    [
        ('echo "x.cpp:1: error: no such thing" >&2; exit 1', "failed: x.cpp:1: error: no such thi"),
        ("exit 1", "failed: no message"),
        ("kill -9 $$", "failed: no message"),
        ("exit 0", "the kernels cannot be written"),
        ('echo nonsense > "$out"', "the compiled kernels do not load"),
    ],
)
def test_a_broken_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str, reason: str
) -> None:
    install(tmp_path, monkeypatch, compiles)
    assert_falls_back(reason)
    kept = [path.suffix for path in cache.iterdir()]
    assert kept == ([".so"] if "load" in reason else [])


def test_a_compiler_that_cannot_even_say_its_version(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert_falls_back("compiler failed: no message")
    compiler.write_text("no program at all")
    with pytest.raises(BuildError, match="compiler"):
        build.version(str(compiler))
    compiler.write_text("#!/bin/sh\n")
    assert build.version(str(compiler)) == ""


def test_the_compiler_that_cxx_names_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = install(tmp_path, monkeypatch, "")
    assert build.compiler() == str(mine.path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    mine.path.rename(tmp_path / "g++")
    assert build.compiler() == str(tmp_path / "g++")


@pytest.mark.parametrize(
    ("machine", "capability", "features", "levels"),
    [
        ("x86_64", "DEFAULT", "", "portable"),
        ("x86_64", "AVX2", "", "avx2 portable"),
        ("AMD64", "AVX512", "", "avx2 portable"),
        ("AMD64", "AVX512", "bf16", "avx2 portable"),
        ("x86_64", "AVX512", "vnni", "avx512 avx2 portable"),
        ("x86_64", "AVX512", "vnni bf16", "avx512bf16 avx512 avx2 portable"),
        ("aarch64", "SVE256", "", "portable"),
        ("aarch64", "DEFAULT", "asimddp", "neon portable"),
        ("arm64", "DEFAULT", "asimddp", "neon portable"),
        ("x86_64", "DEFAULT", "asimddp", "portable"),
        ("riscv64", "something new", "", "portable"),
    ],
)
def test_levels_of_other_cpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    capability: str,
    features: str,
    levels: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"Features\t: fp asimd {features}\n")
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: "vnni" in features)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "bf16" in features)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.delenv("QUANTLAB_NATIVE", raising=False)
    build.supported.cache_clear()
    names = [level.name for level in build.supported()]
    assert names == levels.split()
    assert build.chosen().name == names[0]
    monkeypatch.setenv("QUANTLAB_NATIVE", "amx")
    assert_falls_back(f"QUANTLAB_NATIVE=amx: this machine runs {', '.join(names)} or off")


def test_switched_off_and_nonsense(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_NATIVE", "off")
    assert_falls_back("native kernels are switched off")
    dispatch.probe.cache_clear()
    monkeypatch.setenv("QUANTLAB_NATIVE", "nonsense")
    assert_falls_back("QUANTLAB_NATIVE=nonsense: this machine runs")
    assert not cache.exists()


def test_an_unwritable_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, 'echo > "$out"')
    cache.write_text("a file where the folder should be")
    assert_falls_back("the kernels cannot be written")


def test_a_process_that_may_not_use_the_level(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def ql_init(self) -> int:
            return 1

    monkeypatch.setattr(build, "build", lambda level: cache)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: Refused())
    assert_falls_back("the operating system does not let this process use portable")


def test_what_was_built_is_kept_until_something_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = install(tmp_path, monkeypatch, 'echo > "$out"')
    sources = tmp_path / "cpu"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    objects = {f"{source.stem}.o" for source in sources.glob("*.cpp")}
    first = build.build(PORTABLE)
    assert first.parent == cache
    assert set(compiler.calls) == {*objects, "kernels.so"}
    assert len(compiler.calls) == len(objects) + 1
    assert build.build(PORTABLE) == first
    assert len(compiler.calls) == len(objects) + 1

    (sources / "notes.txt").write_text("not compiled")
    assert build.build(PORTABLE) == first
    made = {first}
    for change in ("header", "source", "name", "compiler", "level"):
        match change:
            case "header" | "source":
                changed = sources / ("simd.h" if change == "header" else "api.cpp")
                changed.write_text(changed.read_text() + "\n")
            case "name":
                (sources / "pack.cpp").rename(sources / "packing.cpp")
            case "compiler":
                monkeypatch.setenv("VERSION", "2")
        made.add(build.build(LEVELS[-2] if change == "level" else PORTABLE))
    assert len(made) == 6
    assert sorted(cache.iterdir()) == sorted(made)

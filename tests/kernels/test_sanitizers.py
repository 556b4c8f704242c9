"""The C++ under the address and undefined-behaviour sanitizers: see sanitize.cpp."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import build

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", *SANITIZERS)
PROGRAM = Path(__file__).with_name("sanitize.cpp")


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "runtime error" not in said, said[-4000:]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that makes programs with sanitizers, and a machine that runs them."""
    empty = tmp_path_factory.mktemp("sanitizers") / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    program = empty.with_suffix("")
    try:
        command = build.compiler()
        run(command, *FLAGS, empty, "-o", program)
        run(program)
    except (build.BuildError, AssertionError) as error:
        pytest.skip(f"no sanitizers: {str(error)[:200]}")
    return command


def program(command: str, level: build.Level, flags: tuple[str, ...], folder: Path) -> Path:
    """sanitize.cpp with all kernels at this level, compiled in a new folder."""
    folder.mkdir()
    flags = (*flags, *level.flags, f"-DQL_LEVEL={level.number}", f"-I{build.SOURCES}")
    sources = [*sorted(build.SOURCES.glob("*.cpp")), PROGRAM]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as workers:
        list(
            workers.map(
                lambda pair: run(command, *flags, "-c", pair[0], "-o", pair[1]),
                zip(sources, objects, strict=True),
            )
        )
    made = folder / "sanitize"
    run(command, *flags, *objects, "-o", made)
    return made


@pytest.mark.slow
@pytest.mark.xdist_group("native")
@pytest.mark.parametrize("level", sorted({build.supported()[0], build.LEVELS[-1]}, key=str))
def test_nothing_is_read_or_written_out_of_place(
    level: build.Level, compiler: str, tmp_path: Path
) -> None:
    run(program(compiler, level, FLAGS, tmp_path / "program"))

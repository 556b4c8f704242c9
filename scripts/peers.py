"""Makes the isolated environments of the peers that QuantLab is compared with; `make peers`.

    python3 scripts/peers.py [awq | gptqmodel ...]

Each has its own requirements and lives in .venv-peers/NAME. A line `# no-deps: PACKAGE` in a
requirements file is installed last and without its dependencies. A stamp holds the hash of what was
asked for, so the second time costs a few milliseconds; where only the request has changed, and all
that it names is there in its version, the stamp is renewed and nothing installed. Standard library
only.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-peers"
PEERS = {
    "awq": ("requirements-peers.txt", "awq"),
    "gptqmodel": (
        "requirements-peers-gptqmodel.txt",
        "gptqmodel, optimum.gptq, compressed_tensors, bitsandbytes",
    ),
}
"""By the name of the environment: its requirements, and what must import afterwards."""
BUILD_TOOLS = ("setuptools==84.2.1", "wheel==0.48.0")
"""What the packages without dependencies are built with: their builds may read torch's version, so
they must not be isolated from it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the environments of the peers.")
    parser.add_argument(
        "peers",
        nargs="*",
        choices=[*PEERS, []],
        metavar="PEER",
        help="awq or gptqmodel; both unless named",
    )
    for name in parser.parse_args().peers or PEERS:
        ensure(name)


def ensure(name: str) -> None:
    """Install one peer unless its stamp says that it is there."""
    requirements, modules = PEERS[name]
    venv = FOLDER / name
    python = venv / "bin" / "python"
    text = (ROOT / requirements).read_text(encoding="utf-8")
    wanted = hashlib.sha256(text.encode()).hexdigest()
    stamp = venv / ".quantlab-peer"
    known = stamp.is_file() and stamp.read_text() == wanted
    if (known or satisfied(python, text)) and imports(python, modules):
        stamp.write_text(wanted)
        say(f"{name} is ready: {python.relative_to(ROOT)}")
        return
    say(f"making {venv.relative_to(ROOT)}, about 1.5 GB")
    shutil.rmtree(venv, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    run([*pip, *BUILD_TOOLS])
    run([*pip, "--requirement", str(ROOT / requirements)])
    for package in re.findall(r"^# no-deps: (\S+)$", text, re.MULTILINE):
        run([*pip, "--no-deps", "--no-build-isolation", package])
    if not imports(python, modules):
        sys.exit(f"error: {name} was installed but cannot import {modules}")
    stamp.write_text(wanted)
    say(f"{name} is ready: {python.relative_to(ROOT)}")


def satisfied(python: Path, text: str) -> bool:
    """Whether the peer's Python has all that a requirements file names, in its versions."""
    code = (
        "import sys; from importlib.metadata import version\n"
        "for pin in sys.argv[1:]:\n"
        "    name, wanted = pin.split('==')\n"
        "    assert version(name).partition('+')[0] == wanted, pin\n"
    )
    pins = re.findall(r"^(?:# no-deps: |(?!#))(\S.*)$", text, re.MULTILINE)
    if not all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins):
        return False
    try:
        command = [str(python), "-c", code, *pins]
        return subprocess.run(command, capture_output=True, cwd=FOLDER).returncode == 0
    except OSError:
        return False


def imports(python: Path, modules: str) -> bool:
    """Whether the peer's Python runs and imports what it is there for."""
    command = [str(python), "-W", "ignore", "-c", f"import {modules}"]
    try:
        # Not in the checkout: its folder `kernels` would hide a package that bitsandbytes tries.
        return subprocess.run(command, capture_output=True, cwd=FOLDER).returncode == 0
    except OSError:
        return False


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        sys.exit(f"error: this failed, see above: {' '.join(command)}")


def say(line: str) -> None:
    print(f"[quantlab] {line}", flush=True)


if __name__ == "__main__":
    main()

"""The house keeps its order: imports go one way and are quiet, files name no machine."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

CHAINS = """
types < errors < grid < packing < models < calibration < methods < pipeline < jobs < ui < app
kernels < operands < layers < engine < metrics < pipeline
packing < operands < layers
packing < export < pipeline
models < export
types < results < plots < report < ui
errors < results
results < store < pipeline
errors < paths < store
paths < texts < calibration
grid < observers < calibration
models < texts
errors < ggml < packing
codebook < packing
errors < environment < keys < pipeline
methods < estimate < pipeline
types < meter < pipeline
errors < stops < engine
stops < checks
layers < blockwise < variants
layers < outer < variants
models < outer
errors < allocation < methods
metrics < sensitivity < methods
calibration < sensitivity
methods < blockwise
moments < calibration < lockstep < blockwise
texts < lockstep
layers < native_weights < native_records < native_decoder < runners
native_records < native_blocks < calibration
models < native_blocks
moments < native_blocks
engine < native_decoder
heap < blockwise
calibration < training < methods
grid < compensation < training
compensation < methods
texts < training
export < variants
engine < onnx_engine < runners
engine < llamacpp < runners < variants < measure < pipeline
metrics < runners
metrics < answers < measure
export < prepared < foreign < variants < delivery < pipeline
methods < foreign
variants < interleave < pipeline
methods < checks < single
calibration < checks
texts < conditions < single < pipeline
environment < checks
environment < conditions
delivery < single
measure < single
meter < single
store < single
answers < interleave
answers < forks < ui
store < forks
jobs < labs < plots
results < labs
metrics < plots
store < report
store < precomputed < ui
pipeline < bench < cli
report < cli
methods < learn < plots
store < learn
learn < inspection < plots
runners < inspection
methods < advisor < ui
ggml < advisor
errors < peers < methods
models < peer_run
metrics < peer_run
environment < peer_run
peers < peer_run
foreign < peer_run < variants
packing < advisor
models < advisor
kernels < advisor
results < advisor
"""
"""`a < b`: a must not import b. Rooms that no chain orders may use each other in one direction."""

ROOMS = {
    "quantlab.llamacpp_process": "llamacpp",
    "quantlab.locks": "store",
    "quantlab.database": "store",
    "quantlab.runs": "store",
    "quantlab.votes": "store",
    "quantlab.artifacts": "store",
    "quantlab.child": "jobs",
    "quantlab.progress": "jobs",
    "quantlab.processes": "store",
    "quantlab.supervisor": "jobs",
    "quantlab.waiting": "jobs",
    "quantlab.worker": "jobs",
    "quantlab.__main__": "cli",
}
"""Modules that belong to a room of another name; a package or module is a room of its own name."""

ELSEWHERE = "quantlab.peers.workers."
"""What the peers' own Python runs, with their packages and without QuantLab."""

OPTIONAL = {
    "triton": "kernels.gpu.",
    **dict.fromkeys(("gptqmodel", "awq", "auto_gptq", "bitsandbytes"), ELSEWHERE),
}
"""Packages that a part of the program cannot do without, and the rest can: only there they are
imported, and nothing of it is imported at start. Triton comes with torch's builds for CUDA."""

LIGHT = ("quantlab.types", "quantlab.errors", "quantlab.results", "quantlab.store", "quantlab.jobs")
"""What pages and supervisors import without paying for torch."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the program (not of the tests), by its dotted name."""
    found = {}
    for top in ("quantlab", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    if (ROOT / "app.py").is_file():
        found["app"] = ROOT / "app.py"
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Full names of everything the module imports anywhere in its text, also inside functions."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(found)


def room(name: str) -> str | None:
    """The room of a module or of a name imported from one; None outside the house."""
    if name.split(".")[0] in ("kernels", "app"):
        return name.split(".")[0]
    if not name.startswith("quantlab."):
        return None
    head = ".".join(name.split(".")[:2])
    return ROOMS.get(head, head.removeprefix("quantlab."))


@cache
def order() -> dict[str, frozenset[str]]:
    """Room -> rooms that it must not import: all that stand to its right in some chain."""
    right: dict[str, set[str]] = {}
    for chain in CHAINS.strip().splitlines():
        rooms = [part.strip() for part in chain.split("<")]
        for left, next_room in pairwise(rooms):
            right.setdefault(left, set()).add(next_room)
            right.setdefault(next_room, set())
    closed: dict[str, frozenset[str]] = {}

    def close(name: str, path: tuple[str, ...] = ()) -> frozenset[str]:
        assert name not in path, f"the chains go in a circle: {path}"
        if name not in closed:
            beyond = [close(following, (*path, name)) for following in right[name]]
            closed[name] = frozenset(right[name]).union(*beyond)
        return closed[name]

    for name in right:
        close(name)
    return closed


def test_every_module_stands_in_a_room() -> None:
    unknown = {name: room(name) for name in modules() if name != "quantlab"}
    unknown = {name: place for name, place in unknown.items() if place not in order()}
    assert not unknown, "say in CHAINS or ROOMS where these stand"


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name} ({room(name)}) imports {target}"
        for name in modules()
        for target in sorted(imports(name))
        if room(target) in order().get(room(name) or "", frozenset())
    ]
    assert not wrong


def test_kernels_never_import_quantlab() -> None:
    wrong = [
        (n, t) for n in modules() if room(n) == "kernels" for t in imports(n) if "quantlab" in t
    ]
    assert not wrong


def test_methods_stand_alone() -> None:
    """A method imports no other method, no layers, no export and no page."""
    registered = {
        name
        for name, path in modules().items()
        if name.startswith("quantlab.methods.")
        and any(
            isinstance(node, ast.ClassDef)
            and any("register" in ast.unparse(mark) for mark in node.decorator_list)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert {"quantlab.methods.rtn", "quantlab.methods.gptq"} <= registered
    wrong = [
        f"{name} imports {target}"
        for name in registered
        for target in imports(name)
        if any(target == other or target.startswith(f"{other}.") for other in registered - {name})
        or room(target) in ("layers", "export", "ui")
    ]
    assert not wrong


def test_only_models_know_the_model_classes_of_transformers() -> None:
    classes = re.compile(
        r"transformers\.(models\b|modeling|Auto(Model|Config)\w*|\w+(ForCausalLM|Model)$)"
    )
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        if room(name) != "models" and not name.startswith(ELSEWHERE)
        for target in imports(name)
        if classes.match(target)
    ]
    assert not wrong


def test_what_peers_run_knows_nothing_of_quantlab() -> None:
    workers = [name for name in modules() if name.startswith(ELSEWHERE)]
    assert len(workers) > 3
    wrong = [(n, t) for n in workers for t in imports(n) if t.startswith(("quantlab", "kernels"))]
    assert not wrong


def test_only_the_page_imports_gradio() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        if room(name) not in ("ui", "app")
        for target in imports(name)
        if target.split(".")[0].startswith("gradio")
    ]
    assert not wrong


def python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose every home folder is `home`."""
    environment = os.environ | {
        "HOME": str(home),
        "XDG_DATA_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "QUANTLAB_HOME": str(home / "quantlab"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in ("HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


WATCH = """
import sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "os.system"):
        seen.append(f"{event} {args[1:]}")
    elif event == "subprocess.Popen" and any(
        tool in str(args[0]) for tool in ("cc", "c++", "g++", "clang", "cmake", "ninja", "pip")
    ):
        seen.append(f"{event} {args[0]}")
sys.addaudithook(watch)
"""


def missing(name: str) -> bool:
    """Whether a module needs an optional package that is not installed."""
    return any(
        name.startswith(part) and importlib.util.find_spec(package) is None
        for package, part in OPTIONAL.items()
        if package in {target.split(".")[0] for target in imports(name)}
    )


def test_importing_everything_is_quiet(tmp_path: Path) -> None:
    """No download, no build, no file, no log line and no logging set-up at import."""
    names = [name for name in modules() if name != "app" and not name.endswith("__main__")]
    # Peers' packages are imported only where a function runs, so that their modules count as well.
    names = [name for name in names if name.startswith(ELSEWHERE) or not missing(name)]
    code = f"""{WATCH}
import importlib, logging
for name in {names!r}:
    importlib.import_module(name)
assert not seen, seen
assert not logging.getLogger("quantlab").handlers
assert not logging.getLogger("kernels").handlers
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_records_and_queue_import_without_torch(tmp_path: Path) -> None:
    present = [name for name in LIGHT if name in modules()]
    code = f"""
import importlib, sys
for name in {present!r}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "gradio", "plotly", "pandas"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_optional_packages_are_not_imported_at_start(tmp_path: Path) -> None:
    code = f"""
import sys
import kernels.dispatch, quantlab.layers
early = {set(OPTIONAL)!r} & set(sys.modules)
assert not early, early
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# --- files -----------------------------------------------------------------------------------

TEXT = {".py", ".md", ".txt", ".toml", ".css", ".html", ".js", ".json", ".cpp", ".h", ".sh", ""}
SKIPPED = {
    ".git",
    ".venv",
    ".venv-peers",
    "build",
    "runs",
    "screenshots",
    "node_modules",
    ".hypothesis",
}
# Written in halves, so that this file passes its own test.
MACHINE = re.compile(
    "|".join(["/ro" + "ot/", "/ho" + r"me/\w", "/wo" + "rk/", "/Us" + "ers/", r"\bC:" + r"\\"])
)
REGISTRY = re.compile(
    "|".join(["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "--extra" + "-index"])
)
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")


def files() -> Iterator[Path]:
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in SKIPPED and "cache" not in name]
        found = (Path(folder) / name for name in names if name not in SKIPPED)
        yield from (path for path in found if path.suffix in TEXT)


def occurrences(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in files():
        if path.is_relative_to(ROOT / "assets" / "texts"):
            continue  # prose, which may speak of anything
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in pattern.finditer(text)]
    return found


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY, UNFINISHED], ids=lambda p: p.pattern[:12])
def test_no_file_names_a_machine_a_registry_or_unfinished_work(pattern: re.Pattern[str]) -> None:
    assert occurrences(pattern) == []


def requirements(name: str) -> dict[str, str]:
    """Package (normalized) -> pinned version, of one requirements file, as far as it holds here."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-onnx.txt", "requirements-dev.txt"]
)
def test_requirements_are_pinned_and_installed(name: str) -> None:
    for package, version in requirements(name).items():
        assert version, f"{package} has no version"
        installed = importlib.metadata.version(package).partition("+")[0]
        assert installed == version, package


def test_every_imported_package_is_required() -> None:
    """What the program imports is required by name, not there by another's kindness."""
    owners = importlib.metadata.packages_distributions()
    required = requirements("requirements.txt") | requirements("requirements-onnx.txt")
    missing = set()
    for name in modules():
        for target in imports(name):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names or top in ("quantlab", "kernels", "app"):
                continue
            if top in OPTIONAL and name.startswith(OPTIONAL[top]):
                continue
            packages = {canonicalize_name(owner) for owner in owners.get(top, [top])}
            if not packages & set(required):
                missing.add(f"{top} (in {name})")
    assert not missing


def test_readme_is_current() -> None:
    from quantlab.cli.docs import render

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == render(text), "run: make docs"


def test_page_of_the_space_names_the_installed_gradio() -> None:
    """The front matter of README.md is what a Hugging Face Space is built from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    front = dict(re.findall(r"^(\w+): (.+)$", text.split("---")[1], re.MULTILINE))
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == requirements("requirements.txt")["gradio"]
    assert front["app_file"] == "app.py"

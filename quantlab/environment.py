"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
from pathlib import Path
from typing import Any

import psutil

import quantlab

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "llama-cpp-python",
    "gguf",
    "gradio",
    "numpy",
    "onnxruntime",
)
MEASURING = ("ui", "cli", "plots", "bench", "learn", "inspection")
"""Rooms whose code decides no number; they do not count in `code_version`."""


def default_threads() -> int:
    """One thread for each physical core this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False) or usable or 1
    return max(1, min(physical, usable or 1))


def resolve_device(device: str) -> str:
    """'cpu' or 'cuda' from 'auto', 'cpu' or 'cuda'. Raises: ConfigError."""
    import torch

    from quantlab.errors import ConfigError

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: {device!r}; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "device: cuda was asked for, but torch finds no CUDA GPU; use auto or cpu"
        )
    return "cuda" if available and device != "cpu" else "cpu"


@functools.cache
def machine() -> dict[str, Any]:
    """What does not change while the process lives: CPU, memory, GPU, versions."""
    import torch

    flags = (_cpu_field("flags") or _cpu_field("Features")).split()  # x86; Arm.
    wanted = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx_vnni", "asimddp")
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_features": [flag for flag in wanted if flag in flags],
        "cores": default_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"quantlab": quantlab.__version__, **_versions()},
        "code": code_version(),
    }


def network_available() -> bool:
    """Whether the model hub's name can be resolved; asked with a short time-out."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    previous = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(1.0)
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return False
    finally:
        socket.setdefaulttimeout(previous)
    return True


@functools.cache
def code_version() -> str:
    """Hash of every source file that decides a number; results are cached under it."""
    package = Path(quantlab.__file__).parent
    digest = hashlib.sha256()
    for root in (package, package.parent / "kernels"):
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.suffix in (".py", ".cpp", ".h") and relative.parts[0] not in MEASURING:
                digest.update(str(relative).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""

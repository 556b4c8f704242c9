"""Engines that are timed beside each other: each reads a prompt, or decodes after it.

QuantLab and transformers run in this process and are timed by its clock; llama.cpp runs in its own
and keeps the time there, so that no pipe counts against it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantlab.bench.spec import PARTS
from quantlab.environment import machine
from quantlab.errors import ConfigError
from quantlab.llamacpp import LlamaCpp, build_info
from quantlab.metrics.speed import Decoder


@dataclass(frozen=True)
class Side:
    """`prefill(ids)`: seconds to read a prompt, its next token included; `decode(ids, n)`: seconds
    for n tokens after it. `parts` names which of the two are wanted."""

    name: str
    prefill: Callable[[Sequence[int]], float]
    decode: Callable[[Sequence[int], int], float]
    parts: tuple[str, ...] = PARTS[:2]


def here(name: str, decoder: Decoder, threads: int, parts: tuple[str, ...] = PARTS[:2]) -> Side:
    """A side in this process, on so many of torch's (and the native kernels') threads."""

    def prefill(ids: Sequence[int]) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        decoder.prefill(ids)
        return time.perf_counter() - start

    def decode(ids: Sequence[int], count: int) -> float:
        torch.set_num_threads(threads)
        token = decoder.prefill(ids)
        start = time.perf_counter()
        for _ in range(count):
            token = decoder.step(token)
        return time.perf_counter() - start

    return Side(name, prefill, decode, parts)


def peer(name: str, engine: LlamaCpp) -> Side:
    """llama.cpp, with as many threads as it was opened with."""
    return Side(
        name,
        lambda ids: engine.timed(ids, 0)[0],
        lambda ids, count: engine.timed(ids, count)[1],
    )


def open_peer(path: Path, threads: int, context: int) -> LlamaCpp:
    """llama.cpp on a file. Raises: ModelError, MethodError."""
    return LlamaCpp(path, threads, context)


def check_peer() -> str:
    """What the installed llama.cpp was built with, where it is worth comparing with.

    Raises: ConfigError where it is missing, does not start, or leaves out instructions that this
    CPU has: being faster than a crippled build proves nothing."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(
            "--against: llama-cpp-python is not installed; install it, or leave it out"
        )
    try:
        info = build_info()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--against: llama.cpp does not start here ({type(error).__name__}); "
            "compile llama-cpp-python on this machine"
        ) from None
    if "avx512_vnni" in machine()["cpu_features"] and "AVX512_VNNI" not in info:
        raise ConfigError(
            f"--against: {info} was built without AVX512-VNNI, which this CPU has; compile "
            "llama-cpp-python on this machine (pip install --no-binary llama-cpp-python)"
        )
    return info

"""What a run will cost, before anything starts: from the model's size and this machine's speed."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import torch

from quantlab.environment import default_threads
from quantlab.methods import METHODS, configure
from quantlab.models import CATALOGUE
from quantlab.texts import fast_bfloat16
from quantlab.types import Estimate, RunSpec

EFFICIENCY = 0.22
"""Share of a bare matrix product's speed that measuring a variant reaches (the head, divergences,
attention and memory take the rest). This and the next ones are fitted by hand to the default
comparison of the bundled model: 3:41 and 2.3 GB on two cores of a Xeon with AMX, native kernels and
nothing else running; other machines and models only scale from there."""
CALIBRATION_EFFICIENCY = 0.42
"""The same of a pass over the calibration text, which needs no head."""
SECOND_MOMENT_COST = 0.1
"""GPTQ and AWQ need, beside the passes, sums of x x^T and their search; in forward passes at
float32 speed."""
SEARCH_SECONDS = 16.0
"""For a model of the bundled one's size: what methods that calibrate spend on scales, clipping and
compensation."""
LLAMA_CPP_COST = 4.0
"""What reading the evaluation text takes in llama.cpp, against QuantLab's own kernels."""
RUNNING_BYTES = 2.0e9
"""Of Python, torch, the page and what lies in memory beside two copies of the weights."""
PROBES = 5
"""Times the speed of products is measured; the best counts, what else runs only slows one down."""
TRAINING = 0.5
"""Share of a forward pass's speed that training reaches: rounding every weight, the optimizer and
logits over the whole vocabulary take the rest. Assumed."""
DECODE_BYTES_PER_SECOND = 2e10
FIXED_SECONDS = 4.0
"""Loading, packing, saving and opening a variant of the bundled model. Assumed."""


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of a 512-cubed matrix product on this machine, measured once."""
    a = torch.randn(512, 512).to(dtype)
    a @ a
    best = 0.0
    for _ in range(PROBES):
        started = time.perf_counter()
        rounds = 0
        while time.perf_counter() - started < 0.01:
            a @ a
            rounds += 1
        best = max(best, rounds * 2 * 512**3 / (time.perf_counter() - started))
    return best


def measure_machine() -> None:
    """Measure this machine now, while nothing else goes on, rather than with the first estimate: a
    browser that draws the page for the first time takes both cores of a small machine."""
    for dtype in (torch.float32, torch.bfloat16):
        matmul_rate(dtype)


@functools.cache
def parameter_count(model: str) -> int | None:
    """Weights of a catalogued model or of local files; None where it cannot be known yet."""
    for entry in CATALOGUE:
        if entry.id == model:
            return entry.parameters
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path.stat().st_size * 2
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    return size // 2 or None


def estimate(spec: RunSpec, *, quantized: bool = False) -> Estimate:
    """Seconds and bytes, from forward passes at this machine's measured matrix speed.

    A plan, not a promise: it ignores what is cached already, unless the caller knows that all of it
    is `quantized`; then only loading and measuring are left.
    """
    parameters = parameter_count(spec.model)
    if parameters is None:
        return Estimate(0.0, 0, "unknown until the model is loaded")
    cores = default_threads()
    share = min(spec.threads or cores, cores) / cores
    single = matmul_rate(torch.float32) * share * EFFICIENCY
    half = (matmul_rate(torch.bfloat16) if fast_bfloat16() else matmul_rate(torch.float32)) * share
    forward = 2 * parameters
    seconds = forward * spec.eval_tokens / single
    scale = parameters / 134_515_008
    for variant in spec.variants:
        method = METHODS[variant.method]
        seconds += FIXED_SECONDS * scale
        in_llama_cpp = dict(variant.options).get("engine", "llama.cpp") == "llama.cpp"
        engine = LLAMA_CPP_COST if variant.method == "gguf" and in_llama_cpp else 1.0
        seconds += engine * forward * spec.eval_tokens / (half * EFFICIENCY)
        seconds += (
            len(spec.prompts) * spec.max_new_tokens * 2 * parameters / DECODE_BYTES_PER_SECOND
        )
        if quantized:
            continue
        config = configure(variant, spec.group_size)
        needs = method.needs_for(config)
        if method.peer is not None:
            seconds += method.peer_seconds * scale
        elif needs:
            # Collecting, and going on through the quantized block; in lockstep both are one.
            passes = 1.0 + (method.sees_error and not method.sequential)
            passes += "cross_moment" in needs
            seconds += passes * forward * spec.calibration_tokens / (half * CALIBRATION_EFFICIENCY)
            seconds += SEARCH_SECONDS * scale
        if method.trains:
            passes = method.train_passes(config)
            seconds += passes * forward * spec.calibration_tokens / (half * EFFICIENCY * TRAINING)
        if "second_moment" in needs and method.packs:
            seconds += SECOND_MOMENT_COST * forward * spec.calibration_tokens / single
    return Estimate(seconds, int(4 * parameters * 2 + RUNNING_BYTES), "")

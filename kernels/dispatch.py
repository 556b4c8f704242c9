"""Chooses the kernel of a linear layer, and says which it chose and why.

Kernels are tried in order; each declares what it can do (`Kernel`) and is probed once, when first
wanted. What none of them runs falls back to the reference: dequantize a tile and multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from kernels import gpu, native_linear, torch_int4, torch_int8, torch_outlier, torch_w8a8
from kernels.base import Choice, Kernel, Operands, Prepared, Problem

KERNELS: tuple[Kernel, ...] = (
    native_linear.WEIGHT_ONLY,
    native_linear.W8A8,
    torch_int4.KERNEL,
    torch_int8.KERNEL,
    torch_w8a8.KERNEL,
    torch_outlier.KERNEL,
    *gpu.KERNELS,
)
REFERENCE = "reference"


@functools.cache
def probe(kernel: Kernel) -> str | None:
    """None where the kernel works on this machine, else the reason it does not."""
    try:
        kernel.probe()
    except Exception as error:  # a missing op, an unsupported CPU, a wrong product: all the same
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def choose(problem: Problem) -> tuple[Choice, Kernel | None]:
    """The first kernel that covers `problem` and works here, or the reference (None).

    `why` names the kernels before it that cover the problem and do not work on this machine.
    Kernels of other devices give no reasons: they would only hide what is missing on this one."""
    kernels = [kernel for kernel in KERNELS if problem.device in kernel.devices]
    if not kernels:
        return fallback(f"no kernel for device {problem.device}"), None
    refused, broken = [], []
    for kernel in kernels:
        if reason := kernel.refusal(problem):
            refused.append(f"{kernel.name}: {reason}")
        elif reason := probe(kernel):
            broken.append(f"{kernel.name}: {reason}")
        else:
            return Choice(kernel.name, "packed", "; ".join([_covers(problem), *broken])), kernel
    return fallback("; ".join([*broken, *refused])), None


def prepare(problem: Problem, operands: Callable[[], Operands]) -> tuple[Choice, Prepared | None]:
    """Choose, and bring the weight into the kernel's layout; None means the reference runs it.

    `operands` is called only where a kernel wants them: unpacked they take a byte a weight."""
    choice, kernel = choose(problem)
    if kernel is None:
        return choice, None
    try:
        return choice, kernel.prepare(problem, operands())
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return fallback(f"{kernel.name}: {reason}"), None


def fallback(why: str) -> Choice:
    """The reference, for the reason given."""
    return Choice(REFERENCE, "simulated", why)


def _covers(problem: Problem) -> str:
    p = problem
    grid = "a grid a row" if p.group_size >= p.columns else f"groups of {p.group_size}"
    inputs = {
        None: "",
        "token": ", inputs 8 bits per token",
        "tensor": ", inputs 8 bits static",
        "outlier": ", inputs 8 bits per token but for outlier columns",
        "dynamic_tensor": ", inputs 8 bits dynamic",
        "dynamic_token": ", inputs 8 bits dynamic per token",
    }
    table = " by a table" if p.grid == "table" else ""
    return f"{p.bits} bits{table}, {grid}{inputs[p.activation]}, {p.device}"

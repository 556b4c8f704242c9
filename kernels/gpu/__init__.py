"""Kernels for GPUs in Triton, one op a file; this file declares what they can do.

Triton is imported when a kernel is first probed, not before: installations for the CPU are without
it, and the reason for the fallback then says so.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from kernels.base import Kernel, Operands, Prepared, Problem


def _op(name: str) -> Any:
    """The module of an op. Raises: ImportError where Triton is not installed."""
    return importlib.import_module(f"{__name__}.{name}")


def _prepare_w4a16(problem: Problem, operands: Operands) -> Prepared:
    return _op("w4a16").GridLinear(problem, operands)


def _prepare_w8a8(problem: Problem, operands: Operands) -> Prepared:
    return _op("w8a8").Int8Linear(problem, operands)


W4A16 = Kernel(
    name="Triton W4A16 (GEMV and GEMM with split-K)",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    bits=(2, 3, 4, 5, 6, 7, 8),
    group_multiple=32,
    activations=(None,),
    asymmetric=True,
    probe=lambda: _op("w4a16").probe(),
    prepare=_prepare_w4a16,
)
W8A8 = Kernel(
    name="Triton W8A8 (int8 GEMM)",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    bits=(8,),
    group_multiple=None,
    activations=("token", "tensor", "dynamic_tensor", "dynamic_token"),
    asymmetric=False,
    probe=lambda: _op("w8a8").probe(),
    prepare=_prepare_w8a8,
)
KERNELS = (W4A16, W8A8)

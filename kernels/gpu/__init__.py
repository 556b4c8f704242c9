"""Kernels for GPUs in Triton, one op a file; this file declares what they can do.

How the tiles are laid out. A GPU runs many programs side by side, each by a few warps of 32
threads; a program here owns a tile of the output and walks along the columns of the weights, a
block of 32 to 128 at a time, so that its sums stay in registers and are written once. Each block of
weights is read and unpacked once for all rows of x in the tile. A single token needs every weight
just once, so its time goes into reading them: packed bytes of neighbouring rows lie next to each
other, block by block, so neighbouring threads read neighbouring bytes; and as one token makes few
tiles, the columns are split over more programs (split-K), whose sums are added up afterwards. Many
tokens use each weight often, so tiles grow until the registers are full: a larger one makes more
products of each byte that it reads. Tensor cores multiply small matrices, 16 or 64 rows of one by 8
or more columns of the other. Tiles are of y.T = w x.T, weights on the left, because there are
always many rows of weights, but maybe few tokens to fill the other side. A block never crosses the
border of a group: its codes are multiplied as whole numbers, exactly, and the scale is applied to
the sum of the block instead of to every weight.

Triton is imported when a kernel is first probed, not before: installations for the CPU are without
it, and the reason for the fallback then says so. All of it was tested in Triton's interpreter and
compiled for sm_80 and sm_90; no GPU has run it yet.
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

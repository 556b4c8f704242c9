"""LLM.int8(): 8-bit weights and inputs, but for the input's outlier columns, by oneDNN.

    y = (codes @ q.T) * step_x * scale + x[:, outliers] @ (q[:, outliers] * scale).T

The first product is the one of `torch_w8a8`, with the codes of outlier columns set to zero. The
second needs columns of weights that oneDNN keeps in a layout of its own. A few are read through the
product itself, by rows that hold a single one: exact, and no second copy of the weights. Of many,
unpacking all is cheaper. The second product runs in float32, which holds both factors exactly.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernels import reference
from kernels.base import Kernel, Operands, Problem
from kernels.torch_w8a8 import Int8Linear, quantize_rows

NAME = "oneDNN int8 + outlier columns"
FEW = 128
"""Columns up to which a product with single ones is used. On 576 x 1536 weights and one core it
takes 40 us for one row and 80 us for 64; unpacking takes 230 us."""


class OutlierLinear(Int8Linear):
    """A prepared LLM.int8() layer; see `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        super().__init__(dataclasses.replace(problem, activation="token"), operands)
        self.columns, self.threshold = problem.columns, operands.threshold

    def __call__(self, x: Tensor) -> Tensor:
        large = x.abs() >= self.threshold
        outliers = large.any(0).nonzero().flatten()
        if outliers.numel():
            codes, steps = quantize_rows(x.masked_fill(large, 0))
            codes.index_fill_(1, outliers, 128)
        else:
            codes, steps = quantize_rows(x)
        y = self._product(codes, 1.0, 128, None, torch.float32).mul_(steps)
        if outliers.numel():
            y.addmm_(x[:, outliers].float(), self.weight_columns(outliers))
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)

    def weight_columns(self, columns: Tensor) -> Tensor:
        """The dequantized weight's columns, transposed: float32 [len(columns), rows]."""
        if columns.numel() > FEW:
            dense: Tensor = self.packed.to_dense()
            return dense[columns].float().mul_(self.scales)
        ones = torch.full((columns.numel(), self.columns), 128, dtype=torch.uint8)
        ones.scatter_(1, columns[:, None], 129)
        return self._product(ones, 1.0, 128, None, torch.float32)


def probe() -> None:
    """Whole numbers through both ways of reading columns.

    Raises: RuntimeError where an op is missing or inexact."""
    codes = (torch.arange(32 * 160).reshape(32, 160) * 37 % 255 + 1).to(torch.uint8)
    problem = Problem(32, 160, 8, 160, True, "outlier", "cpu", torch.float32)
    operands = Operands(codes, torch.ones(32, 1), torch.full((32, 1), 128.0), threshold=128.0)
    layer = OutlierLinear(problem, operands)
    signed = (codes ^ 128).view(torch.int8)
    x = (torch.arange(3 * 160).reshape(3, 160) % 127).float()
    x[:, -1] = 127  # the step is 1
    for outliers in (0, 2, 150):
        x[0, :outliers] = 500
        want = reference.outlier_linear(x, signed, torch.ones(32), None, 128.0)
        if not torch.equal(layer(x).double(), want):
            raise RuntimeError("oneDNN's product with outlier columns is inexact on this machine")


KERNEL = Kernel(
    name=NAME,
    devices=("cpu",),
    dtypes=(torch.bfloat16, torch.float32),
    bits=(8,),
    group_multiple=None,
    activations=("outlier",),
    asymmetric=False,
    probe=probe,
    prepare=OutlierLinear,
)

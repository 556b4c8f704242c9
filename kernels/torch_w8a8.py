"""8-bit weights and 8-bit activations: integer products by oneDNN through torch.

Weights are symmetric with one step a row (or a tensor), int8 = code - 128. The input is quantized

    per tensor   code = clamp(round(x / step) + zero, 0, 255), step and zero from calibration
    per token    code = round(x / step) + 128, step = max|x| / 127 of each row at run time

Codes are always uint8: with int8 codes oneDNN has no fast path for many shapes (a row of 576 times
192 rows took 3.7 ms instead of 40 us), and converting to int8 instead saves less.

A float32 plus 3 * 2**22 has its rounded integer (ties to even) in its low bits: one fused add
scales, shifts and rounds, where separate steps take twice the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.base import Kernel, Operands, Problem

NAME = "oneDNN int8 (torch qlinear)"
MAGIC = float(3 * 2**22)
CHUNK = 256 * 1024
"""Elements of the input that are quantized at a time, so that the float32 copy stays in cache."""


def quantize_tensor(x: Tensor, scale: float, zero: int) -> Tensor:
    """uint8 codes of x ~ (code - zero) * scale; x [m, columns] float."""
    if x.numel() > CHUNK and x.shape[0] > 1:
        return torch.cat([quantize_tensor(part, scale, zero) for part in _chunks(x)])
    wide = x.float()
    offset = torch.full((1,), MAGIC + zero)
    magic = torch.add(offset, wide, alpha=1 / scale, out=_scratch(wide, x))
    return magic.clamp_(MAGIC, MAGIC + 255).view(torch.int32).to(torch.uint8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes around 128, steps float32 [m, 1]) of x ~ (code - 128) * step; x [m, columns]."""
    if x.numel() > CHUNK and x.shape[0] > 1:
        parts = [quantize_rows(part) for part in _chunks(x)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([steps for _, steps in parts])
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
    scaled = torch.mul(wide, 127 / peak, out=_scratch(wide, x))
    return scaled.add_(MAGIC + 128).view(torch.int32).to(torch.uint8), peak.div_(127)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, max(1, CHUNK // x.shape[1]))


def _scratch(wide: Tensor, x: Tensor) -> Tensor | None:
    """The float32 copy of x may be overwritten; x itself may not."""
    return None if x.dtype == torch.float32 else wide


class Int8Linear:
    """A prepared W8A8 linear layer; see `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.dtype = problem.dtype
        self.per_token = problem.activation == "token"
        self.input_scale, self.input_zero = operands.input_scale, operands.input_zero
        signed = (operands.codes ^ 128).view(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(signed, None)
        self.scales = operands.scales[:, 0].float().expand(problem.rows).contiguous()
        self.zeros = torch.zeros(problem.rows, dtype=torch.int32)
        self.bias = None if operands.bias is None else operands.bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        if not self.per_token:
            codes = quantize_tensor(x, self.input_scale, self.input_zero)
            return self._product(codes, self.input_scale, self.input_zero, self.bias, self.dtype)
        codes, steps = quantize_rows(x)
        y = self._product(codes, 1.0, 128, None, torch.float32).mul_(steps)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)

    def _product(
        self, codes: Tensor, scale: float, zero: int, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes,
            scale,
            zero,
            self.packed,
            self.scales,
            self.zeros,
            bias,
            1.0,  # the scale and zero-point of a quantized output: there is none
            0,
            dtype,
            "none",
            [],
            "",
        )
        return y

    def codes(self) -> Tensor:
        signed: Tensor = self.packed.to_dense()
        return signed.t().contiguous().view(torch.uint8) ^ 128

    def tensors(self) -> dict[str, Tensor]:
        kept = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return kept if self.bias is None else {**kept, "bias": self.bias}


def probe() -> None:
    """Multiply the largest codes, where an older CPU would saturate 16-bit sums.

    Raises: RuntimeError where an op is missing or inexact."""
    codes = torch.full((32, 96), 255, dtype=torch.uint8)
    codes[::2] = 0
    codes[:, ::5] = 77
    problem = Problem(32, 96, 8, 96, True, "tensor", "cpu", torch.float32)
    for zero in (0, 131):
        operands = Operands(codes, torch.ones(32, 1), torch.full((32, 1), 128.0), None, 1.0, zero)
        layer = Int8Linear(problem, operands)
        if not torch.equal(layer.codes(), codes):
            raise RuntimeError("oneDNN's packed weights do not come back")
        x = torch.full((3, 96), 255.0 - zero)
        x[1] = 7
        if not torch.equal(layer(x), x @ (codes.float() - 128).T):
            raise RuntimeError("oneDNN's int8 product is inexact on this machine")


KERNEL = Kernel(
    name=NAME,
    devices=("cpu",),
    dtypes=(torch.bfloat16, torch.float32),
    bits=(8,),
    group_multiple=None,
    activations=("token", "tensor"),
    asymmetric=False,
    probe=probe,
    prepare=Int8Linear,
)

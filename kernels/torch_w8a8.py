"""8-bit weights and 8-bit activations: integer products by oneDNN through torch.

Weights are symmetric with one step a row (or a tensor), int8 = code - 128. The input is quantized

    per tensor   code = clamp(round(x / step) + zero, 0, 255), step and zero from calibration
    per token    code = round(x / step) + 128, step = max|x| / 127 of each row at run time
    dynamic      as per tensor, but step and zero span [min(x, 0), max(x, 0)] at run time, of the
                 whole input or of each row

oneDNN takes one zero-point a call. A zero-point a row is a correction after it:

    sum_k (code - zero) w = sum_k (code - 128) w + (128 - zero) sum_k w

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


def dynamic_range(x: Tensor) -> tuple[float, int]:
    """(step, zero) of one grid for all of x, at run time."""
    if not x.numel():
        return 1.0, 0
    smallest, largest = torch.aminmax(x)
    low, high = min(float(smallest), 0.0), max(float(largest), 0.0)
    step = max((high - low) / 255, 1e-12)
    return step, min(round(-low / step), 255)


def quantize_rows_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 codes, steps, zeros float32 [m, 1]) of x ~ (code - zero) * step; x [m, columns]."""
    if x.numel() > CHUNK and x.shape[0] > 1:
        parts = [quantize_rows_dynamic(part) for part in _chunks(x)]
        codes, steps, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
        return codes, steps, zeros
    wide = x.float()
    low, high = torch.aminmax(wide, dim=-1, keepdim=True)
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    steps = high.sub_(low).div_(255).clamp_min_(1e-12)
    zeros = low.neg_().div_(steps).round_()
    scaled = torch.mul(wide, 1 / steps, out=_scratch(wide, x))
    # Rounded before the zero-point is added: together they would round a tie by the sum's parity.
    codes = scaled.add_(MAGIC).add_(zeros).clamp_(MAGIC, MAGIC + 255)
    return codes.view(torch.int32).to(torch.uint8), steps, zeros


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, max(1, CHUNK // x.shape[1]))


def _scratch(wide: Tensor, x: Tensor) -> Tensor | None:
    """The float32 copy of x may be overwritten; x itself may not."""
    return None if x.dtype == torch.float32 else wide


class Int8Linear:
    """A prepared W8A8 linear layer; see `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.dtype = problem.dtype
        self.kind = problem.activation
        self.input_scale, self.input_zero = operands.input_scale, operands.input_zero
        signed = (operands.codes ^ 128).view(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(signed, None)
        self.scales = operands.scales[:, 0].float().expand(problem.rows).contiguous()
        self.zeros = torch.zeros(problem.rows, dtype=torch.int32)
        self.bias = None if operands.bias is None else operands.bias.float()
        self.sums: Tensor | None = None
        if self.kind == "dynamic_token":
            self.sums = signed.sum(1, dtype=torch.int32).float() * self.scales

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind in ("tensor", "dynamic_tensor"):
            scale, zero = self.input_scale, self.input_zero
            if self.kind == "dynamic_tensor":
                scale, zero = dynamic_range(x)
            codes = quantize_tensor(x, scale, zero)
            return self._product(codes, scale, zero, self.bias, self.dtype)
        if self.sums is None:
            codes, steps = quantize_rows(x)
            y = self._product(codes, 1.0, 128, None, torch.float32)
        else:
            codes, steps, zeros = quantize_rows_dynamic(x)
            y = self._product(codes, 1.0, 128, None, torch.float32)
            y = torch.addcmul(y, zeros.neg_().add_(128), self.sums)
        y = y.mul_(steps)
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
        if self.sums is not None:
            kept["sums"] = self.sums
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
    activations=("token", "tensor", "dynamic_tensor", "dynamic_token"),
    asymmetric=False,
    probe=probe,
    prepare=Int8Linear,
)

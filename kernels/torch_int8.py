"""8-bit weights, a grid a row, bfloat16 activations: the output head, mostly.

    y = (x @ (code - 128).T) * scale        codes as int8, scale float32 a row, sums in float32

Few rows of x run torch's `_weight_int8pack_mm`, which reads the codes as they are; from UNPACK_FROM
rows on it is ten times slower than bfloat16 products, so the codes are widened a panel at a time
and multiplied (whole numbers up to 128 are exact in bfloat16). The op reads past the end of odd
shapes (wrong sums, even a crash), so rows and columns are padded to MULTIPLE. The int8 codes are
the only copy; `codes()` gives them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.base import Kernel, Operands, Problem

NAME = "torch int8pack (decode), bf16 widen + matmul (prefill)"
MULTIPLE = 64
UNPACK_FROM = 8
PANEL = 4 * 1024 * 1024
"""Weights widened at a time: bounds the transient memory to 8 MiB of bfloat16."""


class Int8Linear:
    """See the head of this file."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.rows, self.columns = problem.rows, problem.columns
        signed = (operands.codes.to(torch.int16) - 128).to(torch.int8)
        padding = (0, -self.columns % MULTIPLE, 0, -self.rows % MULTIPLE)
        self.packed = torch.nn.functional.pad(signed, padding).contiguous()
        self.scale = operands.scales[:, 0].expand(self.rows).float().contiguous()
        self.ones = torch.ones(self.packed.shape[0], dtype=torch.bfloat16)
        self.bias = None if operands.bias is None else operands.bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.packed.shape[1]:
            x = torch.nn.functional.pad(x, (0, self.packed.shape[1] - x.shape[1]))
        if x.shape[0] < UNPACK_FROM:
            y = torch._weight_int8pack_mm(x.contiguous(), self.packed, self.ones)
        else:
            y = self._many_rows(x)
        scaled = y[:, : self.rows].float().mul_(self.scale)
        if self.bias is not None:
            scaled += self.bias
        return scaled.to(x.dtype)

    def _many_rows(self, x: Tensor) -> Tensor:
        step = max(1, PANEL // self.packed.shape[1])
        parts = [x @ part.to(x.dtype).t() for part in self.packed.split(step)]
        return torch.cat(parts, 1)

    def codes(self) -> Tensor:
        plain = self.packed[: self.rows, : self.columns].to(torch.int16)
        return (plain + 128).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        kept = {"packed": self.packed, "scale": self.scale, "ones": self.ones}
        return kept if self.bias is None else {**kept, "bias": self.bias}


def probe() -> None:
    """Run both paths on a small layer. Raises: RuntimeError where an op is missing or wrong."""
    codes = (torch.arange(70 * 40).reshape(70, 40) * 37 % 256).to(torch.uint8)
    problem = Problem(70, 40, 8, 40, True, None, "cpu", torch.bfloat16)
    operands = Operands(codes, torch.full((70, 1), 0.5), torch.full((70, 1), 128.0))
    layer = Int8Linear(problem, operands)
    if not torch.equal(layer.codes(), codes):
        raise RuntimeError("the 8-bit codes do not come back")
    x = torch.eye(40, dtype=torch.bfloat16)
    expected = ((codes.float() - 128) * 0.5).T
    for got in (layer(x[: UNPACK_FROM - 1]), layer(x)):
        if not torch.equal(got.float(), expected[: len(got)]):
            raise RuntimeError("torch's int8 product is wrong on this machine")


KERNEL = Kernel(
    name=NAME,
    devices=("cpu",),
    dtypes=(torch.bfloat16,),
    bits=(8,),
    group_multiple=None,
    activations=(None,),
    asymmetric=False,
    probe=probe,
    prepare=Int8Linear,
)

"""Linear layers by QuantLab's own C++ (`cpu/`): grids of 2 to 8 bits in groups, tables of 16 values
(NF4, IQ4_NL), ggml's types with a minimum, and W8A8.

Inputs of weight-only layers keep 16 bits ("exact"): on vectors two bytes beside a step for 32
columns, on AMX tiles two bfloat16 parts. 8-bit inputs are rounded as `reference` does it. Products
with bytes are whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.base import Kernel, Operands, Problem

NAME = "QuantLab native"


MODES = {
    None: native.EXACT,
    "token": native.INT8_ROW,
    "tensor": native.INT8_GIVEN,
    "dynamic_token": native.INT8_RANGE_ROW,
    "dynamic_tensor": native.INT8_RANGE,
    "outlier": native.INT8_OUTLIERS,
}


def how_for(problem: Problem, operands: Operands) -> native.How:
    """How the input of a layer enters its product."""
    return native.How(
        MODES[problem.activation], operands.input_scale, operands.input_zero, operands.threshold
    )


class NativeLinear:
    """A prepared layer; see `kernels.base.Prepared`. `matrix` is what the decoder reads as well."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        assert problem.bits is not None
        self.dtype, self.kind = problem.dtype, problem.activation
        codes, scales = operands.codes, operands.scales
        if problem.grid == "table":
            assert operands.table is not None
            self.matrix = native.Matrix.table(codes, scales, operands.table, problem.group_size)
        else:
            made = native.Matrix.offset if problem.grid == "offset" else native.Matrix.affine
            self.matrix = made(codes, scales, operands.zeros, problem.bits, problem.group_size)
        self.how = how_for(problem, operands)
        self.bias = None if operands.bias is None else operands.bias.detach().float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix.linear(x.float(), self.how, self.bias).to(self.dtype)

    def codes(self) -> Tensor:
        return self.matrix.codes()

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"native_{name}": tensor for name, tensor in self.matrix.tensors.items()}
        return kept if self.bias is None else {**kept, "bias": self.bias}


def probe() -> None:
    """Build the library and multiply whole numbers, one row and many.

    Raises: BuildError, or RuntimeError where a product is wrong."""
    codes = (torch.arange(40 * 96).reshape(40, 96) * 7 % 16).to(torch.uint8)
    operands = Operands(codes, torch.full((40, 3), 0.5), torch.full((40, 3), 3.0))
    layer = NativeLinear(Problem(40, 96, 4, 32, False, None, "cpu", torch.float32), operands)
    expected = ((codes.float() - 3) * 0.5).T
    x = torch.eye(96)
    for rows in (1, 96):
        if not torch.equal(layer(x[:rows]), expected[:rows]):
            raise RuntimeError("the compiled kernels multiply wrongly on this machine")
    if not torch.equal(layer.codes(), codes):
        raise RuntimeError("the compiled kernels do not give the codes back")


WEIGHT_ONLY = Kernel(
    name=NAME,
    devices=("cpu",),
    dtypes=(torch.bfloat16, torch.float32),
    bits=(2, 3, 4, 5, 6, 7, 8),
    group_multiple=4,
    activations=(None,),
    asymmetric=True,
    probe=probe,
    prepare=NativeLinear,
    grids=("uniform", "offset", "table"),
)
W8A8 = Kernel(
    name=f"{NAME} W8A8",
    devices=("cpu",),
    dtypes=(torch.bfloat16, torch.float32),
    bits=(8,),
    group_multiple=None,
    activations=("token", "tensor", "dynamic_tensor", "dynamic_token", "outlier"),
    asymmetric=False,
    probe=probe,
    prepare=NativeLinear,
)

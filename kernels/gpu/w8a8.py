"""8-bit weights and 8-bit activations: sums of whole numbers, scaled at the end.

    y[m, n] = (sum_k (q[m, k] - zero[m]) * w[n, k]) * step[m] * scale[n] + bias[n]

Weights are symmetric with one step a row (or a tensor), w = code - 128. The input becomes int8 in a
pass of its own, a program for each row of x (`quantize_row`), in one of four ways:

    per token   q = round(x / step), step = max|x| / 127 of the row, found in the same pass
    per tensor  q = clamp(round(x / step) + zero, 0, 255) - 128, step and zero from calibration
    dynamic     as per tensor, but step and zero span [min(x, 0), max(x, 0)] of the whole input or
                of each row (`reference.dynamic_grid`)

with ties to even, the same float32 divisions as the reference makes, and so the same codes. Codes
and weights are padded with zeros to whole blocks of columns: no reading along them needs a mask,
and every row starts at a multiple of 16 bytes.

`multiply_codes` computes a tile of y.T on the tensor cores: ROWS outputs for TOKENS rows of x. The
zero-point comes in after the sum, sum_k (q - zero) w = sum_k q w - zero sum_k w, with the sums of
the weights' rows kept. Everything up to there is exact in int32.

Tested in Triton's interpreter, compiled for sm_80 and sm_90, never run on a GPU: nothing here has
been timed, and the sizes of the tiles are chosen by what fits into registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.base import ActivationKind, Operands, Problem
from kernels.gpu.launch import Launch, Tile, require_gpu, tile_of

BLOCK = 64
"""Columns that a program multiplies at a time."""
QUANTIZED = 1024
"""Values of a row that `quantize_row` handles at a time."""
LONGEST = 2**16
"""Columns up to which a sum of 255 * 128 a column fits into int32."""
TILES = (
    Tile(rows=64, tokens=16, warps=4, stages=3),
    Tile(rows=64, tokens=64, warps=4, stages=3),
    Tile(rows=128, tokens=128, warps=8, stages=3),
)


@triton.jit
def quantize_row(
    x: tl.tensor,
    codes: tl.tensor,
    steps: tl.tensor,
    zeros: tl.tensor,
    columns: int,
    width: int,
    stride: int,
    ABSMAX: tl.constexpr,
    QUANTIZED: tl.constexpr,
) -> None:
    """int8 codes of a row of x.

    x [tokens, columns]; codes [tokens, width]. ABSMAX finds the step of the row and writes it to
    steps [tokens]; else row m is quantized by steps[m * stride] and zeros[m * stride]."""
    m = tl.program_id(0).to(tl.int64)
    if ABSMAX:
        peaks = tl.full((QUANTIZED,), 0.0, tl.float32)
        for first in range(0, columns, QUANTIZED):
            k = first + tl.arange(0, QUANTIZED)
            value = tl.load(x + m * columns + k, mask=k < columns, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, tl.abs(value))
        step = tl.div_rn(tl.maximum(tl.max(peaks, 0), 1e-12), 127.0)
        tl.store(steps + m, step)
    else:
        step = tl.load(steps + m * stride)
        zero = tl.load(zeros + m * stride)
    for first in range(0, width, QUANTIZED):
        k = first + tl.arange(0, QUANTIZED)
        value = tl.load(x + m * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        # Beyond 512 any code is clamped, whatever the zero-point. In float32, 3 * 2**22 plus a
        # number has no room for a fraction, so the sum is rounded to whole ones, ties to even.
        scaled = tl.minimum(tl.maximum(tl.div_rn(value, step), -512.0), 512.0)
        rounded = (scaled + 12582912.0) - 12582912.0
        if not ABSMAX:
            rounded = tl.minimum(tl.maximum(rounded + zero, 0.0), 255.0) - 128.0
        tl.store(codes + m * width + k, rounded.to(tl.int8), mask=k < width)


@triton.jit
def multiply_codes(
    x: tl.tensor,
    weight: tl.tensor,
    steps: tl.tensor,
    zeros: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: int,
    rows: int,
    width: int,
    stride: int,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """ROWS outputs for TOKENS rows of codes.

    x int8 [tokens, width]; weight int8 [rows, width]; steps, zeros [tokens], read at m * stride
    (zeros None: no zero-points); scales float32 and sums int32 [rows]; out [tokens, rows]."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live, present = n < rows, m < tokens
    row, token = n.to(tl.int64), m.to(tl.int64)
    total = tl.full((ROWS, TOKENS), 0, tl.int32)
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)
        left = tl.load(weight + row[:, None] * width + k[None, :], mask=live[:, None], other=0)
        right = tl.load(x + token[None, :] * width + k[:, None], mask=present[None, :], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    if zeros is not None:
        zero = tl.load(zeros + m * stride, mask=present, other=0.0).to(tl.int32) - 128
        total -= tl.load(sums + n, mask=live, other=0)[:, None] * zero[None, :]
    step = tl.load(steps + m * stride, mask=present, other=0.0)
    y = total.to(tl.float32) * step[None, :] * tl.load(scales + n, mask=live, other=0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=live, other=0.0)[:, None]
    at = token[None, :] * rows + n[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live[:, None] & present[None, :])


class Int8Linear:
    """A prepared layer; see the head of this file and `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        if problem.columns > LONGEST:
            raise RuntimeError(f"{problem.columns} columns: sums could leave int32 from {LONGEST}")
        self.rows, self.columns = problem.rows, problem.columns
        self.kind = problem.activation
        signed = (operands.codes ^ 128).view(torch.int8)
        self.packed = torch.nn.functional.pad(signed, (0, -self.columns % BLOCK)).contiguous()
        self.scales = operands.scales[:, 0].float().expand(self.rows).contiguous()
        self.bias = None if operands.bias is None else operands.bias.float()
        self.kept = {"packed": self.packed, "scales": self.scales}
        if self.bias is not None:
            self.kept["bias"] = self.bias
        if self.kind != "token":
            self.kept["sums"] = signed.sum(1, dtype=torch.int32)
        if self.kind == "tensor":
            self.kept["step"] = self.scales.new_full((1,), operands.input_scale)
            self.kept["zero"] = self.scales.new_full((1,), float(operands.input_zero))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.rows)
        if x.shape[0]:
            for launch in self.launches(x, y):
                launch.run(x)
        return y

    def launches(self, x: Tensor, y: Tensor) -> list[Launch]:
        """The programs that bring x times the weights into y."""
        tokens, width = x.shape[0], self.packed.shape[1]
        steps, zeros, stride = self._grid(x)
        codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
        quantize = {
            "x": x,
            "codes": codes,
            "steps": steps,
            "zeros": zeros,
            "columns": self.columns,
            "width": width,
            "stride": stride,
            "ABSMAX": self.kind == "token",
            "QUANTIZED": QUANTIZED,
        }
        tile = tile_of(tokens, TILES)
        multiply = {
            "x": codes,
            "weight": self.packed,
            "steps": steps,
            "zeros": zeros,
            "scales": self.scales,
            "sums": self.kept.get("sums"),
            "bias": self.bias,
            "out": y,
            "tokens": tokens,
            "rows": self.rows,
            "width": width,
            "stride": stride,
            "BLOCK": BLOCK,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
        }
        grid = (-(-self.rows // tile.rows), -(-tokens // tile.tokens), 1)
        return [
            Launch(quantize_row, (tokens, 1, 1), quantize, 4, 1),
            Launch(multiply_codes, grid, multiply, tile.warps, tile.stages),
        ]

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """(steps, zero-points or None, distance between those of two rows: 1, or 0 for shared)."""
        if self.kind == "token":
            return self.scales.new_empty(x.shape[0]), None, 1
        if self.kind == "tensor":
            return self.kept["step"], self.kept["zero"], 0
        per_row = self.kind == "dynamic_token"
        step, zero = reference.dynamic_grid(x.float(), per_row)
        return step.view(-1), zero.view(-1), int(per_row)

    def codes(self) -> Tensor:
        return self.packed[:, : self.columns].contiguous().view(torch.uint8) ^ 128

    def tensors(self) -> dict[str, Tensor]:
        return self.kept


def probe(device: str = "cuda") -> None:
    """Whole numbers through every tile and both kinds of zero-points.

    Raises: RuntimeError where there is no such GPU or a product is wrong."""
    require_gpu(device)
    codes = (torch.arange(70 * 80, device=device).reshape(70, 80) * 37 % 255 + 1).to(torch.uint8)
    ones = torch.ones(70, 1, device=device)
    cases: tuple[tuple[ActivationKind, int], ...] = (("token", 0), ("tensor", 131))
    for kind, zero in cases:
        problem = Problem(70, 80, 8, 80, True, kind, device, torch.float32)
        layer = Int8Linear(problem, Operands(codes, ones, ones * 128, None, 1.0, zero))
        if not torch.equal(layer.codes(), codes):
            raise RuntimeError("the 8-bit codes do not come back")
        for tile in TILES:
            x = (torch.arange(tile.tokens * 80, device=device).reshape(-1, 80) * 11 % 120).float()
            x[:, -1] = 127  # the step of each row is 1 then; between 0 and 124 no code is clamped
            x = x - 3 if kind == "tensor" else x
            if not torch.equal(layer(x).double(), x.double() @ (codes.double() - 128).T):
                raise RuntimeError("Triton's int8 product is wrong on this machine")

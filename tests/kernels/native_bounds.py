"""Random weights for the native kernels, their exact products, and how far float32 may be off.

With u = 2^-24, a sum of n float32 products in any order is off by at most

    n u / (1 - n u) * sum |w| |x|                  (Higham 2002, section 3.1)

The kernels sum s (sum v x - z sum x), so |w| stands for s |v| + s |z| here: what cancels counts.
Rows on AMX tiles see x rounded to bfloat16 (8 significant bits), 2^-8 of every term, and so are
the weights, but for those that are bfloat16 already. Exact mode keeps two such parts of x, 2^-16,
and of weights that are not bfloat16 themselves (the second one truncated, 2^-15); the product of
both second parts is left out (2^-16).
Few rows in exact mode are rounded to whole multiples of a step, a power of two, in every block of
32 columns: half a step of every |w|. It brings the largest |x| to 32,512 at most.

int8 modes round x as `kernels.reference` does in float32, to the same codes: division and rounding
to even are the same everywhere. Then products are whole numbers, and what is rounded are the sums
over blocks of 32 columns (or pieces of 4, where groups are smaller) and groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import native, reference

U = 2.0**-24
TILE_FROM = 6
CODES_FROM = 16
"""Rows that are multiplied as bfloat16 together; codes without AMX. `cpu/linear.h`."""

ZERO_POINTS = ("middle", "whole", "fractional")


@dataclass(frozen=True)
class Case:
    """A packed weight and what it means. weight: float64 [rows, columns]; size: s |v| + s |z|."""

    matrix: native.Matrix
    codes: Tensor | None
    weight: Tensor
    size: Tensor
    group_size: int
    table: bool = False

    @property
    def whole_groups(self) -> bool:
        """Whether no group ends inside a block of 32 columns."""
        return self.group_size >= self.weight.shape[1] or self.group_size % 32 == 0

    @property
    def groups(self) -> int:
        return -(-self.weight.shape[1] // self.group_size)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(
    rows: int, columns: int, bits: int, group_size: int, *, zeros: str, wide: bool, seed: int
) -> Case:
    """Grids with zero-points in the middle, whole or fractional (some below 0, some above)."""
    generator = torch.Generator().manual_seed(seed)
    group_size = min(group_size or columns, columns)
    shape = (rows, -(-columns // group_size))
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(shape, generator=generator) * 0.02 + 1e-4
    scales = scales if wide else scales.half().float()
    zero = {
        "middle": torch.full(shape, 2.0 ** (bits - 1)),
        "whole": torch.randint(0, 2**bits, shape, generator=generator).float(),
        "fractional": (torch.rand(shape, generator=generator) * 1.5 - 0.25) * 2**bits,
    }[zeros]
    matrix = native.Matrix.affine(codes, scales, zero, bits, group_size)
    s, z = scales.double(), zero.double()
    weight = reference.dequantize(codes, s, z, group_size)
    size = reference.dequantize(codes, s, -z.abs(), group_size)
    return Case(matrix, codes, weight, size, group_size)


def table(rows: int, columns: int, group_size: int, *, wide: bool, seed: int) -> Case:
    """16 values that no bfloat16 holds, and a scale a group."""
    generator = torch.Generator().manual_seed(seed)
    group_size = min(group_size or columns, columns)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, -(-columns // group_size), generator=generator) * 0.02 + 1e-4
    scales = scales if wide else scales.half().float()
    values = torch.randn(16, generator=generator)
    matrix = native.Matrix.table(codes, scales, values, group_size)
    scale = scales.double().repeat_interleave(group_size, 1)[:, :columns]
    weight = values.double()[codes.long()] * scale
    return Case(matrix, codes, weight, weight.abs(), group_size, table=True)


def plain(rows: int, columns: int, *, seed: int) -> Case:
    weight = noise(rows, columns, seed=seed).to(torch.bfloat16)
    exact = weight.double()
    return Case(native.Matrix.plain(weight), None, exact, exact.abs(), columns)


def rounding(terms: int) -> float:
    return terms * U / (1 - terms * U)


def with_bias(y: Tensor, bound: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last sum is rounded once. Products below 2^-126 may be flushed to zero."""
    if bias is not None:
        y = y + bias.double()
    return y, bound + 2 * U * y.abs() + 1e-30


def floats(
    case: Case, x: Tensor, bias: Tensor | None, *, tiles: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """(product, bound) where x enters as float32, or on tiles as one or two bfloat16 parts."""
    x, columns = x.double(), x.shape[1]
    terms = columns + case.groups + 8
    bound = rounding(terms) * (x.abs() @ case.size.T)
    if tiles and not exact:
        parts = 2.0**-8 if case.codes is None else 2 * 2.0**-8 + 2.0**-16
        bound = bound + parts * (x.abs() @ case.weight.abs().T)
    elif tiles:
        parts = 2.0**-16 if case.codes is None else 4 * 2.0**-16
        bound = bound + 1.01 * parts * (x.abs() @ case.weight.abs().T)
    elif not tiles and case.whole_groups and not case.table and case.codes is not None:
        half_step = half_steps(x)
        bound = bound * (1 + 2.0**-14) + half_step @ case.weight.abs().T
    return with_bias(x @ case.weight.T, bound, bias)


def half_steps(x: Tensor) -> Tensor:
    """Half of the step that exact mode rounds each number of x, float64 [rows, columns], with."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    exponent = torch.ceil(torch.log2(blocks.abs().amax(2).clamp_min(2.0**-100) / (127 * 256)))
    return (2.0 ** (exponent - 1)).repeat_interleave(32, 1)[:, : x.shape[1]]


def codes_of(x: Tensor, how: native.How) -> tuple[Tensor, Tensor, Tensor | float]:
    """(rounded x, magnitude that the kernel sums, columns summed apart) of the int8 modes."""
    rows, columns = x.shape
    if how.mode == native.INT8_BLOCK:
        blocks = torch.nn.functional.pad(x, (0, -columns % 32)).view(-1, 32)
        codes, steps = reference.quantize_rows(blocks)
        rounded = (codes.double() * steps.double()).view(rows, -1)[:, :columns]
        return rounded, rounded.abs(), 0
    if how.mode == native.INT8_OUTLIERS:
        codes, steps, outliers = reference.split_outliers(x, how.threshold)
        rounded = codes.double() * steps.double()
        rounded[:, outliers] = x[:, outliers].double()
        return rounded, rounded.abs(), len(outliers)
    if how.mode == native.INT8_ROW:
        codes, steps = reference.quantize_rows(x)
        rounded = codes.double() * steps.double()
        return rounded, rounded.abs(), 0
    if how.mode == native.INT8_GIVEN:
        zero: Tensor = torch.tensor(how.zero)
        step = torch.tensor(how.step)
        codes = reference.quantize_tensor(x, how.step, int(how.zero)) - zero
    else:
        per_row = how.mode == native.INT8_RANGE_ROW
        step, zero = reference.dynamic_grid(x, per_row)
        codes, step = reference.quantize_dynamic(x, per_row)
    # The kernel keeps codes - 128 in a signed byte and adds 128 - zero apart.
    shift = 128 - zero
    size = ((codes - shift).abs() + shift.abs()).double() * step.double()
    return codes.double() * step.double(), size, 0


def integers(case: Case, x: Tensor, bias: Tensor | None, how: native.How) -> tuple[Tensor, Tensor]:
    """(product, bound) where x is rounded to int8 codes and sums of whole numbers are exact."""
    rounded, size, apart = codes_of(x, how)
    pieces = -(-x.shape[1] // (32 if case.whole_groups else 4))
    terms = pieces + case.groups + int(apart) + 12
    return with_bias(rounded @ case.weight.T, rounding(terms) * (size @ case.size.T), bias)


def expected(
    case: Case, x: Tensor, bias: Tensor | None, how: native.How, level: str
) -> tuple[Tensor, Tensor]:
    """(product, bound) of the mode that runs: bfloat16 weights and tables take no int8 blocks, and
    many rows are bfloat16 instead where the CPU multiplies it."""
    amx, bfloat16 = level == "amx", level in ("amx", "avx512bf16")
    exact = how.mode == native.EXACT
    enough = TILE_FROM if amx or case.codes is None else CODES_FROM
    tiles = (amx or (bfloat16 and not exact)) and x.shape[0] >= enough
    only_floats = case.codes is None or case.table
    if exact or how.mode == native.BF16 or (how.mode == native.INT8_BLOCK and only_floats):
        return floats(case, x, bias, tiles=tiles, exact=exact)
    if how.mode == native.INT8_BLOCK and amx and tiles:
        return floats(case, x, bias, tiles=tiles, exact=False)
    return integers(case, x, bias, how)

"""The inner loops of quantizing in C++ (`cpu/solve.cpp`), where there is a native library.

Each function returns whether it ran; where it did not, the caller's own torch code does the same.
All tensors are float32, contiguous and on the CPU.
"""

from __future__ import annotations

from ctypes import c_float, c_int64

import torch
from torch import Tensor

from kernels import build, native


def ready(*tensors: Tensor | None) -> bool:
    """Whether there is a native library, and the tensors are such as it reads."""
    if any(
        t is not None and (t.device.type != "cpu" or t.dtype != torch.float32 or t.requires_grad)
        for t in tensors
    ):
        return False
    try:
        native.native()
    except build.BuildError:
        return False
    return True


def multiplies_bfloat16() -> bool:
    """Whether `add_moment` runs here: a native library for AMX or AVX512-BF16."""
    return ready() and native.native().level.multiplies_bfloat16


def add_moment(total: Tensor, y: Tensor, x: Tensor, triangle: bool) -> None:
    """total += y^T x, with `triangle` (y is x) right of the diagonal at least.

    total: float32 [columns, columns]; y, x: bfloat16 [tokens, columns]; products are exact, sums in
    float32. All contiguous. Ask `multiplies_bfloat16` first.
    """
    sizes = map(c_int64, (*x.shape, int(triangle)))
    native.native()("ql_add_moment", total, y, x, *sizes)


def mirror(matrix: Tensor) -> None:
    """What stands right of the diagonal of a square matrix, also left of it. Ask `ready` first."""
    native.native()("ql_mirror", matrix, c_int64(len(matrix)))


def turn(weight: Tensor, places: Tensor) -> Tensor:
    """Column c of the weight [rows, columns] becomes row places[c]: float32 [columns, rows].

    places: a permutation, int64. Ask `ready` first.
    """
    turned = torch.empty(weight.shape[1], weight.shape[0])
    native.native()("ql_turn", weight, places, *map(c_int64, weight.shape), turned)
    return turned


def turn_back(work: Tensor, places: Tensor, grids: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Row places[c] of work [columns, rows] becomes column c: float32 [rows, columns].

    With `grids`, which are offsets [groups, rows] and the group (int64) of each row of work, less
    the offsets of its group. Ask `ready` first.
    """
    columns, rows = work.shape
    turned = torch.empty(rows, columns)
    offsets, groups = grids or (None, None)
    sizes = map(c_int64, (rows, columns))
    native.native()("ql_turn_back", work, places, offsets, groups, *sizes, turned)
    return turned


def compensate(
    work: Tensor,
    step: Tensor,
    bottom: Tensor,
    group_of: Tensor,
    levels: int,
    whole: Tensor,
    errors: Tensor,
    pull: Tensor,
    debt: Tensor | None,
    columns: slice,
) -> None:
    """Round the `columns` of work [columns, rows] in order, each after what it owes for those
    before it: `quantlab.compensation` says how. pull and debt [columns, columns] are transposed.

    work, whole (code - zero) and errors [columns, rows] are written; step and bottom: [groups,
    rows], of which column j has those of group_of[j] (int64). Ask `ready` first.
    """
    count, rows = work.shape
    sizes = map(c_int64, (rows, count, columns.start, columns.stop))
    grids = (step, bottom, group_of, c_float(levels))
    native.native()("ql_compensate", work, *grids, whole, errors, pull, debt, *sizes)


DROPPED = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Last bits of float32 that a type of steps lacks."""


def best_grids(
    weight: Tensor,
    moments: Tensor | None,
    fractions: Tensor,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(scale, zero), float32 [rows, groups]: of the grids that span a group's range times one of
    the fractions, that with the least e M_g e^T, e = q(w) - w; of equals the first.

    weight: [rows, groups, size]; moments: [groups, size, size], None for M = 1; fractions: [tries];
    dtype, to which steps are rounded: a key of `DROPPED`. Ask `ready` first.
    """
    rows, groups, size = weight.shape
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    limits = torch.finfo(dtype)
    native.native()(
        "ql_best_grids",
        *(weight, *map(c_int64, (rows, groups * size, groups, size)), moments),
        *(fractions, c_int64(len(fractions)), c_float(2**bits - 1), c_int64(symmetric)),
        *(c_int64(DROPPED[dtype]), c_float(limits.tiny), c_float(limits.max), scale, zero),
    )
    return scale, zero


def group_products(
    weight: Tensor, codes: Tensor, zero: Tensor, moment: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """(v_g M v_h^T, v_g M w^T) of every row: float32 [rows, groups, groups] and [rows, groups],
    where v_g is `codes - zero` inside group g and 0 elsewhere.

    weight, codes [rows, columns]; zero [rows, groups]; moment: M [columns, columns], symmetric.
    `codes - zero` are whole numbers up to 256. Ask `multiplies_bfloat16` first.
    """
    rows, columns = weight.shape
    groups = zero.shape[1]
    system, right = torch.empty(rows, groups, groups), torch.empty(rows, groups)
    sizes = map(c_int64, (rows, columns, group_size))
    native.native()("ql_group_products", weight, codes, zero, moment, *sizes, system, right)
    return system, right


def scaled_error(
    weight: Tensor, scale: Tensor, group_size: int, bits: int, symmetric: bool
) -> Tensor:
    """(Q(W s) - W s) / s, float32 [rows, columns], with an unclipped grid for every group of a row.

    weight: [rows, columns]; scale: [columns]. Ask `ready` first.
    """
    rows, columns = weight.shape
    out = torch.empty_like(weight)
    sizes = (rows, columns, group_size, 2**bits - 1, int(symmetric))
    native.native()("ql_scaled_error", weight, scale, *map(c_int64, sizes), out)
    return out

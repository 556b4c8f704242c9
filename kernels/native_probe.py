"""What this machine can do at best, and the kernels at work without Python between them.

Everything runs on as many threads as torch uses (`native.native`). Raises: BuildError.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import native

INT8, BF16 = range(2)
"""Kinds of `peak`; where nothing multiplies bfloat16, BF16 is float32."""

ROUNDS = 100_000
"""Of the loop of `peak`: some milliseconds on tiles, some tens of them without."""


def read_bandwidth(data: Tensor) -> float:
    """Bytes a second at which all of `data` (uint8, whole megabytes of it) is read once."""
    threads = native.native()
    probe = threads.library.ql_read_bandwidth
    probe.restype, probe.argtypes = c_double, [c_void_p, c_int64, c_void_p]
    return float(probe(data.data_ptr(), data.numel(), threads.pool))


def peak(kind: int) -> float:
    """Operations a second, two a multiply-add, of a loop that does nothing else."""
    threads = native.native()
    probe = threads.library.ql_peak
    probe.restype, probe.argtypes = c_double, [c_int, c_int64, c_void_p]
    return float(probe(kind, ROUNDS, threads.pool))


def multiply_each(
    matrices: Sequence[native.Matrix],
    x: Tensor,
    y: Tensor,
    how: native.How,
    joined: Sequence[bool] | None = None,
) -> None:
    """Multiply x by every matrix in turn, in one native call.

    x, y: float32 [m, columns or rows of the widest matrix], contiguous; a narrower matrix reads
    [m, columns] from the start of the same memory, and its product overwrites the one before.
    joined: which matrices read the input of the one before, which is then prepared once; they have
    equal columns, bits and groups. None: each prepares its own."""
    widest = max(matrix.columns for matrix in matrices), max(matrix.rows for matrix in matrices)
    if x.shape[1] < widest[0] or y.shape != (x.shape[0], widest[1]):
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} are too narrow for {widest}")
    flags = bytes(joined or len(matrices))
    if flags[0] or len(flags) != len(matrices):
        raise ValueError(f"joined: {len(matrices)} flags, the first one False")
    for i, (before, matrix) in enumerate(itertools.pairwise(matrices), 1):
        if flags[i] and _form(before) != _form(matrix):
            raise ValueError(f"matrix {i} cannot share the input of the one before it")
    threads = native.native()
    run = threads.library.ql_pass
    run.restype = None
    run.argtypes = [c_void_p, c_char_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 3]
    records = (c_void_p * len(matrices))(*(ctypes.addressof(m.record) for m in matrices))
    run(
        *(records, flags, len(matrices), x.data_ptr(), x.shape[0], y.data_ptr()),
        *(ctypes.byref(how), threads.pool),
    )


def _form(matrix: native.Matrix) -> tuple[int, ...]:
    """What decides how an input is prepared for a matrix."""
    record = matrix.record
    return (matrix.columns, matrix.bits, record.group, record.zero, bool(record.table))


def room(rows: int, columns: int) -> Tensor:
    """float32 [rows, columns] on such pages as the engine has its own buffers on, nothing in it."""
    made = torch.empty(rows, columns)
    native.native().library.ql_prefer_huge_pages(c_void_p(made.data_ptr()), c_int64(made.nbytes))
    return made


def bytes_like(data: Tensor) -> Tensor:
    """A copy of uint8 `data` on pages of its own, large ones where the system has them, as packed
    weights are."""
    made = native.own_pages(data.numel()).view(data.shape)
    native.native().library.ql_prefer_huge_pages(c_void_p(made.data_ptr()), c_int64(made.nbytes))
    return made.copy_(data)


def mode_for(how: native.How, rows: int, bits: int) -> int:
    """The mode (`native.EXACT` and the others) that really runs for so many rows."""
    return int(native.native().library.ql_mode_for(how.mode, rows, 0, bits))


def copy_of(matrix: native.Matrix) -> native.Matrix:
    """The same weight in memory of its own."""
    tensors = {name: tensor.clone() for name, tensor in matrix.tensors.items()}
    codes = tensors["codes"]
    tensors["codes"] = bytes_like(codes.view(torch.uint8)).view(codes.dtype).view(codes.shape)
    made = native.Matrix(matrix.rows, matrix.columns, matrix.bits, tensors)
    for name in ("group", "wide_scales", "zero"):
        setattr(made.record, name, getattr(matrix.record, name))
    return made


def random_matrix(rows: int, columns: int, bits: int, group_size: int) -> native.Matrix:
    """Random codes with zero-points (8 bits in whole rows: absmax); 16 bits are bfloat16."""
    generator = torch.Generator().manual_seed(0)
    if bits == 16:
        return native.Matrix.plain(torch.randn(rows, columns, generator=generator) / columns**0.5)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // group_size)
    scales = torch.rand(rows, groups, generator=generator).add(0.5).div(2**bits * 50).half().float()
    zeros = torch.randint(2**bits, (rows, groups), generator=generator).float()
    if group_size >= columns:
        zeros.fill_(2.0 ** (bits - 1))
    return native.Matrix.affine(codes, scales, zeros, bits, group_size)

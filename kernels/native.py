"""The C ABI of `cpu/api.cpp` in ctypes, and weights in its layout (see `cpu/matrix.h`)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kernels import build

EXACT, INT8_BLOCK, INT8_ROW, INT8_GIVEN, BF16, INT8_RANGE_ROW, INT8_RANGE, INT8_OUTLIERS = range(8)
"""How the input enters the product; `cpu/input.h`."""

MIDDLE, BYTE, OFFSET = range(3)
"""Where zero-points come from; `cpu/matrix.h`."""

LANES, COLUMN_PAD = 16, 64


HUGE_PAGE = 2**21


def own_pages(size: int) -> Tensor:
    """Memory for packed weights, uint8 [size]. From 2 MB on it is the system's own, not the heap's:
    what is packed there asks for large pages (`cpu/memory.h`), of which the heap would keep parts,
    and every byte that came to lie in one would fill 2 MB."""
    if size < HUGE_PAGE or not sys.platform.startswith("linux"):
        return torch.empty(size, dtype=torch.uint8)
    taken = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = torch.frombuffer(taken, dtype=torch.uint8)
    first = -pages.data_ptr() % HUGE_PAGE
    return pages[first : first + size]


class MatrixRecord(Structure):
    """`Matrix` of cpu/matrix.h."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "columns", "bits", "group", "wide_scales", "zero")),
        *((name, c_void_p) for name in ("codes", "scales", "zeros", "table", "sums")),
    )


class How(Structure):
    """`How` of cpu/input.h: the mode, a given step and zero-point, the least outlier."""

    _fields_ = (
        ("mode", c_int32),
        *((name, c_float) for name in ("step", "zero", "threshold")),
    )


class LinearRecord(Structure):
    """`Linear` of cpu/decoder.h."""

    _fields_ = (("w", POINTER(MatrixRecord)), ("bias", c_void_p), ("how", How))


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention_norm", "ffn_norm", "after_attention_norm", "after_ffn_norm", "q_norm", "k_norm")


class LayerRecord(Structure):
    """`Layer` of cpu/decoder.h."""

    _fields_ = (
        *((name, LinearRecord) for name in LINEARS),
        *((name, c_void_p) for name in (*NORMS, "cosine", "sine")),
        ("window", c_int32),
    )


SIZES = ("layer_count", "width", "heads", "kv_heads", "head_dim", "rotary", "ffn", "vocabulary")
SCALARS = ("eps", "attention_scale", "attention_cap", "logit_cap", "embedding_scale")


class ModelRecord(Structure):
    """`Model` of cpu/decoder.h."""

    _fields_ = (
        ("layers", POINTER(LayerRecord)),
        *((name, c_int32) for name in (*SIZES, "gelu", "capacity")),
        *((name, c_float) for name in SCALARS),
        ("embedding", POINTER(MatrixRecord)),
        ("head", LinearRecord),
        *((name, c_void_p) for name in ("final_norm", "keys", "values")),
    )


class Native:
    """The library of a level and its threads, which serve one call at a time: others wait."""

    def __init__(self, threads: int, level: build.Level) -> None:
        self.library, self.level, self.threads = build.library(level), level, threads
        self._one_at_a_time = threading.Lock()
        self.library.ql_pool_new.restype = c_void_p
        self.library.ql_linear.argtypes = [
            *(c_void_p, c_void_p, c_int64),
            *(c_void_p,) * 4,
        ]
        self.pool = c_void_p(self.library.ql_pool_new(threads))

    def __call__(self, name: str, *arguments: Any) -> int:
        """Call a function of the library; tensors are passed by address, the pool comes last."""
        values = [
            c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in (*arguments, self.pool)
        ]
        with self._one_at_a_time:  # ctypes lets other Python threads run meanwhile
            result: int = getattr(self.library, name)(*values)
        return result


_native = functools.cache(Native)


def native() -> Native:
    """The library of the chosen level with as many threads as torch uses now.

    Raises: BuildError."""
    return _native(torch.get_num_threads(), build.chosen())


def side_by_side(grids: Tensor) -> Tensor:
    """[rows, groups] -> [rows / 16, groups, 16], the last rows padded with zeros."""
    padded = torch.nn.functional.pad(grids, (0, 0, 0, -grids.shape[0] % LANES))
    return padded.view(-1, LANES, grids.shape[1]).transpose(1, 2).contiguous()


def padded_columns(columns: int) -> int:
    return -(-columns // COLUMN_PAD) * COLUMN_PAD


class Matrix:
    """A weight [rows, columns] in the native layout; `record` is what C++ reads.

    `tensors` are the only memory it has, by name.
    """

    def __init__(self, rows: int, columns: int, bits: int, tensors: dict[str, Tensor]) -> None:
        self.rows, self.columns, self.bits, self.tensors = rows, columns, bits, tensors
        self.record = MatrixRecord(rows=rows, columns=columns, bits=bits, group=columns)
        for name in ("codes", "scales", "zeros", "table", "sums"):
            if name in tensors:
                setattr(self.record, name, tensors[name].data_ptr())

    @classmethod
    def affine(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
    ) -> Matrix:
        """w = (code - zero) * scale. codes: uint8 [rows, columns]; scales, zeros: float32 [rows or
        1, groups]. Zero-points that are no whole numbers from 0 to 255 become offsets.
        """
        rows = codes.shape[0]
        scales, zeros = (t.float().expand(rows, -1) for t in (scales, zeros))
        whole = bool(((zeros >= 0) & (zeros <= 255) & (zeros == zeros.round())).all())
        if not whole:
            return cls.offset(codes, scales, -zeros * scales, bits, group_size)
        made = cls._packed(codes, scales, bits, group_size)
        if not bool((zeros == 2 ** (bits - 1)).all()):
            made.tensors["zeros"] = side_by_side(zeros.to(torch.uint8))
            made.record.zeros, made.record.zero = made.tensors["zeros"].data_ptr(), BYTE
        return made

    @classmethod
    def offset(
        cls, codes: Tensor, scales: Tensor, offsets: Tensor, bits: int, group_size: int
    ) -> Matrix:
        """w = code * scale + offset, as ggml's types with a minimum; arguments as in `affine`."""
        half = offsets.half()
        made = cls._packed(codes, scales, bits, group_size, not torch.equal(half.float(), offsets))
        made.tensors["zeros"] = side_by_side(offsets.float() if made.record.wide_scales else half)
        made.record.zeros, made.record.zero = made.tensors["zeros"].data_ptr(), OFFSET
        return made

    @classmethod
    def table(cls, codes: Tensor, scales: Tensor, values: Tensor, group_size: int) -> Matrix:
        """w = values[code] * scale; codes of 4 bits, values float32 [16]."""
        made = cls._packed(codes, scales, 4, group_size)
        made.tensors["table"] = values.float().contiguous()
        made.record.table = made.tensors["table"].data_ptr()
        return made

    @classmethod
    def plain(cls, weight: Tensor) -> Matrix:
        """bfloat16 weights as they are; weight: any float [rows, columns]."""
        rows, columns = weight.shape
        source = weight.detach().to(torch.bfloat16).contiguous()
        padded = -(-rows // LANES) * LANES, padded_columns(columns)
        codes = own_pages(2 * padded[0] * padded[1]).view(torch.bfloat16).view(padded)
        native()("ql_pack_bf16", source, rows, columns, codes)
        return cls(rows, columns, 16, {"codes": codes})

    @classmethod
    def _packed(
        cls, codes: Tensor, scales: Tensor, bits: int, group_size: int, wide: bool = False
    ) -> Matrix:
        rows, columns = codes.shape
        blocks = -(-rows // LANES)
        planes = own_pages(blocks * padded_columns(columns) // 8 * bits * LANES).view(blocks, -1)
        native()("ql_pack", codes.contiguous(), rows, columns, bits, planes)
        scales = scales.float().expand(rows, -1)
        half = scales.half()
        wide = wide or not torch.equal(half.float(), scales)
        sums = codes.sum(1, dtype=torch.int32) - columns * 2 ** (bits - 1)
        tensors = {
            "codes": planes,
            "scales": side_by_side(scales if wide else half),
            "sums": torch.nn.functional.pad(sums, (0, -rows % LANES)),
        }
        made = cls(rows, columns, bits, tensors)
        made.record.group = min(group_size, columns)
        made.record.wide_scales = int(wide)
        return made

    def codes(self) -> Tensor:
        """The exact codes, uint8 [rows, columns]."""
        codes = torch.empty(self.rows, self.columns, dtype=torch.uint8)
        native()("ql_unpack", self.tensors["codes"], self.rows, self.columns, self.bits, codes)
        return codes

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def linear(self, x: Tensor, how: How, bias: Tensor | None = None) -> Tensor:
        """y = x w^T + bias, float32 [m, rows] from float32 [m, columns]; bias: float32 [rows]."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.rows)
        native()(
            *("ql_linear", ctypes.byref(self.record), x, x.shape[0], y),
            *(ctypes.byref(how), bias),
        )
        return y

"""4-bit codes into a fixed codebook of 16 values: NF4 and FP4, in the bytes of bitsandbytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.codebook import (
    CODEBOOKS,
    NESTED_BLOCK,
    CodebookName,
    codebook,
    decode_absmax,
    decode_pairs,
    encode,
    encode_absmax,
)
from quantlab.errors import ConfigError
from quantlab.packing.base import bits_per_weight


@dataclass(frozen=True)
class CodebookWeight:
    """w = codebook[code] * absmax[block], blocks of `block_size` along the row-major weight.

    codes: uint8 [ceil(rows * columns / 2)], two codes a byte, the first one in the high half;
    absmax: float32 [blocks], or their 8-bit codes (uint8) where double quantization adds
    `nested_absmax` (float32, one for every 256 of them) and `offset` (float32 scalar, their mean):
    see `quantlab.codebook`. Both codebooks are constants of the format: they take no space here.
    """

    codes: Tensor
    absmax: Tensor
    codebook: CodebookName
    block_size: int
    rows: int
    columns: int
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ConfigError(f"codebook {self.codebook!r}: choose one of {', '.join(CODEBOOKS)}")
        if self.block_size < 2 or self.block_size % 2:
            raise ConfigError(f"block_size={self.block_size}: expected an even number")
        count = self.rows * self.columns
        blocks = math.ceil(count / self.block_size)
        _expect("codes", self.codes, torch.uint8, (math.ceil(count / 2),))
        if self.nested_absmax is None or self.offset is None:
            if self.nested_absmax is not None or self.offset is not None:
                raise ConfigError("double quantization: expected both nested_absmax and offset")
            _expect("absmax", self.absmax, torch.float32, (blocks,))
        else:
            _expect("absmax", self.absmax, torch.uint8, (blocks,))
            nested = (math.ceil(blocks / NESTED_BLOCK),)
            _expect("nested_absmax", self.nested_absmax, torch.float32, nested)
            _expect("offset", self.offset, torch.float32, ())

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def block_absmax(self) -> Tensor:
        """The blocks' largest magnitudes as they are used: float32 [blocks]."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return decode_absmax(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self) -> Tensor:
        return self.dequantize_rows(0, self.rows)

    def dequantize_rows(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1, float32. Blocks run across rows: whole ones are decoded."""
        start, stop = first * self.columns, last * self.columns
        low, high = start // self.block_size, math.ceil(stop / self.block_size)
        begin = low * self.block_size
        packed = self.codes[begin // 2 : high * self.block_size // 2]
        absmax, values = self.block_absmax()[low:high], codebook(self.codebook)
        stream = decode_pairs(packed, absmax, values, self.block_size)
        return stream[start - begin : stop - begin].view(last - first, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes, "absmax": self.absmax}
        if self.nested_absmax is not None and self.offset is not None:
            tensors |= {"nested_absmax": self.nested_absmax, "offset": self.offset}
        return tensors


def codebook_weight(
    weight: Tensor, name: CodebookName, block_size: int, *, double_quant: bool
) -> CodebookWeight:
    """Quantize a weight (float [rows, columns]) to the nearest entries of a codebook."""
    rows, columns = weight.shape
    codes, absmax = encode(weight.float().reshape(-1), codebook(name), block_size)
    packed = pack_pairs(codes)
    if not double_quant:
        return CodebookWeight(packed, absmax, name, block_size, rows, columns)
    coded, nested, offset = encode_absmax(absmax)
    return CodebookWeight(packed, coded, name, block_size, rows, columns, nested, offset)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 of any shape, two a byte in row-major order, the first one high."""
    flat = codes.reshape(-1)
    pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        kind = str(dtype).removeprefix("torch.")
        found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise ConfigError(f"{name} is {found}: expected {kind} {shape}")

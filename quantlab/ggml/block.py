"""What a ggml block format is, and the byte arithmetic that the formats share.

A ggml tensor row is a run of equal blocks; a block holds a fixed number of weights (32, or 256 for
the K formats) as integer codes with one or two float16 factors. The layouts are those of
`ggml-common.h` and `ggml-quants.c` in llama.cpp. Bytes are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_MAX = 65504.0
"""Largest finite float16. Factors beyond it are clamped, so no block ever decodes to inf or NaN."""

_INPUT_MAX = float(2**30)
# Above the largest value that any format here can hold (q6_k: 65504 * 127 * 32), so clamping to it
# changes no representable weight and keeps the squares inside the searches finite.


@dataclass(frozen=True)
class Grids:
    """What the bytes of blocks spell: x = scale * (values[code] - zero) + offset.

    codes: uint8 `[n, block_size]`; scales: float32 `[n, groups]`, each for as many neighbouring
    weights; offsets: the same, or None for 0; table: the values of the codes, or None where a code
    is its own value.
    """

    codes: Tensor
    scales: Tensor
    zero: int = 0
    offsets: Tensor | None = None
    table: tuple[int, ...] | None = None

    def values(self) -> Tensor:
        """x, float32 `[n, block_size]`."""
        count, groups = self.scales.shape
        codes = self.codes.view(count, groups, -1)
        if self.table is None:
            q = codes.to(torch.float32)
        else:
            table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
            q = table[codes.to(torch.int32)]
        if self.zero:
            q -= self.zero
        q *= self.scales.unsqueeze(2)
        if self.offsets is not None:
            q += self.offsets.unsqueeze(2)
        return q.view(count, -1)


QuantizeBlocks = Callable[[Tensor, Tensor | None], Tensor]
DequantizeBlocks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a format keeps its codes: the bytes from `first` to `end` - 1 of a block, and nothing
    else there. `read(data)` is what uint8 `[n, block_bytes]` spells; `pack(codes)` makes the codes'
    bytes, uint8 `[n, end - first]` from `[n, block_size]`."""

    first: int
    end: int
    read: Callable[[Tensor], Grids]
    pack: Callable[[Tensor], Tensor]

    def factors(self, data: Tensor) -> Tensor:
        """The bytes of blocks that are no codes, uint8 `[n, block_bytes - end + first]`."""
        return torch.cat((data[:, : self.first], data[:, self.end :]), 1)

    def join(self, factors: Tensor, codes: Tensor) -> Tensor:
        """The bytes of blocks from `factors` and their codes."""
        head, tail = factors[:, : self.first], factors[:, self.first :]
        return torch.cat((head, self.pack(codes), tail), 1)


@dataclass(frozen=True)
class BlockFormat:
    """One ggml block format.

    `quantize(blocks, importance)` takes float32 `[n, block_size]` and, optionally, the weight of
    each squared error, float32 `[n, block_size]`; it returns uint8 `[n, block_bytes]`.
    `dequantize(data)` takes uint8 `[n, block_bytes]` and returns float32 `[n, block_size]`.
    `layout` says how the bytes are made up, None for formats without codes.

    `row_weighted`: llama.cpp multiplies the importance of this format by
    `sqrt(mean(row ** 2) + x ** 2)` with the mean over the whole row, which a block alone cannot
    know; `quantize_rows` does it, a caller of `quantize` passes final error weights.
    """

    name: str
    type_id: int
    """The number of this type in GGUF files (`ggml_type`)."""
    block_size: int
    """Weights a block."""
    block_bytes: int
    """Bytes a block."""
    quantize: QuantizeBlocks
    dequantize: DequantizeBlocks
    bits: int
    """Nominal bits a weight, without the factors."""
    row_weighted: bool = False
    layout: Layout | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, factors included."""
        return 8.0 * self.block_bytes / self.block_size


def round_to_half(values: Tensor) -> Tensor:
    """Round float32 to the nearest float16, clamped to the finite range; returned as float32."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def half_to_bytes(values: Tensor) -> Tensor:
    """float32 `[n]` to the bytes of the nearest finite float16, uint8 `[n, 2]`."""
    half = values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
    return half.contiguous().view(torch.uint8).view(-1, 2)


def bytes_to_half(data: Tensor) -> Tensor:
    """uint8 `[n, 2]` to the float16 it spells, as float32 `[n, 1]`."""
    return data.contiguous().view(torch.float16).to(torch.float32)


def safe_reciprocal(values: Tensor) -> Tensor:
    """1 / values, with 0 where the quotient is not finite (zeros and the smallest subnormals)."""
    inverse = values.reciprocal()
    return inverse.where(inverse.isfinite(), torch.zeros_like(inverse))


def divide_constant(constant: float, values: Tensor) -> Tensor:
    """constant / values, correctly rounded.

    `constant / tensor` in Python multiplies with a rounded reciprocal, which is off by a bit.
    """
    return torch.div(torch.tensor(constant, dtype=values.dtype, device=values.device), values)


def clamp_input(values: Tensor) -> Tensor:
    """Values within +-2**30, beyond which no format reaches."""
    return values.clamp(-_INPUT_MAX, _INPUT_MAX)


def exact_sqrt(values: Tensor) -> Tensor:
    """Correctly rounded float32 square root, as C's sqrtf.

    torch's own is a vector-library routine that is off by a bit now and then.
    """
    return values.to(torch.float64).sqrt_().to(torch.float32)


def to_columns(values: Tensor, size: int) -> Tensor:
    """Cut blocks into sub-blocks and lay one sub-block a column.

    float32 `[n, k * size]` to `[size, n * k]`: element-wise work and sums over dimension 0 then run
    along contiguous memory.
    """
    return values.reshape(-1, size).t().contiguous()


def input_columns(blocks: Tensor, size: int) -> Tensor:
    """`to_columns` of the weights themselves, kept within +-2**30."""
    return to_columns(clamp_input(blocks), size)


def from_columns(codes: Tensor, block_size: int) -> Tensor:
    """Undo `to_columns` for integer-valued codes: float `[size, m]` to uint8 `[n, block_size]`."""
    return codes.to(torch.uint8).t().contiguous().view(-1, block_size)


def signed_extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude in each column, its sign kept; the first one in a tie.

    Args: x float32 `[size, m]`. Returns float32 `[m]`.
    """
    return _signed_extreme(x, 0)


def signed_extreme_of_rows(x: Tensor) -> Tensor:
    """The same in each row: x float32 `[m, size]` to `[m]`."""
    return _signed_extreme(x, 1)


def _signed_extreme(x: Tensor, dim: int) -> Tensor:
    low, high = x.amin(dim), x.amax(dim)
    extreme = torch.where(high >= -low, high, low)
    tie = ((high == -low) & (high != 0)).nonzero().squeeze(1)
    if tie.numel():
        # +a and -a in one block (common with bfloat16 weights): ggml keeps whichever comes first.
        tied = x.index_select(1 - dim, tie)
        first = tied.abs().argmax(dim, keepdim=True)
        extreme[tie] = tied.gather(dim, first).squeeze(dim)
    return extreme


def pack_fields(codes: Tensor, width: int) -> Tensor:
    """Lay several small codes side by side in a byte.

    Args: codes uint8 `[n, groups, k]`, each below `2 ** width`; width in bits.
    Returns: uint8 `[n, k]`, group g in the bits from `g * width`.
    """
    if codes.shape[2] % 8 == 0:
        # Eight bytes at a time: no code reaches into its neighbour's byte.
        return _pack_fields(codes.contiguous().view(torch.int64), width).view(torch.uint8)
    return _pack_fields(codes, width)


def _pack_fields(codes: Tensor, width: int) -> Tensor:
    packed = codes[:, 0].clone()
    for group in range(1, codes.shape[1]):
        packed |= codes[:, group] << (group * width)
    return packed


def unpack_fields(data: Tensor, width: int, groups: int) -> Tensor:
    """Undo `pack_fields`: uint8 `[n, k]` to uint8 `[n, groups, k]`."""
    shifts = torch.arange(groups, dtype=torch.uint8, device=data.device) * width
    return (data.unsqueeze(1) >> shifts.view(1, -1, 1)) & ((1 << width) - 1)


def pack_halves(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 `[n, 32]`, to `[n, 16]`: byte l holds codes l and (upper) l + 16."""
    return pack_fields(codes.view(-1, 2, 16), 4)


def unpack_halves(data: Tensor) -> Tensor:
    """Undo `pack_halves`: uint8 `[n, 16]` to `[n, 32]`."""
    return unpack_fields(data, 4, 2).reshape(-1, 32)


def join_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the fields of a block: uint8 `[n, a]`, `[n, b]`, ... to `[n, a + b + ...]`."""
    return torch.cat(list(parts), dim=1)

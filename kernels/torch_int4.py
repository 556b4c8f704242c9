"""4-bit weights, bfloat16 activations, on torch's own int4 packing for CPUs.

torch packs `block` rows (64 with AVX-512, 32 with AVX2) at a time: byte j of column k holds row j
in its low nibble and row block/2 + j in its high nibble, and

    w = (code - 8) * scale + shift        scale, shift bfloat16 [groups, rows, 2]

Few rows of x run `_weight_int4pack_mm_for_cpu`, which reads the nibbles once for every 4 rows.
From UNPACK_FROM rows on, the nibbles are unpacked to bfloat16 once a call, a panel at a time, and
multiplied by the matrix units: the same numbers, arranged for many rows. The packed layout is the
only copy of the codes; `codes()` inverts it.

Tried for the unpacking, per 885k weights on one core: a table of byte -> two codes 350 us against
300 us for shifts; a strided store to natural row order 600 us against 90 us for halves that the
output is put together from; float32 instead of bfloat16 scaling no faster; smaller panels slower
(each op costs a few microseconds). float16 and float32 activations run scalar code in torch (60
and 30 times slower), so they are not declared.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.base import Kernel, Operands, Problem

NAME = "torch int4pack (decode), bf16 unpack + matmul (prefill)"
GROUPS = (32, 64, 128, 256)
UNPACK_FROM = 48
"""Rows of x from which unpacking wins. Measured with 1 and 2 threads on 1536x576 and 576x1536:
the packed op takes 27 us a row on one core, unpacking 750 us plus 7 us a row."""
PANEL = 4 * 1024 * 1024
"""Weights unpacked at a time: bounds the transient memory to 8 MiB of bfloat16 and as much again
while unpacking."""
_FLIP = -0x7777777777777778  # 0x88 in every byte: a nibble c becomes the two's complement of c - 8


def pack(codes: Tensor) -> Tensor:
    """torch's packed bytes [rows, columns / 2] of codes (uint8 [rows, columns], rows a multiple of
    the block)."""
    step = max(64, PANEL // codes.shape[1] // 64 * 64)
    parts = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.to(torch.int32), 1)
        for part in torch.split(codes, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: Tensor, block: int) -> Tensor:
    """The codes (uint8 [rows, columns]) that `pack` packed in blocks of `block` rows."""
    rows, half = packed.shape
    nibbles = packed.view(rows // block, half * 2, block // 2)
    halves = torch.stack((nibbles & 15, nibbles >> 4), 1)  # [blocks, low or high, column, row]
    return halves.transpose(2, 3).reshape(rows, half * 2)


@functools.cache
def block_rows() -> int:
    """Rows that torch packs together on this machine, found by packing a known pattern.

    Raises: RuntimeError where the layout is neither of the two this file inverts."""
    codes = (torch.arange(128 * 32).reshape(128, 32) * 7 % 16).to(torch.uint8)
    codes[::3] = 15 - codes[::3]
    packed = pack(codes)
    for block in (64, 32):
        if torch.equal(unpack(packed, block), codes):
            return block
    raise RuntimeError("torch packs int4 weights in an unknown layout on this CPU")


@functools.cache
def matmul_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it, else float32 (its emulation is slower)."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def best_group(columns: int, group_size: int) -> int:
    """The group size of torch's that expresses groups of `group_size` in the fewest bytes.

    A group may be cut into several equal ones; the columns are padded to a multiple of it."""
    fitting = [g for g in GROUPS if group_size >= columns or group_size % g == 0]
    return min(fitting, key=lambda g: (-(-columns // g) * (g // 2 + 4), -g))


class Int4Linear:
    """A prepared 4-bit linear layer; see `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        rows, columns = problem.rows, problem.columns
        self.rows, self.columns = rows, columns
        self.group = best_group(columns, problem.group_size)
        self.block = block_rows()
        pad_rows, pad_columns = -rows % self.block, -columns % self.group
        self.pad_columns = pad_columns
        codes = torch.nn.functional.pad(operands.codes, (0, pad_columns, 0, pad_rows))
        self.packed = pack(codes)
        first = torch.arange(0, columns, self.group, device=codes.device)
        source = first // min(problem.group_size, columns)
        scale = operands.scales[:, source].expand(rows, -1).to(torch.bfloat16)
        # The shift is made from the rounded scale, so that the code `zero` stays (nearly) 0.
        shift = ((8 - operands.zeros[:, source]) * scale.float()).to(torch.bfloat16)
        grids = torch.stack((scale, shift), -1).transpose(0, 1)
        self.grids = torch.nn.functional.pad(grids, (0, 0, 0, pad_rows)).contiguous()
        self.bias = None if operands.bias is None else operands.bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        if self.pad_columns:
            x = torch.nn.functional.pad(x, (0, self.pad_columns))
        if x.shape[0] < UNPACK_FROM:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self.packed, self.group, self.grids
            )
        else:
            y = self._many_rows(x)
        if y.shape[1] != self.rows:
            y = y[:, : self.rows].contiguous()
        return y if self.bias is None else y.add_(self.bias)

    def _many_rows(self, x: Tensor) -> Tensor:
        half, columns = self.block // 2, x.shape[1]
        blocks = self.packed.shape[0] // self.block
        nibbles = self.packed.view(torch.int64).view(blocks, columns, -1)
        grids = self.grids.view(-1, blocks, 2, half, 2)
        y = x.new_empty(x.shape[0], blocks, 2, half)
        x = x.to(matmul_dtype())
        step = max(1, PANEL // (self.block * columns))
        for first in range(0, blocks, step):
            part = slice(first, min(first + step, blocks))
            for side, weight in enumerate(_unpack_panel(nibbles[part], grids[:, part])):
                y[:, part, side] = (x @ weight).view(x.shape[0], -1, half)
        return y.view(x.shape[0], -1)

    def codes(self) -> Tensor:
        return unpack(self.packed, self.block)[: self.rows, : self.columns]

    def tensors(self) -> dict[str, Tensor]:
        kept = {"packed": self.packed, "grids": self.grids}
        return kept if self.bias is None else {**kept, "bias": self.bias}


def _unpack_panel(nibbles: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high rows of some blocks as transposed weights [columns, blocks * block / 2].

    nibbles: int64 [blocks, columns, block / 16]; grids: [groups, blocks, 2, block / 2, 2]."""
    blocks, columns, words = nibbles.shape
    groups, width = grids.shape[0], blocks * words * 8
    # Rows of a column side by side: every later op then runs over long contiguous rows.
    signed = torch.empty(columns, blocks, words, dtype=torch.int64)
    torch.bitwise_xor(nibbles.transpose(0, 1), _FLIP, out=signed)
    pairs = signed.view(torch.int8).view(columns, width)
    # [scale or shift, low or high, groups, 1, width]
    dtype = matmul_dtype()
    table = grids.permute(4, 2, 0, 1, 3).reshape(2, 2, groups, 1, width).to(dtype)
    scale, shift = table[0], table[1]

    def scaled(codes: Tensor, side: int) -> Tensor:
        weight = codes.to(dtype).view(groups, -1, width)
        return torch.addcmul(shift[side], weight, scale[side], out=weight).view(columns, width)

    return scaled((pairs << 4) >> 4, 0), scaled(pairs >> 4, 1)


def probe() -> None:
    """Run both paths on a small layer. Raises: RuntimeError where an op is missing or wrong."""
    codes = (torch.arange(128 * 64).reshape(128, 64) * 5 % 16).to(torch.uint8)
    problem = Problem(128, 64, 4, 32, False, None, "cpu", torch.bfloat16)
    operands = Operands(codes, torch.full((128, 2), 0.5), torch.full((128, 2), 3.0))
    layer = Int4Linear(problem, operands)
    if not torch.equal(layer.codes(), codes):
        raise RuntimeError("torch's int4 packing does not come back")
    x = torch.eye(64, dtype=torch.bfloat16)
    expected = ((codes.float() - 3) * 0.5).T
    for got in (layer(x[:8]), layer(x)):
        if not torch.equal(got.float(), expected[: len(got)]):
            raise RuntimeError("torch's int4 product is wrong on this machine")


KERNEL = Kernel(
    name=NAME,
    devices=("cpu",),
    dtypes=(torch.bfloat16,),
    bits=(4,),
    group_multiple=32,
    activations=(None,),
    asymmetric=True,
    probe=probe,
    prepare=Int4Linear,
)

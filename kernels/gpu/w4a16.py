"""2 to 8-bit weights on grids, 16-bit activations: y = x @ ((code - zero) * scale).T + bias.

Codes lie in bytes, one, two or four in each (3 bits take the room of 4, and 5 to 7 that of 8). The
columns are cut into blocks of BLOCK, which never cross the border of a group, and the packed bytes
are stored block by block: [blocks, rows, BLOCK * WIDTH / 8]. Rows that a program reads together are
then one piece of memory, whatever the width of the matrix. The last block is padded.

Each program computes a tile of y.T: ROWS outputs for TOKENS rows of x. It walks over the blocks,
takes code - zero (a whole number up to 255, exact in 16 bits), multiplies it by x with float32 sums
and scales the sum of the block: the only roundings are those of float32 sums and of the output.

    multiply_row    one row of x: products and sums outside the tensor cores
    multiply_tile   several rows: `tl.dot`, on tensor cores

Where there are fewer tiles than the GPU has multiprocessors, the blocks are shared out too
(split-K): each program sums a part of them into a float32 buffer, and `add_parts` adds those up, in
a fixed order, so that the same input gives the same output every time.

Tested in Triton's interpreter, compiled for sm_80 and sm_90, never run on a GPU: nothing here has
been timed, and the sizes of the tiles are chosen by what fits into registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.base import Operands, Problem
from kernels.gpu.launch import Launch, Tile, processors, require_gpu, tile_of

BLOCKS = (128, 64, 32)
PARTS = 16
"""The most parts that a sum is split into."""
ADDED = 512
"""Outputs that a program of `add_parts` adds up."""


ROW = Tile(rows=16, tokens=1, warps=4, stages=3)
TILES = (
    Tile(rows=64, tokens=16, warps=4, stages=3),
    Tile(rows=64, tokens=64, warps=4, stages=3),
    Tile(rows=128, tokens=64, warps=8, stages=3),
)
"""For several rows of x: one that holds them all, or many of the last. On sm_80, at blocks of 128,
the registers cannot hold 128 by 64 with 4 warps (8-bit codes) or 128 by 128 with 8 (4-bit ones)."""


@triton.jit
def load_grid(
    scales: tl.tensor, zeros: tl.tensor, group: int, n: tl.tensor, rows: int, live: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """(scale float32, zero int32) of the rows n in a group; both stored as [groups, rows]."""
    scale = tl.load(scales + group * rows + n, mask=live, other=0.0).to(tl.float32)
    zero = tl.load(zeros + group * rows + n, mask=live, other=0).to(tl.int32)
    return scale, zero


@triton.jit
def load_codes(
    packed: tl.tensor,
    block: int,
    n: tl.tensor,
    rows: int,
    live: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """int32 codes [ROWS, BLOCK] of the rows n in a block of columns."""
    PER: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = BLOCK // PER
    at = (n.to(tl.int64) + block * rows) * BYTES
    byte = tl.load(packed + at[:, None] + tl.arange(0, BYTES)[None, :], mask=live[:, None], other=0)
    shifts = tl.arange(0, PER) * WIDTH
    codes = (byte.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & (2**WIDTH - 1)
    return tl.reshape(codes, (ROWS, BLOCK))


@triton.jit
def multiply_row(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: int,
    columns: int,
    blocks: int,
    blocks_per_group: int,
    blocks_per_part: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS outputs of a single row of x, or one part of their sums.

    x [columns]; out [parts, rows], float32 sums or, where there is one part, y itself."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = n < rows
    sums = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for block in range(part * blocks_per_part, min(blocks, (part + 1) * blocks_per_part)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)
        scale, zero = load_grid(scales, zeros, block // blocks_per_group, n, rows, live)
        codes = load_codes(packed, block, n, rows, live, WIDTH, BLOCK, ROWS)
        sums += (codes - zero[:, None]).to(tl.float32) * value[None, :] * scale[:, None]
    total = tl.sum(sums, 1)
    if bias is not None:
        total += tl.load(bias + n, mask=live, other=0.0)
    tl.store(out + part * rows + n, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def multiply_tile(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: int,
    rows: int,
    columns: int,
    blocks: int,
    blocks_per_group: int,
    blocks_per_part: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """ROWS outputs of TOKENS rows of x, or one part of their sums.

    x [tokens, columns]; out [parts, tokens, rows], float32 sums or, with one part, y itself.
    The weights are the left factor: they come out of the unpacking in registers, where tensor
    cores can take a left factor from, and the few tokens need no padding to the height of 64 that
    a Hopper product has on that side."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(2)
    live, present = n < rows, m < tokens
    row = m.to(tl.int64)
    sums = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for block in range(part * blocks_per_part, min(blocks, (part + 1) * blocks_per_part)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = (k < columns)[:, None] & present[None, :]
        value = tl.load(x + row[None, :] * columns + k[:, None], mask=inside, other=0.0)
        scale, zero = load_grid(scales, zeros, block // blocks_per_group, n, rows, live)
        codes = load_codes(packed, block, n, rows, live, WIDTH, BLOCK, ROWS)
        centred = (codes - zero[:, None]).to(tl.float32).to(value.dtype)
        sums += tl.dot(centred, value) * scale[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=live, other=0.0)[:, None]
    at = (part * tokens + row)[None, :] * rows + n[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=live[:, None] & present[None, :])


@triton.jit
def add_parts(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: int,
    rows: int,
    parts: int,
    ADDED: tl.constexpr,
) -> None:
    """out [count] = the sum of sums [parts, count] over the parts, plus the bias of each row."""
    at = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
    live = at < count
    total = tl.full((ADDED,), 0.0, tl.float32)
    for part in range(parts):
        total += tl.load(sums + part * count + at, mask=live, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % rows, mask=live, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def width_of(bits: int) -> int:
    """The bits that a code takes in memory: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def best_block(columns: int, group_size: int) -> int:
    """The block that fits into groups and pads `columns` least, the largest of those."""
    whole = group_size >= columns
    fitting = [block for block in BLOCKS if whole or group_size % block == 0]
    return min(fitting, key=lambda block: (-(-columns // block) * block, -block))


def pack(codes: Tensor, width: int, block: int) -> Tensor:
    """uint8 [blocks, rows, block * width / 8] of codes (uint8 [rows, columns]); the first code of a
    byte lies in its low bits."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % block))
    per = 8 // width
    parts = padded.view(rows, -1, block // per, per)
    packed = torch.zeros_like(parts[..., 0])
    for place in range(per):
        packed |= parts[..., place] << (place * width)
    return packed.transpose(0, 1).contiguous()


def unpack(packed: Tensor, width: int, columns: int) -> Tensor:
    """The codes (uint8 [rows, columns]) that `pack` packed."""
    rows = packed.shape[1]
    parts = [packed >> (place * width) & (2**width - 1) for place in range(8 // width)]
    codes = torch.stack(parts, -1).transpose(0, 1).reshape(rows, -1)
    return codes[:, :columns].contiguous()


def parts_of(tiles: int, blocks: int, multiprocessors: int) -> int:
    """Into how many parts the sums are split, so that there is a program for every multiprocessor
    (at least one block each, at most PARTS)."""
    return max(1, min(-(-multiprocessors // tiles), blocks, PARTS))


class GridLinear:
    """A prepared layer; see the head of this file and `kernels.base.Prepared`."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        assert problem.bits is not None
        self.rows, self.columns = problem.rows, problem.columns
        self.width = width_of(problem.bits)
        self.block = best_block(problem.columns, problem.group_size)
        self.packed = pack(operands.codes, self.width, self.block)
        self.blocks = self.packed.shape[0]
        whole = problem.group_size >= problem.columns
        self.blocks_per_group = self.blocks if whole else problem.group_size // self.block
        scales = operands.scales.float().expand(self.rows, -1).t().contiguous()
        half = scales.half()
        self.scales = half if torch.equal(half.float(), scales) else scales
        self.zeros = operands.zeros.expand(self.rows, -1).t().contiguous().to(torch.uint8)
        if not torch.equal(self.zeros.t().float(), operands.zeros.float().expand(self.rows, -1)):
            raise RuntimeError("zero-points are no whole numbers from 0 to 255")
        self.bias = None if operands.bias is None else operands.bias.float()
        self.multiprocessors = processors(self.packed.device)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.rows)
        if x.shape[0]:
            for launch in self.launches(x, y):
                launch.run(x)
        return y

    def launches(self, x: Tensor, y: Tensor) -> list[Launch]:
        """The programs that bring x times the weights into y."""
        tokens = x.shape[0]
        tile = ROW if tokens == 1 else tile_of(tokens, TILES)
        wide, high = -(-self.rows // tile.rows), -(-tokens // tile.tokens)
        parts = parts_of(wide * high, self.blocks, self.multiprocessors)
        blocks_per_part = -(-self.blocks // parts)
        parts = -(-self.blocks // blocks_per_part)  # none without a block
        split = parts > 1
        out = y.new_empty(parts, tokens, self.rows, dtype=torch.float32) if split else y
        arguments = {
            "x": x,
            "packed": self.packed,
            "scales": self.scales,
            "zeros": self.zeros,
            "bias": None if split else self.bias,
            "out": out,
            "rows": self.rows,
            "columns": self.columns,
            "blocks": self.blocks,
            "blocks_per_group": self.blocks_per_group,
            "blocks_per_part": blocks_per_part,
            "WIDTH": self.width,
            "BLOCK": self.block,
            "ROWS": tile.rows,
        }
        if tile is ROW:
            first = Launch(multiply_row, (wide, parts, 1), arguments, tile.warps, tile.stages)
        else:
            arguments |= {"tokens": tokens, "TOKENS": tile.tokens}
            first = Launch(multiply_tile, (wide, high, parts), arguments, tile.warps, tile.stages)
        return [first, self._addition(out, y)] if split else [first]

    def _addition(self, sums: Tensor, y: Tensor) -> Launch:
        arguments = {
            "sums": sums,
            "bias": self.bias,
            "out": y,
            "count": y.numel(),
            "rows": self.rows,
            "parts": sums.shape[0],
            "ADDED": ADDED,
        }
        return Launch(add_parts, (-(-y.numel() // ADDED), 1, 1), arguments, 4, 1)

    def codes(self) -> Tensor:
        return unpack(self.packed, self.width, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        kept = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return kept if self.bias is None else {**kept, "bias": self.bias}


def probe(device: str = "cuda") -> None:
    """Read weights back through every program, by rows of x that hold a single one.

    Raises: RuntimeError where there is no such GPU or a product is wrong."""
    require_gpu(device)
    codes = (torch.arange(70 * 160, device=device).reshape(70, 160) * 5 % 16).to(torch.uint8)
    scales = torch.full((70, 5), 0.5, device=device)
    zeros = torch.arange(350, device=device).view(70, 5) % 16
    spread = zeros.repeat_interleave(32, 1)
    for dtype in (torch.bfloat16, torch.float16):
        problem = Problem(70, 160, 4, 32, False, None, device, dtype)
        layer = GridLinear(problem, Operands(codes, scales, zeros.float()))
        if not torch.equal(layer.codes(), codes):
            raise RuntimeError("the 4-bit codes do not come back")
        want = ((codes.float() - spread) * 0.5).T
        eye = torch.eye(160, dtype=dtype, device=device)
        for tokens in (1, *(tile.tokens for tile in TILES), 160):
            if not torch.equal(layer(eye[:tokens]).float(), want[:tokens]):
                raise RuntimeError("Triton's 4-bit product is wrong on this machine")

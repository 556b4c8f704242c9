"""f32, f16 and bf16: one weight a block, no scale. Rounding is to nearest, ties to even.

Values beyond the largest finite number of the type are clamped to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import BlockFormat


def _plain_format(name: str, type_id: int, dtype: torch.dtype) -> BlockFormat:
    largest = torch.finfo(dtype).max
    size = dtype.itemsize

    def quantize(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
        """float32 `[n, 1]` to uint8 `[n, bytes]`; importance is not used."""
        values = blocks.clamp(-largest, largest).to(dtype)
        return values.contiguous().view(torch.uint8).view(-1, size)

    def dequantize(data: Tensor) -> Tensor:
        """uint8 `[n, bytes]` to float32 `[n, 1]`."""
        return data.contiguous().view(dtype).to(torch.float32)

    return BlockFormat(
        name=name,
        type_id=type_id,
        block_size=1,
        block_bytes=size,
        quantize=quantize,
        dequantize=dequantize,
        bits=8 * size,
    )


F32 = _plain_format("f32", 0, torch.float32)
F16 = _plain_format("f16", 1, torch.float16)
BF16 = _plain_format("bf16", 30, torch.bfloat16)

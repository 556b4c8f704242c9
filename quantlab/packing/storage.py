"""What a method's packed weights will look like, known before any of them exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Representation = Literal["affine", "codebook", "outlier", "ggml"]
Inputs = Literal["token", "tensor", "dynamic_tensor", "dynamic_token"]


@dataclass(frozen=True)
class Storage:
    """`bits`: every width that a linear may get, without those left in 16 bits. `group_size`: None
    for a grid a row; a group that is longer than a row is the row. `one_scale`: one grid serves
    the whole matrix. `activation`: how the input is quantized, None for not at all. `outer`: bits
    of embedding and head."""

    representation: Representation
    bits: tuple[int, ...]
    group_size: int | None = None
    symmetric: bool = False
    one_scale: bool = False
    activation: Inputs | None = None
    outer: tuple[int, int] = (16, 16)

    def group(self, columns: int) -> int:
        """Columns that share a grid in a matrix of this many."""
        return columns if self.group_size is None else min(self.group_size, columns)

"""The bytes of ggml's block types."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantlab.ggml import FORMATS, dequantize_rows, layout_of


@dataclass(frozen=True)
class GGMLWeight:
    """The bytes of a ggml block type: data uint8 [rows, bytes a row], `type` a name in
    `quantlab.ggml.FORMATS`."""

    data: Tensor
    type: str
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        return FORMATS[self.type].bits_per_weight

    @property
    def blocks(self) -> Tensor:
        """The bytes block by block, uint8 [blocks, bytes a block]."""
        return self.data.reshape(-1, FORMATS[self.type].block_bytes)

    def factors(self) -> Tensor:
        """The bytes without the codes, for `from_codes`."""
        return layout_of(self.type).factors(self.blocks)

    @classmethod
    def from_codes(cls, type: str, factors: Tensor, codes: Tensor) -> GGMLWeight:
        """The weight of these factors and codes (uint8 [rows, columns])."""
        rows, columns = codes.shape
        blocks = codes.reshape(-1, FORMATS[type].block_size)
        return cls(layout_of(type).join(factors, blocks).view(rows, -1), type, columns)

    def dequantize(self) -> Tensor:
        return dequantize_rows(self.data, self.type, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data}

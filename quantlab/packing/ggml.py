"""The bytes of ggml's block types."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantlab.ggml import FORMATS, dequantize_rows


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

    def dequantize(self) -> Tensor:
        return dequantize_rows(self.data, self.type, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data}

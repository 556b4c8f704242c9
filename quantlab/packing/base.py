"""What every packed weight offers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class PackedWeight(Protocol):
    """What every representation offers. `shape` is (rows = out features, columns = in features)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Bytes at rest: codes, scales, zeros and codebooks."""
        ...

    @property
    def bits_per_weight(self) -> float: ...

    def dequantize(self) -> Tensor:
        """The weight it stands for: float32 [rows, columns]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to keep, by field name."""
        ...


def bits_per_weight(weight: PackedWeight) -> float:
    """Bytes at rest as bits for each weight."""
    rows, columns = weight.shape
    return 8 * weight.nbytes / (rows * columns)

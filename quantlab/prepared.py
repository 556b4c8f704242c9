"""Weights on disk that can be opened and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["unquantized", "quantlab", "checkpoint", "gguf", "onnx"]


@dataclass(frozen=True)
class Prepared:
    """Quantized weights on disk. `seconds` and `peak_rss` are of the quantizing itself, None where
    nothing was quantized; `size_bytes` of all weights; `fallbacks` what could not be had; `details`
    what the method reports of its plan; `curves` the losses of a training."""

    kind: Kind
    path: Path
    size_bytes: int
    parameters: int
    seconds: float | None = None
    peak_rss: int | None = None
    fallbacks: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

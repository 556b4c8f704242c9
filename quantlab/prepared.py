"""Weights on disk that can be opened and measured, and what is kept beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ABOUT = "about.json"
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


def keep_about(prepared: Prepared, folder: Path) -> Prepared:
    """Write down what was prepared in `folder`, after everything else: then it is whole."""
    about = {**asdict(prepared), "path": prepared.path.name}
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return prepared


def read_about(folder: Path) -> Prepared | None:
    """What an earlier run kept in `folder`, None where there is nothing whole."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about["path"] = folder / about["path"]
        about["fallbacks"] = tuple(about["fallbacks"])
        prepared = Prepared(**about)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return prepared if prepared.path.exists() else None

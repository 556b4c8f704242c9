"""Real pieces of a model, small enough to compute with while a slider moves.

A slice is a window of consecutive input channels of one linear: the weight's first rows there, and
what the linear read in those channels while calibration text ran through the unquantized model. A
file holds the slices of many linears (`capture` makes one for a model); `assets/learn` ships a
small one of the bundled model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.errors import ModelError

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "learn" / "bundled.safetensors"
"""Slices of the bundled model, made by `scripts/learn_slices.py`."""

ROWS, COLUMNS, TOKENS = 48, 256, 192
"""At most so many output channels, input channels and tokens: 120 KB in 16 bits. A window of 256
channels is what one super-block of llama.cpp's K formats holds."""


@dataclass(frozen=True, eq=False)
class Slice:
    """weight: float32 [rows, columns], inputs: float32 [tokens, columns], both exact in float16.

    `shape` is that of the whole weight, `first` the window's first input channel. `peak` is the
    largest |x| of the linear's whole input.
    """

    model: str
    layer: str
    shape: tuple[int, int]
    first: int
    peak: float
    weight: Tensor
    inputs: Tensor

    @property
    def channels(self) -> range:
        """The window's input channels, by their number in the whole linear."""
        return range(self.first, self.first + self.weight.shape[1])

    @cached_property
    def moment(self) -> Tensor:
        """Mean of x x^T: float32 [columns, columns]."""
        return self.inputs.t() @ self.inputs / self.inputs.shape[0]

    @cached_property
    def stats(self) -> ActStats:
        """What calibration on these tokens tells a method."""
        return ActStats(
            tokens=self.inputs.shape[0],
            second_moment=self.moment,
            low=self.inputs.amin(0),
            high=self.inputs.amax(0),
            mean_abs=self.inputs.abs().mean(0),
            sample=self.inputs,
        )

    def output_error(self, weight: Tensor) -> float:
        """||(V - W) X||^2 / ||W X||^2 over the slice's tokens, V being `weight`."""
        wanted = self.inputs @ self.weight.t()
        return float((self.inputs @ weight.t() - wanted).square().sum() / wanted.square().sum())


@dataclass(frozen=True)
class Origin:
    """Where a file of slices comes from: the model's name and fingerprint, how many tokens of which
    text were read, on which machine and when."""

    model: str
    fingerprint: str
    text: str
    tokens: int
    machine: str
    date: str


def window(peaks: Tensor, columns: int = COLUMNS) -> int:
    """The first channel of a window around the largest of `peaks` [channels], on a multiple of 64
    where there is room."""
    count = peaks.shape[0]
    if count <= columns:
        return 0
    top = int(peaks.argmax())
    return min(max(top - columns // 2, 0) // 64 * 64, count - columns)


def write(path: Path, origin: Origin, slices: dict[str, Slice]) -> None:
    """Write slices by their layer, whole or not at all. Values must be exact in float16."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for layer, one in slices.items():
        tensors[f"{layer}|weight"] = one.weight.half().contiguous()
        tensors[f"{layer}|inputs"] = one.inputs.half().contiguous()
        about[layer] = {"shape": list(one.shape), "first": one.first, "peak": one.peak}
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"origin": json.dumps(vars(origin)), "slices": json.dumps(about)}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def half(values: Tensor) -> Tensor:
    """Rounded to float16 and kept inside its range, as float32: what a file can hold."""
    return values.float().clamp(-65504, 65504).half().float()


@lru_cache(maxsize=8)
def _about(path: Path, changed: int) -> tuple[Origin, dict[str, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return Origin(**json.loads(metadata["origin"])), json.loads(metadata["slices"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"learn: the slices in {path.name} cannot be read ({error}); load the model again"
        ) from None


def _known(path: Path) -> tuple[Origin, dict[str, dict[str, Any]]]:
    try:
        return _about(path, path.stat().st_mtime_ns)
    except OSError:
        raise ModelError(f"learn: {path.name} is gone; load the model again") from None


def origin(path: Path = BUNDLED) -> Origin:
    """Where the slices of this file come from. Raises: ModelError."""
    return _known(path)[0]


def layers(path: Path = BUNDLED) -> list[str]:
    """The linears that this file holds, by path. Raises: ModelError."""
    return list(_known(path)[1])


def load(path: Path = BUNDLED, layer: str = "") -> Slice:
    """One slice; without a name, or with one that is not there, the first. Raises: ModelError."""
    source, about = _known(path)
    chosen = layer if layer in about else next(iter(about))
    return _load(path, path.stat().st_mtime_ns, chosen, source.model)


@lru_cache(maxsize=16)
def _load(path: Path, changed: int, layer: str, model: str) -> Slice:
    about = _about(path, changed)[1][layer]
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor(f"{layer}|weight").float()
        inputs = file.get_tensor(f"{layer}|inputs").float()
    rows, columns = about["shape"]
    return Slice(model, layer, (rows, columns), about["first"], about["peak"], weight, inputs)


def sub(one: Slice, rows: int, columns: int, start: int = 0) -> Slice:
    """A smaller slice: the first `rows` rows and `columns` channels from `start` of the window."""
    stop = start + columns
    weight, inputs = one.weight[:rows, start:stop], one.inputs[:, start:stop]
    return Slice(one.model, one.layer, one.shape, one.first + start, one.peak, weight, inputs)


def random(seed: int = 0, rows: int = 8, columns: int = 64, tokens: int = 32) -> Slice:
    """A made-up slice with one large channel, for benchmarks without a model."""
    generator = torch.Generator().manual_seed(seed)
    weight = half(torch.randn(rows, columns, generator=generator) * 0.05)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, columns // 3] *= 40
    inputs = half(inputs)
    peak = float(inputs.abs().max())
    return Slice("random", "random", (rows, columns), 0, peak, weight, inputs)

"""What a kernel declares and what it is asked: plain records, no computation.

A kernel is one file with one `Kernel` object; `kernels.dispatch.KERNELS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Execution = Literal["packed", "simulated"]
ActivationKind = Literal["token", "tensor", "outlier", "dynamic_tensor", "dynamic_token"]
Grid = Literal["uniform", "offset", "table"]
"""What a code means: (code - zero) * scale, code * scale + offset, or values[code] * scale."""


@dataclass(frozen=True)
class Problem:
    """A linear layer to run: y[m, rows] = x[m, columns] @ weight.T + bias.

    `bits` is None for a weight without codes. `group_size` is the number of columns that share a
    grid, at most `columns`. `activation` says how the input is quantized to 8 bits, None for not at
    all; 'outlier' is 'token' for all but the columns with large values. `dtype` is what the
    activations are computed in.
    """

    rows: int
    columns: int
    bits: int | None
    group_size: int
    symmetric: bool
    activation: ActivationKind | None
    device: str
    dtype: torch.dtype
    grid: Grid = "uniform"


@dataclass(frozen=True)
class Operands:
    """The tensors of a weight: w = (code - zero) * scale on uniform grids; see `Grid`.

    codes: uint8 [rows, columns]; scales: float32 [rows or 1, groups]; zeros: the same, the offsets
    of `grid='offset'` and unused by 'table'; table: float32 [16] for that. The step and zero-point
    of the input (x ~ (code - zero) * step, codes 0 to 255) matter for `activation='tensor'` only,
    `threshold` (the least outlier) for `activation='outlier'` only.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None = None
    input_scale: float = 1.0
    input_zero: int = 0
    threshold: float = float("inf")
    table: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Which kernel runs a layer, whether on packed weights or simulated, and why that one."""

    kernel: str
    execution: Execution
    why: str


class Prepared(Protocol):
    """A weight in the layout of its kernel, ready to run."""

    def __call__(self, x: Tensor) -> Tensor:
        """y [m, rows] of x [m, columns], both in the problem's dtype, bias added."""
        ...

    def codes(self) -> Tensor:
        """The exact codes (uint8 [rows, columns]) it was prepared from."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it keeps in memory, by name."""
        ...


@dataclass(frozen=True)
class Kernel:
    """A kernel's declared abilities. `names` maps dtype to the torch dtypes of the activations.

    `group_multiple` G: a group is a multiple of G columns (or the whole row); None: a grid is a
    whole row. `activations` lists the input quantizations it computes (None: unquantized input).
    `probe` runs the kernel once on a small case and raises where this machine cannot.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    bits: tuple[int, ...]
    group_multiple: int | None
    activations: tuple[ActivationKind | None, ...]
    asymmetric: bool
    probe: Callable[[], None]
    prepare: Callable[[Problem, Operands], Prepared]
    grids: tuple[Grid, ...] = ("uniform",)

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot run `problem`, None where the declared abilities cover it."""
        p = problem
        if p.bits is None or p.grid not in self.grids:
            return "the weight is not on uniform grids"
        if p.activation not in self.activations:
            if p.activation is None:
                return "takes 8-bit inputs only"
            if self.activations == (None,):
                return "takes no 8-bit inputs"
            return f"takes 8-bit inputs by {_listed(self.activations)}, not by {p.activation}"
        if p.bits not in self.bits:
            return f"no {p.bits}-bit codes"
        if p.device not in self.devices:
            return f"no device {p.device}"
        if p.dtype not in self.dtypes:
            return f"no {_short(p.dtype)} activations"
        if not p.symmetric and not self.asymmetric:
            return "no zero-points in weights"
        if p.group_size >= p.columns:
            return None
        if self.group_multiple is None:
            return f"no groups within a row (group size {p.group_size})"
        if p.group_size % self.group_multiple:
            return f"group size {p.group_size} is no multiple of {self.group_multiple}"
        return None


def _listed(activations: tuple[ActivationKind | None, ...]) -> str:
    return " or ".join(kind for kind in activations if kind)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

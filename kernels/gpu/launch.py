"""How the programs of this package are started: records that a test can look at and compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROCESSORS = 108
"""Multiprocessors to plan for where there is no GPU to ask (an A100 has that many)."""


@dataclass(frozen=True)
class Tile:
    """What a program computes: `rows` outputs for `tokens` rows of x, by `warps` of 32 threads,
    with `stages` blocks of columns loaded or in work at a time."""

    rows: int
    tokens: int
    warps: int
    stages: int


def tile_of(tokens: int, tiles: tuple[Tile, ...]) -> Tile:
    """The first tile that holds so many rows of x, else the last."""
    return next((tile for tile in tiles if tokens <= tile.tokens), tiles[-1])


@dataclass(frozen=True)
class Launch:
    """One start of a `@triton.jit` program on `grid`, with all arguments by name: tensors, numbers,
    None, and the constants (in capitals) that it is compiled for."""

    program: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self, near: Tensor) -> None:
        """Start it on the GPU where `near` is. Nothing is waited for."""
        with torch.cuda.device_of(near):
            self.program[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def processors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; each works on one program or more at a time."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def require_gpu(device: str) -> None:
    """Raises: RuntimeError where `device` is 'cuda' and no GPU is there that can run these kernels
    (bfloat16 on tensor cores: compute capability 8.0)."""
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA GPU")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise RuntimeError(f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed")

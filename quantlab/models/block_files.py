"""Where the weights of a model's blocks lie in its safetensors files, to be read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. `transposed`: the file has it [in, out], as GPT-2's Conv1D."""

    file: Path
    name: str
    transposed: bool = False


@dataclass(frozen=True)
class BlockFiles:
    """Where the weights of each block lie, by their paths in the block."""

    places: tuple[Mapping[str, Place], ...]
    dtype: torch.dtype

    @torch.no_grad()
    def fetch(self, block: nn.Module, index: int) -> None:
        """Read the weights of block `index` that are not in memory. Raises: ModelError."""
        waiting = {
            path: self.places[index][path]
            for path, parameter in block.named_parameters()
            if parameter.is_meta
        }
        for path, tensor in read(waiting):
            owner, _, leaf = path.rpartition(".")
            value = tensor.to(self.dtype, copy=True)
            if waiting[path].transposed:
                value = value.t().contiguous()
            setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def read(places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of each place; the tensors are views of mapped files, which are let go of with
    them. Raises: ModelError for a file that is gone or was changed."""
    from safetensors import SafetensorError, safe_open

    for file in sorted({place.file for place in places.values()}):
        try:
            with safe_open(file, framework="pt") as opened:
                for key, place in places.items():
                    if place.file == file:
                        yield key, opened.get_tensor(place.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model: {file.name} cannot be read any more ({error})") from None


def block_places(
    blocks: str, count: int, places: Mapping[str, Place]
) -> tuple[dict[str, Place], ...]:
    """The places of each block's tensors, by their paths in the block."""
    found: tuple[dict[str, Place], ...] = tuple({} for _ in range(count))
    for name, place in places.items():
        if name.startswith(f"{blocks}."):
            index, _, path = name.removeprefix(f"{blocks}.").partition(".")
            found[int(index)][path] = place
    return found

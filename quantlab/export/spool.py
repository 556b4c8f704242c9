"""What is left of a block once it is quantized: a file, and tensors that are views of it.

Packed weights of a deep model need not stay in memory while later blocks are worked on. A spool
writes each block's to a file of its own and maps that file: the system reads its pages when they
are looked at and may drop them at any time. Norms and biases stay in memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.layers import QuantLinear, replace_linear
from quantlab.models import Block
from quantlab.packing import PackedWeight, describe, restore

PATTERN = "block-*.safetensors"


class Spool:
    """Files `block-00000.safetensors` and on in `folder`, with packed tensors as `path::field` and
    matrices that were not packed in bfloat16. `names`: every tensor that is in one of them."""

    def __init__(self, folder: Path, blocks: str) -> None:
        """`blocks`: path of the model's list of blocks."""
        folder.mkdir(parents=True)
        self.folder, self.blocks = folder, blocks
        self.names: set[str] = set()

    @torch.no_grad()
    def keep(self, block: Block, packed: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
        """Write the block, whose linears are replaced already; returns the same packed weights as
        views of the file, which the block's layers hold as well. Such layers have no kernel.

        Raises: OSError on a full disk.
        """
        from safetensors import safe_open
        from safetensors.torch import save_file

        prefix = f"{self.blocks}.{block.index}."
        tensors = {
            f"{prefix}{path}::{field}": tensor.contiguous()
            for path, weight in packed.items()
            for field, tensor in weight.tensors().items()
        }
        matrices = [name for name, p in block.module.named_parameters() if p.dim() > 1]
        for name in matrices:
            matrix = block.module.get_parameter(name).detach()
            tensors[f"{prefix}{name}"] = matrix.to(torch.bfloat16).contiguous()
        self.names |= tensors.keys()
        file = self.folder / f"block-{block.index:05d}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        with safe_open(file, framework="pt") as opened:
            mapped = {name: opened.get_tensor(name) for name in tensors}
        for name in matrices:
            _replace(block.module, name, mapped[f"{prefix}{name}"])
        views = {}
        for path, weight in packed.items():
            fields = {f: mapped[f"{prefix}{path}::{f}"] for f in weight.tensors()}
            views[path] = restore(describe(weight), fields)
            layer = block.module.get_submodule(path)
            assert isinstance(layer, QuantLinear)
            resting = QuantLinear(views[path], layer.bias, layer.dtype, resting=True)
            replace_linear(block.module, path, resting)
        return views


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))

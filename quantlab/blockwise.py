"""The loop every method runs in: block by block, each seeing the error of the blocks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.errors import MethodError
from quantlab.grid import all_finite
from quantlab.layers import QuantLinear, replace_linear
from quantlab.methods.base import Quantizer
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight

Step = Callable[[int, int], None]
"""Called with (blocks done, blocks)."""


@torch.no_grad()
def quantize_blocks(
    model: LoadedModel, method: Quantizer, config: Any, ids: Tensor | None, step: Step
) -> dict[str, PackedWeight]:
    """Quantize every block of `model` in place: its linears become QuantLinears.

    ids: int64 [pieces, length], the calibration tokens, for methods that need statistics. Returns
    the packed weights by the linears' full paths. Raises: MethodError.
    """
    runner = BlockRunner(model, ids) if method.needs and ids is not None else None
    count = len(block_list(model.module, model.family))
    packed: dict[str, PackedWeight] = {}
    for index in range(count):
        step(index, count)
        block = get_block(model.module, model.family, index)
        for path, linear in block.linears.items():
            if not all_finite(linear.weight):
                raise MethodError(f"block {index}: the weights of {path} are not finite")
        stats: dict[str, ActStats] = {}
        if runner is not None:
            stats = dict(runner.collect(block, method.needs))
        weights = method.quantize_block(block, stats, config)
        install(block, weights)
        if runner is not None and index < count - 1:
            runner.advance(block)
        for path, weight in weights.items():
            packed[f"{model.family.blocks}.{index}.{path}"] = weight
    step(count, count)
    return packed


def install(block: Block, weights: dict[str, PackedWeight]) -> None:
    """Put QuantLinears in the place of the block's linears, so that later blocks see the error."""
    for path, weight in weights.items():
        replace_linear(block.module, path, QuantLinear(weight, block.linears[path].bias))


@torch.no_grad()
def quantize_outer(model: LoadedModel, method: Quantizer, config: Any) -> dict[str, PackedWeight]:
    """The packed embedding ('token_embd') and head ('output') where the method packs them."""
    embedding = model.module.get_input_embeddings().weight
    head = model.module.get_output_embeddings().weight
    tied = head.data_ptr() == embedding.data_ptr()
    found = {"token_embd": method.quantize_outer(embedding, "token_embd", tied, config)}
    if not tied:
        found["output"] = method.quantize_outer(head, "output", tied, config)
    return {kind: weight for kind, weight in found.items() if weight is not None}

"""The loop every method runs in: block by block, each seeing the error of the blocks before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.errors import MethodError
from quantlab.grid import all_finite
from quantlab.heap import hand_back, kept_memory
from quantlab.layers import QuantLinear, replace_linear
from quantlab.lockstep import advance_in_lockstep
from quantlab.methods.base import Quantizer, Step
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import OutlierWeight, PackedWeight
from quantlab.training.workshop import Workshop

Keep = Callable[[Block, dict[str, PackedWeight]], dict[str, PackedWeight]]
"""Called with each block when nothing more is done to it; returns its packed weights."""


@torch.no_grad()
def quantize_blocks(
    model: LoadedModel,
    method: Quantizer,
    config: Any,
    ids: Tensor | None,
    step: Step,
    keep: Keep | None = None,
) -> dict[str, PackedWeight]:
    """Quantize every block of `model` in place: its linears become QuantLinears.

    The weights of one block after another are brought into memory where they are not, and `keep`
    may put away what became of them (`quantlab.export.spool`), so that depth takes no memory.

    ids: int64 [pieces, length], the calibration tokens, for methods that need statistics; `config`
    may be what the method's `plan` made of its config. Returns the packed weights by the linears'
    full paths. Raises: MethodError.
    """
    with kept_memory(temporaries(model)):
        needs = method.needs_for(config)
        runner = None
        if needs and ids is not None:
            original = "cross_moment" in needs
            runner = BlockRunner(model, ids, original=original, single=method.sequential)
        count = len(block_list(model.module, model.family))
        packed: dict[str, PackedWeight] = {}
        for index in range(count):
            step(index, count)
            model.fetch(index)
            block = get_block(model.module, model.family, index)
            check_finite(block)
            # Layers that are put away at once need no kernel.
            resting = keep is not None
            if runner is not None and method.sequential:
                weights = quantize_in_lockstep(runner, block, method, config)
                install(block, weights, resting=resting)
            else:
                stats: dict[str, ActStats] = {}
                if runner is not None:
                    stats = dict(runner.collect(block, needs, advance=not method.sees_error))
                weights = method.quantize_block(block, stats, config)
                ahead = runner if method.sees_error and index < count - 1 else None
                if ahead is not None and only_weights(weights):
                    unpack_into(block, weights)
                    ahead.advance(block)
                    ahead = None
                install(block, weights, resting=resting and ahead is None)
                if ahead is not None:
                    ahead.advance(block)
            if keep is not None:
                weights = keep(block, weights)
                hand_back()
            for path, weight in weights.items():
                packed[f"{model.family.blocks}.{index}.{path}"] = weight
        step(count, count)
        return packed


def temporaries(model: LoadedModel) -> int:
    """Bytes of the largest tensors that come and go by the dozen and are worth keeping: float32
    weights, also of two linears together, up to 8 MB. Larger ones belong to linears that take so
    long that clearing their pages is nothing beside it, and their holes would be as large."""
    block = get_block(model.module, model.family, 0)
    largest = max((linear.weight.numel() for linear in block.linears.values()), default=0)
    return min(max(9 * largest, 2**22), 2**23)


def quantize_in_lockstep(
    runner: BlockRunner, block: Block, method: Quantizer, config: Any
) -> dict[str, PackedWeight]:
    """Quantize the linears of each input when all tokens have reached it, on what the quantized
    linears before it made of them; the runner goes on behind the block. The block's own linears
    are left with the quantized weights, dequantized."""
    packed: dict[str, PackedWeight] = {}

    def solve(stats: Mapping[str, ActStats]) -> None:
        hand_back()  # What the batches left on their way here is of other sizes.
        part = dataclasses.replace(
            block,
            linears={path: block.linears[path] for path in stats},
            kinds={path: block.kinds[path] for path in stats},
            folds=(),
        )
        weights = method.quantize_block(part, stats, config)
        unpack_into(block, weights)
        packed.update(weights)

    advance_in_lockstep(runner, block, method.needs_for(config), solve)
    hand_back()  # What solving left would lie under all that writes the block.
    return {path: packed[path] for path in block.linears}


def only_weights(weights: Mapping[str, PackedWeight]) -> bool:
    """Whether the block's inputs stay as they are, so that plain linears can stand in for it."""
    return not any(
        isinstance(weight, OutlierWeight) or getattr(weight, "activation", None)
        for weight in weights.values()
    )


def unpack_into(block: Block, weights: Mapping[str, PackedWeight]) -> None:
    """Leave the dequantized weights in the block's own linears. Calibration tokens go on through
    those: at thousands of tokens a call, unpacking codes every time costs more than it spares."""
    for path, weight in weights.items():
        block.linears[path].weight.copy_(weight.dequantize())


def install(block: Block, weights: dict[str, PackedWeight], *, resting: bool = False) -> None:
    """Put QuantLinears in the place of the block's linears, so that later blocks see the error."""
    for path, weight in weights.items():
        layer = QuantLinear(weight, block.linears[path].bias, resting=resting)
        replace_linear(block.module, path, layer)


def train_blocks(
    model: LoadedModel, method: Quantizer, config: Any, ids: Tensor, workshop: Workshop
) -> dict[str, PackedWeight]:
    """As `quantize_blocks`, for methods that train. Raises: MethodError."""
    count = len(block_list(model.module, model.family))
    for index in range(count):
        check_finite(get_block(model.module, model.family, index))
    packed = method.train(model, ids, config, workshop)
    for path, weight in packed.items():
        bias = model.module.get_submodule(path).bias
        replace_linear(model.module, path, QuantLinear(weight, bias))
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    return packed


def check_finite(block: Block) -> None:
    """Raise MethodError when a linear of the block has weights that are not finite."""
    for path, linear in block.linears.items():
        if not all_finite(linear.weight):
            raise MethodError(f"block {block.index}: the weights of {path} are not finite")


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

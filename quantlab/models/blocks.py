"""Decoder blocks as methods see them, and the folding of channel scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.errors import MethodError, ModelError
from quantlab.models.families import Family, Fold


@dataclass(frozen=True)
class Block:
    """One decoder block: its module, its linears by path, and the folds that hold for it.

    `kinds` maps each linear's path to its kind in ggml's vocabulary (attn_q, ffn_down, …), or to
    its path where the family is generic. `heads`, `kv_heads` and `head_dim` describe attention (for
    folds through the values).
    """

    index: int
    count: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    kinds: dict[str, str]
    folds: tuple[Fold, ...]
    heads: int
    kv_heads: int
    head_dim: int
    norm_offset: float = 0.0


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The module list of the decoder blocks. Raises: ModelError."""
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError:
        raise ModelError(f"{family.name}: no decoder blocks at {family.blocks!r}") from None
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ModelError(f"{family.name}: {family.blocks!r} is not a list of decoder blocks")
    return blocks


def longest_module_list(model: nn.Module) -> str:
    """Path of the longest module list that holds linears: the blocks of an unknown architecture."""
    found = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(inner, nn.Linear) for inner in module.modules())
    ]
    if not found:
        raise ModelError("this model has no list of decoder blocks with linear layers")
    _, path = max(found, key=lambda pair: (pair[0], -len(pair[1])))
    return str(path)


def get_block(model: nn.Module, family: Family, index: int) -> Block:
    """Block `index` of the model, with the linears that are still unquantized."""
    blocks = block_list(model, family)
    module = blocks[index]
    config = model.config
    heads = int(getattr(config, "num_attention_heads", 1))
    hidden = int(getattr(config, "hidden_size", heads))
    kv_heads = getattr(config, "num_key_value_heads", None)
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    if family.linears:
        linears = {path: linears[path] for path, _ in family.linears if path in linears}
    return Block(
        index=index,
        count=len(blocks),
        module=module,
        linears=linears,
        kinds={path: dict(family.linears).get(path, path) for path in linears},
        folds=usable_folds(module, config, family, linears),
        heads=heads,
        kv_heads=heads if kv_heads is None else int(kv_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        norm_offset=family.norm_offset,
    )


def usable_folds(
    module: nn.Module, config: object, family: Family, linears: dict[str, nn.Linear]
) -> tuple[Fold, ...]:
    """The family's folds that hold for this configuration of it.

    OPT-350m normalises after the sublayer and other OPT sizes before it; only in the latter does a
    norm feed the linears. Its fc1 -> fc2 fold needs ReLU.
    """
    before = bool(getattr(config, "do_layer_norm_before", True))
    homogeneous = getattr(config, "activation_function", "relu") == "relu" or not hasattr(
        config, "do_layer_norm_before"
    )
    kept = []
    for fold in family.folds:
        if fold.kind == "norm" and not before:
            continue
        if fold.kind == "linear" and not homogeneous:
            continue
        if all(target in linears for target in fold.targets):
            kept.append(fold)
    return tuple(kept)


def fold_scale(block: Block, fold: Fold, scale: Tensor) -> Tensor:
    """The nearest scale that `fold` can absorb: for 'value' folds the geometric mean over the query
    heads that share a value channel; otherwise `scale` itself. float32 [columns of the targets]."""
    if fold.kind != "value" or block.heads == block.kv_heads:
        return scale
    shaped = scale.reshape(block.kv_heads, block.heads // block.kv_heads, block.head_dim)
    shared = shaped.log().mean(1, keepdim=True).exp()
    return shared.expand_as(shaped).reshape(-1)


@torch.no_grad()
def apply_fold(block: Block, fold: Fold, scale: Tensor) -> None:
    """Divide the source's channels by `scale` and multiply the targets' columns by it, in place.

    scale: float32 [columns of the targets], positive, already passed through `fold_scale`.
    The block's float function is unchanged. Raises: MethodError for a scale that is not positive
    and finite.
    """
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise MethodError(f"block {block.index}: fold scale for {fold.source} is not positive")
    source = block.module.get_submodule(fold.source)
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    if fold.kind == "norm":
        weight.copy_((weight + block.norm_offset) / scale - block.norm_offset)
        if isinstance(bias, Tensor):
            bias.div_(scale)
    else:
        divisor = source_scale(block, fold, scale)
        rows = source_rows(block, fold, weight.shape[0], divisor.shape[0])
        weight[rows] /= divisor[:, None]
        if isinstance(bias, Tensor):
            bias[rows] /= divisor
    for target in fold.targets:
        block.linears[target].weight.mul_(scale)


def source_rows(block: Block, fold: Fold, rows: int, count: int) -> slice | Tensor:
    """Which `count` of the source's `rows` the targets read (`Fold.rows`), in their order."""
    if fold.rows == "last":
        return slice(rows - count, rows)
    every = torch.arange(rows).view(-1, 3, block.head_dim)
    return every[:, 2].reshape(-1)


def source_scale(block: Block, fold: Fold, scale: Tensor) -> Tensor:
    """One entry for each source row: query heads of a group read the same value channel."""
    if fold.kind != "value" or block.heads == block.kv_heads:
        return scale
    groups = scale.reshape(block.kv_heads, block.heads // block.kv_heads, block.head_dim)
    return groups[:, 0].reshape(-1)

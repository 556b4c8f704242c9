"""Embedding and output head: rounded to nearest, packed, and put in the model's place of them.

They are a fifth of a small model and no block holds them, so every method treats them alike:
8 bits: absmax, a grid a row; fewer bits: zero-point, groups of the method's group size (64 where it
has none), float16 scales. A tied embedding and head are one packed weight, its bytes counted once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ConfigError, MethodError
from quantlab.grid import find_grid, spread, to_codes
from quantlab.layers import QuantEmbedding, QuantLinear, replace_linear
from quantlab.models import LoadedModel
from quantlab.packing import AffineWeight, PackedWeight, affine

GROUP_SIZE = 64


def check_outer(model: LoadedModel, config: Any) -> tuple[int, int]:
    """(embedding, head) bits that `config` asks for; 16 leaves one alone.

    Raises: ConfigError where a tied pair is set differently. Untying it would be larger and worse
    than the wider of the two for both, so there is nothing to offer. MethodError for an embedding
    that does more than look up rows.
    """
    wanted = getattr(config, "outer_bits", None)
    embedding_bits, head_bits = (16, 16) if wanted is None else wanted()
    if embedding_bits != head_bits and tied(model):
        best = max(embedding_bits, head_bits)
        raise ConfigError(
            f"embedding_bits={embedding_bits}, head_bits={head_bits}: this model's head is its "
            f"embedding (tied); set both alike, for example both to {best}"
        )
    if embedding_bits < 16 and not plain_embedding(model):
        raise MethodError(
            f"embedding_bits={embedding_bits}: the embedding of {model.family.name} does more than "
            "look up rows; use 16"
        )
    if head_bits < 16 and not isinstance(model.module.get_output_embeddings(), nn.Linear):
        raise MethodError(f"head_bits={head_bits}: {model.family.name} has no linear head; use 16")
    return embedding_bits, head_bits


def plain_embedding(model: LoadedModel) -> bool:
    """Whether the embedding looks up rows and does nothing else (Gemma 3's multiplies them)."""
    return type(model.module.get_input_embeddings()) is nn.Embedding


def tied(model: LoadedModel) -> bool:
    """Whether embedding and head are one tensor."""
    head = model.module.get_output_embeddings()
    embedding: Tensor = model.module.get_input_embeddings().weight
    return head is not None and bool(head.weight.data_ptr() == embedding.data_ptr())


@torch.no_grad()
def pack_outer(model: LoadedModel, config: Any) -> dict[str, PackedWeight]:
    """Replace embedding and head by packed layers as `config` asks; packed weights by path.

    A tied pair is listed once, under the embedding's path. Raises: as `check_outer`.
    """
    embedding_bits, head_bits = check_outer(model, config)
    module = model.module
    group = int(getattr(config, "group_size", GROUP_SIZE))
    embedding = head = None
    if embedding_bits < 16:
        embedding = round_outer(module.get_input_embeddings().weight, embedding_bits, group)
    if head_bits < 16 and not tied(model):
        head = round_outer(module.get_output_embeddings().weight, head_bits, group)
    return put_outer(model, embedding, head)


@torch.no_grad()
def put_outer(
    model: LoadedModel, embedding: PackedWeight | None, head: PackedWeight | None
) -> dict[str, PackedWeight]:
    """Put packed layers in the place of embedding and head, but where None is given; packed
    weights by path. The weight of a tied pair is the embedding's."""
    module = model.module
    layer, last = module.get_input_embeddings(), module.get_output_embeddings()
    shared = tied(model)
    packed: dict[str, PackedWeight] = {}
    if embedding is not None:
        path = path_of(module, layer)
        packed[path] = embedding
        replace_linear(module, path, QuantEmbedding(embedding, layer.weight.dtype))
        head = embedding if shared else head
    if head is not None:
        path = path_of(module, last)
        if not shared:
            packed[path] = head
        replace_linear(module, path, QuantLinear(head, last.bias))
    return packed


def path_of(module: nn.Module, child: nn.Module) -> str:
    """Dotted path of a submodule."""
    return next(path for path, found in module.named_modules() if found is child)


def round_outer(weight: Tensor, bits: int, group_size: int) -> AffineWeight:
    """Embedding or head [rows, columns] rounded to nearest: see the head of this file.

    Raises: MethodError for weights that are not finite."""
    weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise MethodError("the weights of the embedding or head are not finite")
    columns = weight.shape[1]
    symmetric = bits == 8
    group = columns if symmetric else min(group_size, columns)
    scale, zero = find_grid(weight, bits, group, symmetric=symmetric, scale_dtype=torch.float16)
    codes = to_codes(weight, spread(scale, group, columns), spread(zero, group, columns), bits)
    return affine(codes, scale, None if symmetric else zero, bits, group)

"""Tiny models with planted activation outliers, and what their first block really reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.methods import METHODS
from quantlab.models import LoadedModel
from tests.tiny import block_of, recorded_inputs, tiny, token_ids

IDS = token_ids(6, 40)
OUTLIERS = [-3, -17, -30]


def planted(name: str, seed: int = 0) -> LoadedModel:
    """A tiny model with a few channels of every fold's input many times larger than the others."""
    model = tiny(name, seed=seed)
    block = block_of(model)
    for fold in block.folds:
        # Values come last in a fused projection, and every family has 32 of them.
        block.module.get_submodule(fold.source).weight[OUTLIERS] *= 25
    return model


def statistics(model: LoadedModel, method: str) -> Mapping[str, ActStats]:
    """What `method` asks for, of the first block."""
    return BlockRunner(model, IDS).collect(block_of(model), METHODS[method].needs)


@torch.no_grad()
def inputs(model: LoadedModel) -> dict[str, Tensor]:
    """The input of every linear of the first block, float64 [tokens, columns]."""
    module = copy.deepcopy(model.module).double()
    with recorded_inputs(model.family, module) as seen:
        module(IDS, use_cache=False)
    prefix = f"{model.family.blocks}.0."
    return {path.removeprefix(prefix): torch.cat(x) for path, x in seen.items() if prefix in path}

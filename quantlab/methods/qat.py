"""Plain QAT: the whole model trained end to end on the text with its weights rounded.

Every linear computes with w^ = (clamp(round(w/s) + z) - z) s, gradients pass around the rounding
(straight-through), and weights and steps minimise the negative log-likelihood of the next token.

Sources: Jacob et al. 2018, arXiv 1712.05877, section 3 (training with simulated quantization);
Liu et al. 2023, LLM-QAT, arXiv 2305.17888, for language models (their data are sampled from the
model itself: calibrate on `self`; their goal is the original's predictions: goal=original). Here
for comparison with EfficientQAT: weights only, no quantized cache, and few steps. The whole model
is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.methods import base
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight
from quantlab.training.linears import FakeLinear, StepLinear
from quantlab.training.loops import Rates, last_states, train_model
from quantlab.training.start import begin, install
from quantlab.training.workshop import Workshop

SAVE_EVERY = 8
"""Steps between checkpoints, which are large: every weight with both of AdamW's moments."""


@dataclass(frozen=True)
class QATConfig(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", minimum=2, maximum=4)
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536, paper="a row"
    )
    epochs: int = base.option(
        2,
        "Epochs",
        "Passes over the calibration tokens.",
        minimum=0,
        maximum=100,
        paper="1 (of 100,000 x 512 sampled tokens)",
    )
    rate: float = base.option(
        0.005,
        "Learning rate",
        "What a weight can move by in one step of training, as a fraction of its step size.",
        minimum=0.0,
        maximum=1.0,
        step=0.001,
        paper="absolute: 2e-5",
    )
    goal: str = base.option(
        "text",
        "Goal",
        "text: the next token; original: the original's own predictions (KL divergence).",
        choices=("text", "original"),
        paper="text (QAT), original (LLM-QAT)",
    )
    batch_size: int = base.option(
        4,
        "Batch size",
        "Pieces of calibration text in one step of training.",
        minimum=1,
        maximum=256,
    )


@base.register
class QAT(base.Quantizer):
    name = "qat"
    title = "QAT"
    paper = "arXiv 1712.05877"
    summary = "Trains all weights end to end with rounding in the forward pass; slow."
    bits = (4, 2, 3)
    needs = ("second_moment",)
    trains = True
    Config = QATConfig

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: QATConfig
    ) -> dict[str, PackedWeight]:
        """What training begins with: rounding on clipped grids."""
        linears = begin(block, stats, config.bits, config.group_size, compensate=False)
        return {path: StepLinear.of(linear).packed() for path, linear in linears.items()}

    def train(
        self, model: LoadedModel, ids: Tensor, config: QATConfig, workshop: Workshop
    ) -> dict[str, PackedWeight]:
        batches = list(ids.split(config.batch_size))
        original = None
        if config.goal == "original" and config.epochs:
            original = last_states(model.module, batches)
        linears = self._begin(model, ids, config)
        blocks = block_list(model.module, model.family)
        if config.epochs:
            rates = Rates(config.rate, config.rate, 0.0, 0.1 * config.rate)
            train_model(
                model.module,
                list(blocks),
                batches,
                original,
                rates,
                config.epochs,
                workshop,
                "qat",
                SAVE_EVERY,
            )
        return {path: StepLinear.of(linear).packed() for path, linear in linears.items()}

    @torch.no_grad()
    def _begin(self, model: LoadedModel, ids: Tensor, config: QATConfig) -> dict[str, FakeLinear]:
        """Replace the linears of all blocks; grids from the original's activations."""
        runner = BlockRunner(model, ids)
        found: dict[str, FakeLinear] = {}
        for index in range(len(block_list(model.module, model.family))):
            block = get_block(model.module, model.family, index)
            stats = runner.collect(block, self.needs)
            linears = begin(block, stats, config.bits, config.group_size, compensate=False)
            runner.advance(block)
            install(block, linears)
            found |= {f"{model.family.blocks}.{index}.{path}": x for path, x in linears.items()}
        return found

    def train_passes(self, config: QATConfig) -> float:
        """A step of training is three forward passes, and rounding every weight costs another."""
        return 4.0 * config.epochs + 2.0

"""EfficientQAT: train a block at a time against its original, then only the steps end to end.

1. Block-AP ("block-wise training of all parameters"). With f a block, x its inputs in the original
   model and x~ its inputs after the quantized blocks before it, minimise

       || f~(x~; W, s, z, norms) - f(x) ||^2        w^ = (clamp(round(w/s) + round(z)) - round(z)) s

   over weights, steps, zero-points and norms together, then fix the codes and zero-points.
2. E2E-QP ("end-to-end training of quantization parameters"). Codes stay; the steps s of the whole
   model are trained on the text, here by default towards the original's own predictions.

Source: Chen et al. 2024, arXiv 2407.11062, section 3 and equations 1-6; the target f(x) on the
original's own inputs as in its authors' code. Different here, where a few tens of thousands of
tokens have to do: weights start compensated as in GPTQ, learning rates are relative to the step
size, each token's error counts relative to its size, and E2E-QP distils. The paper's plain loss,
start and goal are options.
The end-to-end phase needs the whole model in memory, so both phases keep it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.methods import base
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight
from quantlab.training.linears import FakeLinear, StepLinear
from quantlab.training.loops import Rates, last_states, train_block, train_model
from quantlab.training.start import begin, install
from quantlab.training.workshop import Workshop

SAVE_EVERY = 8
"""Steps of E2E-QP between checkpoints."""


@dataclass(frozen=True)
class EfficientQATConfig(base.WeightConfig):
    bits: int = base.option(2, "Bits", "Bits a weight.", minimum=2, maximum=4)
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536, paper="64, 128"
    )
    start: str = base.option(
        "compensated",
        "Start",
        "Training begins with GPTQ's compensated weights, or with the original's (rounded).",
        choices=("compensated", "rounded"),
        paper="rounded, from minimum to maximum",
    )
    block_epochs: int = base.option(
        2,
        "Epochs a block",
        "Passes over the calibration tokens for every block; 0 leaves Block-AP out.",
        minimum=0,
        maximum=100,
        paper="2 (of 4,096 x 2,048 tokens)",
    )
    block_rate: float = base.option(
        0.01,
        "Learning rate, weights",
        "What a weight can move by in one step of training, as a fraction of its step size.",
        minimum=0.0,
        maximum=1.0,
        step=0.001,
        paper="absolute: 2e-5 at 2 bits, 1e-5 at 3 and 4",
    )
    step_rate: float = base.option(
        0.005,
        "Learning rate, steps",
        "The same for step sizes and, in codes, for zero-points, while a block is trained.",
        minimum=0.0,
        maximum=1.0,
        step=0.001,
        paper="absolute: 1e-4",
    )
    block_loss: str = base.option(
        "token",
        "Block loss",
        "token: squared error of each token as a fraction of its size, so that a few massive "
        "activations do not outweigh all others; mean: plain mean squared error.",
        choices=("token", "mean"),
        paper="mean",
    )
    e2e_epochs: int = base.option(
        -1,
        "Epochs end to end",
        "Passes over the calibration tokens for the steps of all blocks; 0 leaves E2E-QP out, "
        "-1 is 3 at 2 bits and 1 above.",
        minimum=-1,
        maximum=100,
        paper="1 (of 4,096 x 4,096 tokens)",
    )
    e2e_rate: float = base.option(
        0.01,
        "Learning rate, end to end",
        "What a step can move by in one step of E2E-QP at 2 bits, as a fraction of itself; a "
        "quarter of it for each further bit: finer grids have less to gain and more to lose.",
        minimum=0.0,
        maximum=1.0,
        step=0.001,
        paper="absolute: 2e-5 at 2 bits, 1e-5 at 3 and 4",
    )
    goal: str = base.option(
        "original",
        "End-to-end goal",
        "original: the original's own predictions (KL divergence); text: the next token.",
        choices=("original", "text"),
        paper="text",
    )
    batch_size: int = base.option(
        2,
        "Batch size",
        "Pieces of calibration text in one step of training.",
        minimum=1,
        maximum=256,
        paper="2 for blocks, 32 end to end",
    )

    @property
    def passes_end_to_end(self) -> int:
        """`e2e_epochs`, chosen by the bits where it is -1: finer grids are learnt sooner."""
        if self.e2e_epochs >= 0:
            return self.e2e_epochs
        return 3 if self.bits == 2 else 1


@base.register
class EfficientQAT(base.Quantizer):
    name = "efficientqat"
    title = "EfficientQAT"
    paper = "arXiv 2407.11062"
    summary = "Trains each block against its original, then all step sizes end to end; slow."
    bits = (2, 3, 4)
    needs = ("second_moment",)
    trains = True
    Config = EfficientQATConfig

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: EfficientQATConfig
    ) -> dict[str, PackedWeight]:
        """What training begins with."""
        linears = self._begin(block, stats, config)
        return {path: StepLinear.of(linear).packed() for path, linear in linears.items()}

    def train(
        self, model: LoadedModel, ids: Tensor, config: EfficientQATConfig, workshop: Workshop
    ) -> dict[str, PackedWeight]:
        batches = list(ids.split(config.batch_size))
        original = None
        if config.goal == "original" and config.passes_end_to_end:
            original = last_states(model.module, batches)
        self._block_ap(model, ids, config, workshop)
        blocks = block_list(model.module, model.family)
        if config.passes_end_to_end:
            rate = config.e2e_rate * 4.0 ** (2 - config.bits)
            rates = Rates(weights=0.0, steps=rate, zeros=0.0, others=0.0)
            train_model(
                model.module,
                list(blocks),
                batches,
                original,
                rates,
                config.passes_end_to_end,
                workshop,
                "e2e_qp",
                SAVE_EVERY,
            )
        return {
            f"{model.family.blocks}.{path}": layer.packed()
            for path, layer in blocks.named_modules()
            if isinstance(layer, StepLinear)
        }

    @torch.no_grad()
    def _block_ap(
        self, model: LoadedModel, ids: Tensor, config: EfficientQATConfig, workshop: Workshop
    ) -> None:
        """Replace the linears of all blocks by trained `StepLinear`s, block after block."""
        runner = BlockRunner(model, ids, batch_tokens=config.batch_size * ids.shape[1])
        float_stream = runner.hidden  # before the current block, in the original
        own_stream = list(runner.hidden)  # the same after the quantized blocks
        count = len(block_list(model.module, model.family))
        steps = max(config.block_epochs * len(own_stream), 1)
        rates = Rates(
            weights=config.block_rate,
            steps=config.step_rate,
            zeros=config.step_rate,
            others=0.1 * config.step_rate,
        )
        curves = workshop.curves.setdefault("block_ap", [])
        for index in range(count):
            workshop.report("block_ap", index * steps, count * steps)
            block = get_block(model.module, model.family, index)
            targets = [runner.run(block, hidden).float() for hidden in float_stream]
            losses = restore_block(block, config, workshop)
            if losses is None:
                runner.hidden = own_stream
                linears = self._begin(block, runner.collect(block, self.needs), config)
                install(block, linears)
                losses = train_block(
                    block.module,
                    partial(runner.run, block),
                    own_stream,
                    targets,
                    rates,
                    config.block_epochs,
                    workshop.seed + index,
                    partial(workshop.report_part, "block_ap", index * steps, count * steps),
                    by_token=config.block_loss == "token",
                )
                freeze_block(block, linears)
                keep_block(block, losses, workshop)
            curves.append(losses)
            own_stream = [runner.run(block, hidden).float() for hidden in own_stream]
            float_stream = targets
        workshop.report("block_ap", count * steps, count * steps)

    def _begin(
        self, block: Block, stats: Mapping[str, ActStats], config: EfficientQATConfig
    ) -> dict[str, FakeLinear]:
        return begin(
            block,
            stats,
            config.bits,
            config.group_size,
            compensate=config.start == "compensated",
        )

    def train_passes(self, config: EfficientQATConfig) -> float:
        """A step of training is three forward passes; the original's targets are another."""
        return 3.0 * config.block_epochs + 3.5 * config.passes_end_to_end + 4.0


@torch.no_grad()
def freeze_block(block: Block, linears: Mapping[str, FakeLinear]) -> None:
    """Fix the codes; norms and biases are rounded to bfloat16, as they are stored."""
    for parameter in block.module.parameters():
        if parameter.dim() == 1:
            parameter.copy_(parameter.to(torch.bfloat16).float())
        parameter.requires_grad_(False)
    install(block, {path: StepLinear.of(linear) for path, linear in linears.items()})


def keep_block(block: Block, losses: list[float], workshop: Workshop) -> None:
    tensors: dict[str, Tensor] = {}
    for path, parameter in block.module.named_parameters():
        tensors[path] = parameter
    for path in block.linears:
        layer = block.module.get_submodule(path)
        assert isinstance(layer, StepLinear)
        tensors[f"{path}.codes"] = layer.codes().to(torch.uint8)
        tensors[f"{path}.zeros"] = layer.zeros
    workshop.save(f"block-{block.index:03d}", tensors, {"losses": losses})


@torch.no_grad()
def restore_block(
    block: Block, config: EfficientQATConfig, workshop: Workshop
) -> list[float] | None:
    """Put a block's checkpoint in place and return its losses; None where there is none."""
    kept = workshop.load(f"block-{block.index:03d}")
    if kept is None:
        return None
    tensors, state = kept
    layers = {}
    for path, linear in block.linears.items():
        codes, zeros = tensors.pop(f"{path}.codes").float(), tensors.pop(f"{path}.zeros")
        scale = tensors.pop(f"{path}.scale")
        layers[path] = StepLinear(codes, scale, zeros, config.bits, config.group_size, linear.bias)
    install(block, layers)
    own = dict(block.module.named_parameters())
    for path, tensor in tensors.items():
        own[path].copy_(tensor)
    for parameter in own.values():
        parameter.requires_grad_(False)
    return [float(loss) for loss in state["losses"]]

"""LLM.int8(): 8-bit weights and inputs, with the few huge columns of the input left in 16 bits.

    y = (q_x @ q_w.T) * s_x * s_w  +  x[:, O] @ (s_w q_w)[:, O].T        O = {j : any |x_j| >= 6}

    q_w = round(127 w / max|w|) a row of the weight, s_w = max|w| / 127; q_x, s_x the same a token,
    without the outliers

The set O is found at run time, over all tokens of a call, so a token's answer depends (within the
8-bit error) on the tokens it is run with. Weights need no data. Row-wise absmax on both sides is
the paper's vector-wise quantization.
Source: Dettmers et al. 2022, arXiv 2208.07339, sections 3.1 and 3.2; the division of the input's
outliers from its other values is that of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import OutlierWeight, PackedWeight, Storage

SMALLEST = 1e-30
"""Floor of the absmax that a row is divided by, so that rows of zeros stay finite."""


@dataclass(frozen=True)
class LLMInt8Config(base.WeightConfig):
    bits: int = base.option(8, "Bits", "Bits of weights and activations.", choices=(8,))
    threshold: float = base.option(
        6.0,
        "Outlier threshold",
        "An input column that holds this magnitude or more stays in 16 bits; 0 keeps none (plain "
        "row-wise W8A8).",
        minimum=0.0,
        maximum=64.0,
        step=0.5,
    )


@base.register
class LLMInt8(base.Quantizer):
    name = "llm_int8"
    title = "LLM.int8()"
    paper = "arXiv 2208.07339"
    summary = "8-bit weights and activations; outlier columns of the input stay in 16 bits."
    bits = (8,)
    Config = LLMInt8Config

    def activation_bits(self, config: LLMInt8Config) -> int:
        return 8

    def storage(self, config: LLMInt8Config) -> Storage:
        return Storage("outlier", (8,), None, True, outer=config.outer_bits())

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: LLMInt8Config
    ) -> dict[str, PackedWeight]:
        return {
            path: round_rows(linear.weight, config.threshold)
            for path, linear in block.linears.items()
        }


def round_rows(weight: Tensor, threshold: float) -> OutlierWeight:
    """The packed weight (float [rows, columns]): code = round(127 w / max|w|) in each row."""
    weight = weight.float()
    peaks = weight.abs().amax(1)
    codes = torch.round(weight * (127 / peaks.clamp_min(SMALLEST))[:, None]).to(torch.int8)
    return OutlierWeight(codes, peaks / 127, float(threshold))

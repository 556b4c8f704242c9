"""NF4: 4-bit codes into the quantiles of a normal distribution, the weights' usual shape.

    w ~ NF4[code] * absmax(block of 64)        absmax ~ dynamic8[code'] * absmax'(256 blocks) + mean

The second line is double quantization: 0.127 instead of 0.5 bits a weight for the scales. The data
type is in `quantlab.codebook`, the blocks run along the row-major weight as in bitsandbytes.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.calibration import ActStats
from quantlab.codebook import BLOCK_SIZES
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import PackedWeight, codebook_weight


@dataclass(frozen=True)
class NF4Config(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", choices=(4,))
    block_size: int = base.option(
        64, "Block size", "Consecutive weights that share one scale.", choices=BLOCK_SIZES
    )
    double_quant: bool = base.option(
        True, "Double quantization", "Keep the scales themselves in 8 bits, in blocks of 256."
    )


@base.register
class NF4(base.Quantizer):
    name = "nf4"
    title = "NF4"
    paper = "arXiv 2305.14314"
    summary = "4-bit codes into quantiles of the normal distribution (QLoRA); needs no data."
    bits = (4,)
    Config = NF4Config

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: NF4Config
    ) -> dict[str, PackedWeight]:
        return {
            path: codebook_weight(
                linear.weight, "nf4", config.block_size, double_quant=config.double_quant
            )
            for path, linear in block.linears.items()
        }

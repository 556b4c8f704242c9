"""FP4: 4-bit floats (a sign, two exponent bits, a mantissa bit) with a scale a block.

    w ~ FP4[code] * absmax(block of 64)        FP4: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and minus

Blocks, scales and double quantization are those of NF4; only the 16 values differ (see
`quantlab.codebook`). It is what NF4 is compared with.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 4 and bitsandbytes' data type.
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
class FP4Config(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", choices=(4,))
    block_size: int = base.option(
        64, "Block size", "Consecutive weights that share one scale.", choices=BLOCK_SIZES
    )
    double_quant: bool = base.option(
        True, "Double quantization", "Keep the scales themselves in 8 bits, in blocks of 256."
    )


@base.register
class FP4(base.Quantizer):
    name = "fp4"
    title = "FP4"
    paper = "arXiv 2305.14314"
    summary = "4-bit floats with a scale a block; needs no data."
    bits = (4,)
    Config = FP4Config

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: FP4Config
    ) -> dict[str, PackedWeight]:
        return {
            path: codebook_weight(
                linear.weight, "fp4", config.block_size, double_quant=config.double_quant
            )
            for path, linear in block.linears.items()
        }

"""What NF4 and FP4 share: 4-bit codes into a table of 16 values, with a scale a block of weights.

    w ~ table[code] * absmax(block of 64)      absmax ~ dynamic8[code'] * absmax'(256 blocks) + mean

The second line is double quantization: 0.127 instead of 0.5 bits a weight for the scales. The
tables are in `quantlab.codebook`, the blocks run along the row-major weight as in bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from quantlab.calibration import ActStats
from quantlab.codebook import BLOCK_SIZES, CodebookName
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import PackedWeight, Storage, codebook_weight


@dataclass(frozen=True)
class CodebookConfig(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", choices=(4,))
    block_size: int = base.option(
        64, "Block size", "Consecutive weights that share one scale.", choices=BLOCK_SIZES
    )
    double_quant: bool = base.option(
        True, "Double quantization", "Keep the scales themselves in 8 bits, in blocks of 256."
    )


class Codebook4(base.Quantizer):
    """A method of one table, `codebook`."""

    codebook: ClassVar[CodebookName]
    bits = (4,)
    Config = CodebookConfig

    def storage(self, config: CodebookConfig) -> Storage:
        return Storage("codebook", (4,), config.block_size, outer=config.outer_bits())

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: CodebookConfig
    ) -> dict[str, PackedWeight]:
        return {
            path: codebook_weight(
                linear.weight, self.codebook, config.block_size, double_quant=config.double_quant
            )
            for path, linear in block.linears.items()
        }

"""FP4: 4-bit floats (a sign, two exponent bits, a mantissa bit) with a scale a block.

    w ~ FP4[code] * absmax(block of 64)        FP4: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and minus

Only the 16 values differ from NF4, which it is compared with; see `codebook4` for the rest.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 4 and bitsandbytes' data type.
"""

from __future__ import annotations

from quantlab.methods import base
from quantlab.methods.codebook4 import Codebook4


@base.register
class FP4(Codebook4):
    name = "fp4"
    codebook = "fp4"
    title = "FP4"
    paper = "arXiv 2305.14314"
    summary = "4-bit floats with a scale a block; needs no data."

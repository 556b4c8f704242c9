"""NF4: 4-bit codes into the quantiles of a normal distribution, the weights' usual shape.

    w ~ NF4[code] * absmax(block of 64)

Blocks, scales and double quantization are in `codebook4`.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

from quantlab.methods import base
from quantlab.methods.codebook4 import Codebook4


@base.register
class NF4(Codebook4):
    name = "nf4"
    codebook = "nf4"
    title = "NF4"
    paper = "arXiv 2305.14314"
    summary = "4-bit codes into quantiles of the normal distribution (QLoRA); needs no data."

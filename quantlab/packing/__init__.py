"""Packed weights: bit packing, and the frozen representations that methods return.

`dequantize()` is the meaning of a packed weight; kernels and file formats must agree with it.
"""

from __future__ import annotations

from quantlab.packing.affine import Activation, AffineWeight, affine, affine_nbytes
from quantlab.packing.base import PackedWeight
from quantlab.packing.bits import pack_bits, packed_width, unpack_bits
from quantlab.packing.codebook import CodebookWeight, codebook_weight, pack_pairs
from quantlab.packing.files import REPRESENTATIONS, describe, restore
from quantlab.packing.ggml import GGMLWeight
from quantlab.packing.outlier import OutlierWeight
from quantlab.packing.permuted import PermutedWeight
from quantlab.packing.storage import Storage

__all__ = [
    "REPRESENTATIONS",
    "Activation",
    "AffineWeight",
    "CodebookWeight",
    "GGMLWeight",
    "OutlierWeight",
    "PackedWeight",
    "PermutedWeight",
    "Storage",
    "affine",
    "affine_nbytes",
    "codebook_weight",
    "describe",
    "pack_bits",
    "pack_pairs",
    "packed_width",
    "restore",
    "unpack_bits",
]

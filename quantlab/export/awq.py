"""AWQ files in the GEMM layout, as AutoAWQ, transformers (by GPTQModel) and vLLM load them.

Of a linear with weight [out, in], 4 bits, in groups of its columns:

    qweight  int32 [in, out / 8]       the codes of 8 neighbouring outputs in one word
    qzeros   int32 [groups, out / 8]   their zero-points
    scales   float16 [groups, out]

A word keeps the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight from the lowest bits up. Every group
has a zero-point.
Source: AutoAWQ 0.2.9, `modules/linear/gemm.py` and `utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.export import base
from quantlab.export.base import Expected, IntegerFormat, Layer, Linear
from quantlab.export.words import from_words, to_words
from quantlab.models.quantization import Quantization, Scheme
from quantlab.packing import AffineWeight, PackedWeight, Storage, affine

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUPS = (16, 32, 64, 128)
"""Group sizes that readers take, beside a whole row."""


class AWQFormat(IntegerFormat):
    name = "awq"
    title = "AWQ"
    marks = ("qweight",)

    def refusal(self, storage: Storage) -> str | None:
        if reason := base.weights_refusal(storage, self.title, (4,)):
            return reason
        if storage.symmetric:
            return "AWQ files have a zero-point for every group; symmetric=false has them"
        return None

    def shape_refusal(self, storage: Storage, rows: int, columns: int) -> str | None:
        if rows % 8:
            return f"{rows} rows do not fill words of 8 outputs"
        return base.group_refusal(storage, self.title, columns, GROUPS)

    def settings(
        self, packed: Mapping[str, AffineWeight], inner: Sequence[str], outer: Sequence[str]
    ) -> dict[str, Any]:
        size = base.common_group(packed, self.title)
        for path, weight in packed.items():
            if weight.bits != 4 or weight.symmetric:
                raise ConfigError(f"AWQ files hold 4 bits and zero-points; {path} has not")
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": -1 if size is None else size,
            "zero_point": True,
            "modules_to_not_convert": [*inner, *outer] or None,
        }

    def encode(self, weight: AffineWeight) -> dict[str, Tensor]:
        codes, _, zeros = weight.unpacked()
        return {
            "qweight": _interleave(codes.t()),
            "qzeros": _interleave(zeros.t()),
            "scales": weight.scales.t().contiguous(),
        }

    def fields(self, scheme: Scheme, linear: Linear) -> dict[str, Expected]:
        rows, columns = linear.shape
        groups = base.group_count(columns, scheme.group_size)
        return {
            "qweight": Expected(("I32",), (columns, rows // 8)),
            "qzeros": Expected(("I32",), (groups, rows // 8)),
            "scales": Expected(base.FLOATS, (groups, rows)),
        }

    def decode(
        self, quantization: Quantization, layer: Layer, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        scales = base.checked_scales(tensors["scales"].t())
        codes, zeros = (_restore(tensors[name]).t() for name in ("qweight", "qzeros"))
        return affine(codes, scales, zeros, 4, layer.group_size, scale_dtype=scales.dtype)


def _interleave(codes: Tensor) -> Tensor:
    """[n, outputs] -> int32 [n, outputs / 8]"""
    eights = codes.unflatten(1, (-1, 8))[..., list(ORDER)]
    return to_words(eights.flatten(1), 4)


def _restore(words: Tensor) -> Tensor:
    """int32 [n, outputs / 8] -> uint8 [n, outputs]"""
    eights = from_words(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
    back = torch.argsort(torch.tensor(ORDER))
    return eights[..., back].flatten(1)

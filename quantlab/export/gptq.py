"""GPTQ files, as AutoGPTQ began them and GPTQModel, transformers (by optimum) and vLLM load them.

Of a linear with weight [out, in], in groups of its columns:

    qweight  int32 [in * bits / 32, out]       codes of a column's rows as one bit stream downwards
    qzeros   int32 [groups, out * bits / 32]   zero-points of a group as one bit stream
    scales   float16 [groups, out]
    g_idx    int32 [in]                        the group of each input

`gptq` (version 1) keeps zero-points minus 1, so that 0 does not fit and readers differ in what they
make of it; `gptq_v2` keeps them as they are. Symmetric weights, whose zero-point is 2**(bits - 1),
are written in version 1, which everything reads; others in version 2. Both are read, the offset
undone as GPTQModel does it: added to whole words.
Act-order files name the group of each column in g_idx. Blocks of columns that are whole groups, in
any order, are read as such; else the columns are put in the order of their groups.
Sources: AutoGPTQ 0.7 `qlinear_cuda_old.py`; GPTQModel 7 `nn_modules/qlinear` and `utils/model.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ConfigError, ModelError
from quantlab.export import base
from quantlab.export.base import Expected, IntegerFormat, Layer, Linear
from quantlab.export.words import from_words, to_words, words_for
from quantlab.models.quantization import GPTQ_BITS, Quantization, Scheme
from quantlab.packing import AffineWeight, PackedWeight, PermutedWeight, Storage, affine

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that GPTQModel's layers take, beside a whole row."""


class GPTQFormat(IntegerFormat):
    name = "gptq"
    title = "GPTQ"
    marks = ("qweight",)
    conv1d = True

    def refusal(self, storage: Storage) -> str | None:
        return base.weights_refusal(storage, self.title, GPTQ_BITS)

    def shape_refusal(self, storage: Storage, rows: int, columns: int) -> str | None:
        if reason := base.group_refusal(storage, self.title, columns, GROUPS):
            return reason
        for bits in storage.bits:
            for what, count in (("rows", rows), ("columns", columns)):
                if count * bits % 32:
                    return f"{count} {what} of {bits} bits do not fill words of 32"
        return None

    def settings(
        self, packed: Mapping[str, AffineWeight], inner: Sequence[str], outer: Sequence[str]
    ) -> dict[str, Any]:
        size = base.common_group(packed, self.title)
        bits, _ = Counter(weight.bits for weight in packed.values()).most_common(1)[0]
        symmetric = {weight.symmetric for weight in packed.values()}
        if len(symmetric) > 1:
            raise ConfigError("GPTQ files are symmetric or not as a whole")
        others: dict[str, dict[str, int]] = {
            f"+:^{re.escape(path)}$": {"bits": weight.bits}
            for path, weight in packed.items()
            if weight.bits != bits
        }
        others |= {f"-:^{re.escape(path)}$": {} for path in inner}
        kind = "gptq" if symmetric == {True} else "gptq_v2"
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": kind,
            "format": kind,
            "bits": bits,
            "group_size": -1 if size is None else size,
            "sym": symmetric == {True},
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        return settings | ({"dynamic": others} if others else {})

    def more_files(self, settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"quantize_config.json": settings}

    def encode(self, weight: AffineWeight) -> dict[str, Tensor]:
        codes, _, zeros = weight.unpacked()
        offset = 1 if weight.symmetric else 0
        return {
            "qweight": to_words(codes, weight.bits).t().contiguous(),
            "qzeros": to_words((zeros - offset).t(), weight.bits),
            "scales": weight.scales.t().contiguous(),
            "g_idx": (torch.arange(weight.columns) // weight.group_size).to(torch.int32),
        }

    def scheme(self, quantization: Quantization, linear: Linear) -> Scheme:
        scheme, stored, shape = quantization.schemes[0], linear.stored, linear.shape
        found = stored["qweight"].shape
        if not quantization.by_layer or len(found) != 2 or not found[0]:
            return scheme
        # Settings by layer are patterns; the shapes say the same, and cannot be wrong.
        bits = found[0] * 32 // shape[1]
        if bits not in GPTQ_BITS:
            raise ModelError(
                f"model: {linear.path} has codes of {bits} bits; QuantLab reads {GPTQ_BITS}"
            )
        groups = stored["scales"].shape[0] if "scales" in stored else 1
        size = scheme.group_size
        if groups != base.group_count(shape[1], size):
            size = None if groups <= 1 else -(-shape[1] // groups)
        return Scheme(bits, size, scheme.symmetric)

    def fields(self, scheme: Scheme, linear: Linear) -> dict[str, Expected]:
        rows, columns = linear.shape
        groups = base.group_count(columns, scheme.group_size)
        fields = {
            "qweight": Expected(("I32",), (words_for(columns, scheme.bits), rows)),
            "qzeros": Expected(("I32",), (groups, words_for(rows, scheme.bits))),
            "scales": Expected(base.FLOATS, (groups, rows)),
        }
        if "g_idx" in linear.stored:
            fields["g_idx"] = Expected(("I32", "I64"), (columns,))
        return fields

    def decode(
        self, quantization: Quantization, layer: Layer, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        (rows, columns), bits, size = layer.shape, layer.scheme.bits, layer.group_size
        codes = from_words(tensors["qweight"].t(), bits, columns)
        scales = base.checked_scales(tensors["scales"].t())
        stored_zeros = _zeros(tensors["qzeros"], bits, rows, quantization.zero_offset).t()
        middle = layer.scheme.symmetric and bool((stored_zeros == 2 ** (bits - 1)).all())
        zeros = None if middle else stored_zeros

        def build(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> AffineWeight:
            return affine(codes, scales, zeros, bits, size, scale_dtype=scales.dtype)

        index = tensors.get("g_idx")
        if index is None:
            return build(codes, scales, zeros)
        index = index.long()
        if int(index.min()) < 0 or int(index.max()) >= scales.shape[1]:
            raise ConfigError(f"g_idx names groups outside of 0 to {scales.shape[1] - 1}")
        first = index[::size]
        if bool((first[torch.arange(columns) // size] == index).all()):
            return build(codes, scales[:, first], None if zeros is None else zeros[:, first])
        order = base.columns_by_group(index, size, "g_idx")
        return PermutedWeight(build(codes[:, order], scales, zeros), order.to(torch.int32))


def _zeros(words: Tensor, bits: int, rows: int, offset: int) -> Tensor:
    """uint8 [groups, rows]; 1 is added to each code where `offset` is 1."""
    if not offset:
        return from_words(words, bits, rows)
    if bits == 3:  # codes run across words, so they are shifted one by one
        return (from_words(words, bits, rows) + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return from_words(words + ones, bits, rows)

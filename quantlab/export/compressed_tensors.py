"""compressed-tensors files, as llm-compressor writes and vLLM and transformers load them.

Of a linear with weight [out, in], weights alone in 4 or 8 bits (`pack-quantized`):

    weight_packed      int32 [out, in * bits / 32]     codes of a row as one bit stream
    weight_scale       [out, groups]
    weight_zero_point  int32 [out * bits / 32, groups]  zero-points of a group; none if symmetric
    weight_shape       int64 [2]                        out, in

and 8-bit weights with 8-bit inputs (`int-quantized`):

    weight             int8 [out, in]
    weight_scale       [out, 1] or [1]
    weight_zero_point  int8 like the scales, unless symmetric
    input_scale, input_zero_point   [1], where inputs have one fixed grid (int8)

Codes and zero-points of int8 are QuantLab's less 128. Static grids of inputs are written with their
zero-point, dynamic ones a token.
Source: compressed-tensors 0.20, `compressors/` and `quantization/quant_args.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.export import base
from quantlab.export.base import Expected, IntegerFormat, Layer, Linear, Stored
from quantlab.export.words import from_words, to_words, words_for
from quantlab.models.quantization import Quantization, Scheme
from quantlab.packing import (
    Activation,
    AffineWeight,
    PackedWeight,
    PermutedWeight,
    Storage,
    affine,
)
from quantlab.packing.storage import Inputs

WRITTEN_INPUTS: dict[Inputs, tuple[str, bool, bool]] = {
    "token": ("token", True, True),
    "dynamic_token": ("token", True, False),
    "tensor": ("tensor", False, False),
}
"""How inputs are quantized -> strategy, dynamic, symmetric."""


class CompressedTensorsFormat(IntegerFormat):
    name = "compressed-tensors"
    title = "compressed-tensors"
    marks = ("weight_scale",)

    def refusal(self, storage: Storage) -> str | None:
        if reason := base.common_refusal(storage, self.title):
            return reason
        if storage.activation is None:
            if storage.one_scale:
                return "weights alone have a scale for every row or group, not one for a matrix"
            return base.bits_refusal(storage, self.title, (4, 8))
        if storage.activation not in WRITTEN_INPUTS:
            return (
                "vLLM takes inputs with a fixed grid or one for each token, not one for the whole "
                "input at run time"
            )
        return None

    def shape_refusal(self, storage: Storage, rows: int, columns: int) -> str | None:
        if storage.activation is not None:
            return None
        for bits in storage.bits:
            if columns * bits % 32 or (not storage.symmetric and rows * bits % 32):
                return f"{rows} rows of {columns} columns do not fill words of 32 at {bits} bits"
        return base.group_refusal(storage, self.title, columns, None)

    def settings(
        self, packed: Mapping[str, AffineWeight], inner: Sequence[str], outer: Sequence[str]
    ) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {}
        targets: dict[str, list[str]] = {}
        for path, weight in packed.items():
            group = _config_group(weight)
            key = repr(group)
            groups.setdefault(key, group)
            targets.setdefault(key, []).append(path)
        most = max(targets, key=lambda key: len(targets[key]))
        # Names go before classes: readers take the first group that matches.
        ordered = sorted(groups, key=lambda key: key == most)
        formats = sorted({group["format"] for group in groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "config_groups": {
                f"group_{number}": groups[key]
                | {"targets": ["Linear"] if key == most else targets[key]}
                for number, key in enumerate(ordered)
            },
            "ignore": [*inner, *outer],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def encode(self, weight: AffineWeight) -> dict[str, Tensor]:
        codes, _, zeros = weight.unpacked()
        if weight.activation is None:
            tensors = {
                "weight_packed": to_words(codes, weight.bits),
                "weight_scale": weight.scales,
                "weight_shape": torch.tensor(weight.shape),
            }
            if not weight.symmetric:
                tensors["weight_zero_point"] = to_words(zeros.t(), weight.bits).t().contiguous()
            return tensors
        one = weight.scales.shape[0] == 1 < weight.shape[0]
        scales = weight.scales.flatten() if one else weight.scales
        tensors = {"weight": _to_int8(codes), "weight_scale": scales}
        if not weight.symmetric:
            tensors["weight_zero_point"] = _to_int8(zeros.to(torch.uint8)).reshape(scales.shape)
        if weight.activation.kind == "tensor":
            tensors["input_scale"] = torch.tensor([weight.activation.scale])
            zero = weight.activation.zero - 128
            tensors["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
        return tensors

    def fields(self, scheme: Scheme, linear: Linear) -> dict[str, Expected]:
        (rows, columns), stored = linear.shape, linear.stored
        groups = base.group_count(columns, scheme.group_size)
        scales = (1,) if scheme.one_scale else (rows, groups)
        if scheme.one_scale and stored.get("weight_scale", Stored("", ())).shape == (1, 1):
            scales = (1, 1)
        fields = {"weight_scale": Expected(base.FLOATS, scales)}
        if scheme.int8:
            fields["weight"] = Expected(("I8",), linear.shape)
        else:
            fields["weight_packed"] = Expected(("I32",), (rows, words_for(columns, scheme.bits)))
            fields["weight_shape"] = Expected(("I64", "I32"), (2,))
        if not scheme.symmetric:
            zeros = scales if scheme.int8 else (words_for(rows, scheme.bits), groups)
            fields["weight_zero_point"] = Expected(("I8",) if scheme.int8 else ("I32",), zeros)
        if "weight_g_idx" in stored:
            fields["weight_g_idx"] = Expected(("I32", "I64"), (columns,))
        if scheme.activation == "tensor":
            for field, dtypes in (("input_scale", base.FLOATS), ("input_zero_point", ("I8",))):
                if field == "input_scale" or field in stored:
                    one = stored.get(field, Stored("", (1,))).shape
                    fields[field] = Expected(dtypes, one if one in ((), (1,), (1, 1)) else (1,))
        return fields

    def decode(
        self, quantization: Quantization, layer: Layer, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        scheme, shape, size = layer.scheme, layer.shape, layer.group_size
        (rows, columns), bits = shape, scheme.bits
        scales = base.checked_scales(tensors["weight_scale"])
        scales = scales.reshape(1, 1) if scheme.one_scale else scales
        zeros = tensors.get("weight_zero_point") if not scheme.symmetric else None
        if scheme.int8:
            codes = _from_int8(tensors["weight"])
            zeros = None if zeros is None else _from_int8(zeros).reshape(scales.shape)
        else:
            if tuple(tensors["weight_shape"].tolist()) != shape:
                raise ConfigError(
                    f"weight_shape is {tensors['weight_shape'].tolist()}, not {shape}"
                )
            codes = from_words(tensors["weight_packed"], bits, columns)
            zeros = None if zeros is None else from_words(zeros.t(), bits, rows).t()
        activation = None
        if scheme.activation is not None:
            activation = _activation(scheme.activation, tensors)
        index, order = tensors.get("weight_g_idx"), None
        if index is not None and not bool((index.long() < 0).any()):  # -1: not used
            order = base.columns_by_group(index.long(), size, "weight_g_idx")
            if torch.equal(order, torch.arange(columns)):
                order = None
        made = affine(
            codes if order is None else codes[:, order],
            scales,
            zeros,
            bits,
            size,
            scale_dtype=scales.dtype,
            activation=activation,
        )
        return made if order is None else PermutedWeight(made, order.to(torch.int32))


def _config_group(weight: AffineWeight) -> dict[str, Any]:
    """The scheme of one linear, as `quantization_config` has it. Raises: ConfigError."""
    size = base.group_of(weight)
    if size is not None and weight.columns % size:
        raise ConfigError(f"groups of {size} do not divide {weight.columns} columns")
    one = weight.scales.shape[0] == 1 < weight.shape[0]
    strategy = "tensor" if one else "channel" if size is None else "group"
    weights = _arguments(weight.bits, strategy, False, weight.symmetric, size)
    if weight.activation is None:
        return {"weights": weights, "input_activations": None, "format": "pack-quantized"}
    if weight.activation.kind not in WRITTEN_INPUTS:
        raise ConfigError(f"no reader takes inputs quantized by {weight.activation.kind}")
    how, dynamic, symmetric = WRITTEN_INPUTS[weight.activation.kind]
    inputs = _arguments(8, how, dynamic, symmetric, None)
    return {"weights": weights, "input_activations": inputs, "format": "int-quantized"}


def _arguments(
    bits: int, strategy: str, dynamic: bool, symmetric: bool, size: int | None
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": dynamic,
    }


def _to_int8(codes: Tensor) -> Tensor:
    """uint8 c -> int8 c - 128"""
    return (codes ^ 128).view(torch.int8)


def _from_int8(codes: Tensor) -> Tensor:
    """int8 c -> uint8 c + 128"""
    return codes.view(torch.uint8) ^ 128


def _activation(kind: Inputs, tensors: Mapping[str, Tensor]) -> Activation:
    """Raises: ConfigError for a step that is not finite and positive."""
    if kind != "tensor":
        return Activation(kind)
    scale = float(tensors["input_scale"].reshape(()))
    if not 0 < scale < float("inf"):
        raise ConfigError(f"input_scale is {scale}, which is no step")
    zero = tensors.get("input_zero_point")
    return Activation(kind, scale, 128 if zero is None else int(zero.reshape(())) + 128)

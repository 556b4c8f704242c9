"""bitsandbytes files, as transformers writes and loads them: NF4 and FP4, and LLM.int8().

Of a linear with weight [out, in], 4 bits in blocks of its row-major values:

    weight                 uint8 [ceil(out * in / 2), 1]   two codes a byte, the first one high
    weight.absmax          float32 [blocks], or uint8 with double quantization
    weight.quant_map       float32 [16]      what the codes stand for
    weight.nested_absmax   float32 [ceil(blocks / 256)]    } with double quantization
    weight.nested_quant_map  float32 [256]                 }
    weight.quant_state.bitsandbytes__nf4 (or fp4)   uint8: JSON with block size, shape and offset

and of LLM.int8():

    weight   int8 [out, in]      SCB   float32 [out], the rows' max|w|      weight_format   uint8, 0

Source: bitsandbytes 0.50.2, `functional.py` (`QuantState`) and `nn/modules.py` (`Linear8bitLt`);
transformers 5.23, `BitsAndBytesConfig`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab.codebook import (
    BLOCK_SIZES,
    CODEBOOKS,
    NESTED_BLOCK,
    CodebookName,
    codebook,
    dynamic_codebook,
)
from quantlab.errors import ConfigError
from quantlab.export import base
from quantlab.export.base import CheckpointFormat, Expected, Layer, Linear
from quantlab.models.quantization import Quantization, Scheme
from quantlab.packing import CodebookWeight, OutlierWeight, PackedWeight, Storage

INSIDE = "weight."
STATE = "weight.quant_state.bitsandbytes__"
STATE_BYTES = 4096
"""More than any state is long: 167 bytes are usual."""
MAP_TOLERANCE = 1e-6
"""By which a file's table may differ from QuantLab's: ten roundings of float32 at 1."""

Own = CodebookWeight | OutlierWeight


class BitsAndBytesFormat(CheckpointFormat[Own]):
    name = "bitsandbytes"
    title = "bitsandbytes"
    marks = ("SCB", *(STATE + name for name in CODEBOOKS))

    def split(self, name: str) -> tuple[str, str]:
        """Fields of 4-bit weights have a dot of their own."""
        path, found, rest = name.partition(f".{INSIDE}")
        return (path, INSIDE + rest) if found else super().split(name)

    def refusal(self, storage: Storage) -> str | None:
        if storage.representation not in ("codebook", "outlier"):
            return (
                "bitsandbytes files hold NF4, FP4 and LLM.int8(), not "
                f"{'ggml blocks' if storage.representation == 'ggml' else 'integer grids'}"
            )
        return base.outer_refusal(storage, self.title)

    def shape_refusal(self, storage: Storage, rows: int, columns: int) -> str | None:
        return None

    def own(self, path: str, weight: PackedWeight) -> Own:
        if not isinstance(weight, CodebookWeight | OutlierWeight):
            kind = type(weight).__name__
            raise ConfigError(f"bitsandbytes files hold NF4, FP4 and LLM.int8(); {path} is {kind}")
        return weight

    def settings(
        self, packed: Mapping[str, Own], inner: Sequence[str], outer: Sequence[str]
    ) -> dict[str, Any]:
        first = next(iter(packed.values()))
        for path, weight in packed.items():
            if _kind(weight) != _kind(first):
                raise ConfigError(
                    f"bitsandbytes files keep all linears alike: {path} is {_kind(weight)}, others "
                    f"{_kind(first)}"
                )
        four = isinstance(first, CodebookWeight)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": first.codebook if isinstance(first, CodebookWeight) else "fp4",
            "bnb_4bit_use_double_quant": "nested_absmax" in first.tensors(),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0 if isinstance(first, CodebookWeight) else first.threshold,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": [*inner, *outer] or None,
        }

    def encode(self, weight: Own) -> dict[str, Tensor]:
        if isinstance(weight, OutlierWeight):
            return {
                "weight": weight.codes,
                "SCB": _peaks(weight.scales),
                "weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        state: dict[str, Any] = {
            "quant_type": weight.codebook,
            "blocksize": weight.block_size,
            "dtype": "bfloat16",
            "shape": list(weight.shape),
        }
        fields = {
            "weight": weight.codes[:, None],
            "weight.absmax": weight.absmax,
            "weight.quant_map": codebook(weight.codebook).clone(),
        }
        if weight.nested_absmax is not None and weight.offset is not None:
            fields |= {
                "weight.nested_absmax": weight.nested_absmax,
                "weight.nested_quant_map": dynamic_codebook().clone(),
            }
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(weight.offset),
            }
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        return fields | {STATE + weight.codebook: text}

    def fields(self, scheme: Scheme, linear: Linear) -> dict[str, Expected]:
        (rows, columns), stored = linear.shape, linear.stored
        if scheme.bits == 8:
            found = {
                "weight": Expected(("I8",), linear.shape),
                "SCB": Expected(("F32",), (rows,)),
            }
            if "weight_format" in stored:
                found["weight_format"] = Expected(("U8",), ())
            return found
        count = rows * columns
        state = next((STATE + name for name in CODEBOOKS if STATE + name in stored), self.marks[1])
        length = stored[state].shape if state in stored else ()
        absmax = stored.get("weight.absmax")
        sizes = [size for size in BLOCK_SIZES if absmax and absmax.shape == (-(-count // size),)]
        blocks = math.ceil(count / (sizes[0] if sizes else BLOCK_SIZES[1]))
        nested = "weight.nested_absmax" in stored
        found = {
            "weight": Expected(("U8",), (math.ceil(count / 2), 1)),
            "weight.absmax": Expected(("U8",) if nested else ("F32",), (blocks,)),
            "weight.quant_map": Expected(("F32",), (16,)),
            state: Expected(("U8",), length if sum(length) <= STATE_BYTES else (STATE_BYTES,)),
        }
        if nested:
            found["weight.nested_absmax"] = Expected(("F32",), (math.ceil(blocks / NESTED_BLOCK),))
            found["weight.nested_quant_map"] = Expected(("F32",), (256,))
        return found

    def decode(
        self, quantization: Quantization, layer: Layer, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        if layer.scheme.bits == 8:
            if int(tensors.get("weight_format", torch.tensor(0))) != 0:
                raise ConfigError("weight_format is not 0, the plain row-major layout")
            scales = base.checked_scales(tensors["SCB"]) / 127
            return OutlierWeight(tensors["weight"].contiguous(), scales, quantization.threshold)
        field = next(name for name in tensors if name.startswith(STATE))
        name: CodebookName = "nf4" if field == STATE + "nf4" else "fp4"
        nested = tensors.get("weight.nested_absmax")
        size, offset = _state(tensors[field], name, layer.shape, nested is not None)
        _check_table("quant_map", tensors["weight.quant_map"], codebook(name))
        absmax = tensors["weight.absmax"].contiguous()
        if nested is None:
            absmax = base.checked_scales(absmax)
        else:
            _check_table("nested_quant_map", tensors["weight.nested_quant_map"], dynamic_codebook())
            nested = base.checked_scales(nested)
        rows, columns = layer.shape
        codes = tensors["weight"].flatten().contiguous()
        return CodebookWeight(codes, absmax, name, size, rows, columns, nested, offset)


def _peaks(scales: Tensor) -> Tensor:
    """The float32 whose 127th part is the scale, as it was made. Raises: ConfigError for a scale
    that is the 127th part of none."""
    middle = scales * 127
    below, above = (
        torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, math.inf)
    )
    for candidate in (below, above):
        middle = torch.where(middle / 127 == scales, middle, candidate)
    if not torch.equal(middle / 127, scales):
        raise ConfigError("bitsandbytes files hold scales that are max|w| / 127; this one is not")
    return middle


def _kind(weight: Own) -> tuple[object, ...]:
    """What the settings say of all linears at once."""
    if isinstance(weight, OutlierWeight):
        return "LLM.int8()", f"threshold {weight.threshold:g}"
    double = "with" if weight.nested_absmax is not None else "without"
    return weight.codebook, f"{double} double quantization"


def _state(
    text: Tensor, name: CodebookName, shape: tuple[int, int], nested: bool
) -> tuple[int, Tensor | None]:
    """Block size and offset from a linear's JSON. Raises: ConfigError where it says otherwise than
    the tensors beside it."""
    try:
        state = json.loads(bytes(text.tolist()))
        said = state["quant_type"], tuple(state["shape"]), state["blocksize"]
        inner = state.get("nested_blocksize", NESTED_BLOCK)
        offset = torch.tensor(float(state["nested_offset"])) if nested else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"its quant_state cannot be read ({type(error).__name__})") from None
    quant_type, found, size = said
    if quant_type != name or found != shape or size not in BLOCK_SIZES or inner != NESTED_BLOCK:
        raise ConfigError(
            f"its quant_state says {quant_type}, shape {list(found)}, blocks of {size}"[:200]
            + f"; the file has {name}, {list(shape)}"
        )
    if offset is not None and not math.isfinite(float(offset)):
        raise ConfigError("its quant_state has an offset that is not finite")
    return size, offset


def _check_table(field: str, found: Tensor, wanted: Tensor) -> None:
    if not bool(((found - wanted).abs() <= MAP_TOLERANCE).all()):
        raise ConfigError(f"its {field} is another table than bitsandbytes' own")

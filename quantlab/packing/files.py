"""A packed weight as plain JSON and named tensors, and back: what files keep of it."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.packing.affine import Activation, AffineWeight
from quantlab.packing.base import PackedWeight
from quantlab.packing.codebook import CodebookWeight
from quantlab.packing.ggml import GGMLWeight
from quantlab.packing.outlier import OutlierWeight
from quantlab.packing.permuted import PermutedWeight

REPRESENTATIONS: dict[
    str, type[AffineWeight] | type[CodebookWeight] | type[GGMLWeight] | type[OutlierWeight]
] = {
    "affine": AffineWeight,
    "codebook": CodebookWeight,
    "ggml": GGMLWeight,
    "outlier": OutlierWeight,
}


PERMUTED = "permuted"


def describe(weight: PackedWeight) -> dict[str, object]:
    """The fields of a packed weight that are not tensors, plus its `representation`: plain JSON."""
    if isinstance(weight, PermutedWeight):
        return {**describe(weight.inner), "representation": PERMUTED}
    for name, cls in REPRESENTATIONS.items():
        if isinstance(weight, cls):
            plain: dict[str, object] = {"representation": name}
            for field in dataclasses.fields(weight):
                value = getattr(weight, field.name)
                if isinstance(value, Activation):
                    value = dataclasses.asdict(value)
                if not isinstance(value, Tensor) and value is not None:
                    plain[field.name] = value
            return plain
    raise ConfigError(f"no file representation for {type(weight).__name__}")


def restore(description: dict[str, object], tensors: dict[str, Tensor]) -> PackedWeight:
    """The inverse of `describe` and `tensors`. Raises: ConfigError for unknown or missing parts."""
    plain = dict(description)
    name = str(plain.pop("representation", ""))
    if name == PERMUTED:
        inner = {field: tensor for field, tensor in tensors.items() if field != "order"}
        affine = restore({**plain, "representation": "affine"}, inner)
        if not isinstance(affine, AffineWeight) or "order" not in tensors:
            raise ConfigError("packed weight is incomplete: it has no order")
        return PermutedWeight(affine, tensors["order"])
    if name not in REPRESENTATIONS:
        raise ConfigError(f"unknown representation {name!r}; this version reads {REPRESENTATIONS}")
    if isinstance(plain.get("activation"), dict):
        plain["activation"] = Activation(**plain["activation"])  # type: ignore[arg-type]
    if name == "affine":
        plain.setdefault("activation", None)
        tensors = {"zeros": None, **tensors}  # type: ignore[dict-item]
    try:
        return REPRESENTATIONS[name](**plain, **tensors)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"packed weight is incomplete: {error}") from None

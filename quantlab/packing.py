"""Packed weights: bit packing, and the frozen representations that methods return.

`dequantize()` is the meaning of a packed weight; kernels and file formats must agree with it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.ggml import FORMATS, dequantize_rows
from quantlab.grid import spread


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [rows, n] (0 <= code < 2**bits) into uint8 [rows, ceil(n * bits / 8)].

    A row is one little-endian bit stream: code i occupies bits i*bits to (i+1)*bits - 1.
    """
    _check_bits(bits)
    codes = codes.to(torch.uint8)
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).to(torch.int64)
    # Eight codes make `bits` whole bytes: gather them in one 64-bit word, then split it.
    groups = padded.reshape(rows, -1, 8)
    word = (groups << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    shifts = torch.arange(bits, device=codes.device) * 8
    packed = ((word[..., None] >> shifts) & 0xFF).to(torch.uint8).reshape(rows, -1)
    return packed[:, : packed_width(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (uint8 [rows, count]) that `pack_bits` packed."""
    _check_bits(bits)
    if bits == 8:
        return packed[:, :count]
    if bits == 4:
        pair = torch.stack((packed & 15, packed >> 4), -1)
        return pair.flatten(1)[:, :count]
    padded: Tensor = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).to(torch.int64)
    groups = padded.unflatten(1, (-1, bits))
    word = (groups << (torch.arange(bits, device=packed.device) * 8)).sum(-1)
    shifts = torch.arange(8, device=packed.device) * bits
    codes: Tensor = ((word[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :count]


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits}: codes are packed with 1 to 8 bits")


@runtime_checkable
class PackedWeight(Protocol):
    """What every representation offers. `shape` is (rows = out features, columns = in features)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Bytes at rest: codes, scales, zeros and codebooks."""
        ...

    @property
    def bits_per_weight(self) -> float: ...

    def dequantize(self) -> Tensor:
        """The weight it stands for: float32 [rows, columns]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to keep, by field name."""
        ...


@dataclass(frozen=True)
class Activation:
    """How the input of a W8A8 linear is quantized, 8 bits.

    'token': one absmax step for each row at run time, x ~ code * max|x| / 127.
    'tensor': the fixed step and zero-point found in calibration, x ~ (code - zero) * scale with
    codes 0 to 255.
    """

    kind: Literal["token", "tensor"]
    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True)
class AffineWeight:
    """Codes on uniform grids: w = (code - zero) * scale, one grid for each row and group.

    codes: uint8 [rows, ceil(columns * bits / 8)] (`pack_bits`); scales: float16 or float32
    [rows or 1, groups]; zeros: uint8 [rows or 1, ceil(groups * bits / 8)] packed like codes, or
    None for symmetric grids, where zero = 2**(bits - 1). `group_size` = columns means a grid a row;
    a single row of scales serves every row (a grid a tensor).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    columns: int
    activation: Activation | None = None

    def __post_init__(self) -> None:
        groups = -(-self.columns // self.group_size) if self.group_size > 0 else 0
        wanted = (self.codes.shape[0], packed_width(self.columns, self.bits))
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != wanted:
            raise ConfigError(f"affine codes {tuple(self.codes.shape)}: expected uint8 {wanted}")
        if self.scales.shape[-1] != groups or self.scales.shape[0] not in (1, wanted[0]):
            raise ConfigError(f"affine scales {tuple(self.scales.shape)}: expected {groups} groups")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return _bits_per_weight(self)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes uint8 [rows, columns], scales float32, zeros float32), grids [rows or 1, groups].

        Memory: one byte a weight while the caller holds it."""
        codes = unpack_bits(self.codes, self.bits, self.columns)
        scales = self.scales.float()
        if self.zeros is None:
            return codes, scales, torch.full_like(scales, float(2 ** (self.bits - 1)))
        return codes, scales, unpack_bits(self.zeros, self.bits, scales.shape[1]).float()

    def dequantize(self) -> Tensor:
        codes, scales, zeros = self.unpacked()
        scale = spread(scales, self.group_size, self.columns)
        zero = spread(zeros, self.group_size, self.columns)
        return codes.float().sub_(zero).mul_(scale)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes, "scales": self.scales}
        return tensors if self.zeros is None else {**tensors, "zeros": self.zeros}


def affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    activation: Activation | None = None,
) -> AffineWeight:
    """Pack float or integer codes [rows, columns] with their grids [rows or 1, groups]."""
    return AffineWeight(
        codes=pack_bits(codes, bits),
        scales=scale.to(scale_dtype).contiguous(),
        zeros=None if zero is None else pack_bits(zero, bits),
        bits=bits,
        group_size=group_size,
        columns=codes.shape[1],
        activation=activation,
    )


def affine_nbytes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> int:
    """Bytes of an AffineWeight with float16 scales and a grid a row and group, before it exists."""
    groups = -(-columns // group_size)
    zeros = 0 if symmetric else packed_width(groups, bits)
    return rows * (packed_width(columns, bits) + 2 * groups + zeros)


@dataclass(frozen=True)
class GGMLWeight:
    """The bytes of a ggml block type: data uint8 [rows, bytes a row], `type` a name in
    `quantlab.ggml.FORMATS`."""

    data: Tensor
    type: str
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        return FORMATS[self.type].bits_per_weight

    def dequantize(self) -> Tensor:
        return dequantize_rows(self.data, self.type, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data}


REPRESENTATIONS: dict[str, type[AffineWeight] | type[GGMLWeight]] = {
    "affine": AffineWeight,
    "ggml": GGMLWeight,
}


def describe(weight: PackedWeight) -> dict[str, object]:
    """The fields of a packed weight that are not tensors, plus its `representation`: plain JSON."""
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


def _bits_per_weight(weight: PackedWeight) -> float:
    rows, columns = weight.shape
    return 8 * weight.nbytes / (rows * columns)

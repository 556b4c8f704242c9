"""What a checkpoint format is: which weights it can say, and how it keeps the tensors of a linear.

The folder around them (shards, config.json, tokenizer) is `quantlab.export.checkpoint`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from quantlab.errors import ConfigError, ModelError
from quantlab.grid import all_finite
from quantlab.models.quantization import FormatName, Quantization, Scheme
from quantlab.packing import AffineWeight, PackedWeight, Storage

Kept = TypeVar("Kept", bound=PackedWeight)
FLOATS = ("F16", "BF16", "F32")
REPRESENTATIONS = {
    "codebook": "codebooks",
    "outlier": "int8 weights that meet outlier inputs in 16 bits",
    "ggml": "ggml blocks; --format gguf does",
}


@dataclass(frozen=True)
class Expected:
    """What the tensor of one field must be; `dtypes` in the words of safetensors."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """dtype and shape of one field of a linear, from a file's header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A packed linear of a folder: its path, its (rows, columns), its fields as the headers say."""

    path: str
    shape: tuple[int, int]
    stored: Mapping[str, Stored]


@dataclass(frozen=True)
class Layer:
    """The same once its headers fit: its scheme, its fields, and whether a bias is stored."""

    scheme: Scheme
    shape: tuple[int, int]
    fields: tuple[str, ...]
    bias: bool

    @property
    def group_size(self) -> int:
        """Columns of a group, which is the row where the scheme names none."""
        size, columns = self.scheme.group_size, self.shape[1]
        return columns if size is None else min(size, columns)


class CheckpointFormat(ABC, Generic[Kept]):
    """`marks`: fields by which a packed linear is known in a file. `Kept`: the weights it holds."""

    name: ClassVar[FormatName]
    title: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    conv1d: ClassVar[bool] = False
    """Whether readers take GPT-2's transposed linears (Conv1D)."""

    def split(self, name: str) -> tuple[str, str]:
        """The path of a linear and the field that a tensor's name stands for."""
        path, _, field = name.rpartition(".")
        return path, field

    @abstractmethod
    def own(self, path: str, weight: PackedWeight) -> Kept:
        """The weight, if it is one that the format holds. Raises: ConfigError."""

    @abstractmethod
    def refusal(self, storage: Storage) -> str | None:
        """Why weights of this kind cannot be written, None where they can."""

    @abstractmethod
    def shape_refusal(self, storage: Storage, rows: int, columns: int) -> str | None:
        """Why a linear of this shape cannot be written, None where it can."""

    @abstractmethod
    def settings(
        self, packed: Mapping[str, Kept], inner: Sequence[str], outer: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of these linears; `inner` and `outer` are the paths of linears
        left in 16 bits, within the blocks and elsewhere.

        Raises: ConfigError for linears that differ more than the format can say.
        """

    def more_files(self, settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """JSON files beside config.json, by name."""
        return {}

    @abstractmethod
    def encode(self, weight: Kept) -> dict[str, Tensor]:
        """The tensors of one linear by field."""

    def scheme(self, quantization: Quantization, linear: Linear) -> Scheme:
        """How the linear is stored. Raises: ModelError."""
        return quantization.scheme_of(linear.path)

    @abstractmethod
    def fields(self, scheme: Scheme, linear: Linear) -> dict[str, Expected]:
        """The tensors that the linear must have, beside its bias."""

    @abstractmethod
    def decode(
        self, quantization: Quantization, layer: Layer, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        """The inverse of `encode`; `tensors` have the expected shapes and dtypes.

        Raises: ConfigError for values that cannot be.
        """


def common_refusal(storage: Storage, title: str) -> str | None:
    """What no format of packed integers can say."""
    if storage.representation != "affine":
        return f"{title} files hold no {REPRESENTATIONS[storage.representation]}"
    return outer_refusal(storage, title)


def outer_refusal(storage: Storage, title: str) -> str | None:
    """Embedding and head below 16 bits, which no format of folders can say."""
    if min(storage.outer) < 16:
        return f"readers of {title} files take embedding and head in 16 bits"
    return None


def weights_refusal(storage: Storage, title: str, allowed: tuple[int, ...]) -> str | None:
    """What formats of weights alone cannot say, which have a scale for every row and group."""
    if reason := common_refusal(storage, title):
        return reason
    if storage.activation is not None:
        return f"{title} files say nothing of how inputs are quantized"
    if storage.one_scale:
        return f"{title} files have a scale for every row and group, not one for a matrix"
    return bits_refusal(storage, title, allowed)


def bits_refusal(storage: Storage, title: str, allowed: tuple[int, ...]) -> str | None:
    wrong = [bits for bits in storage.bits if bits not in allowed]
    if not wrong:
        return None
    return f"{title} files hold {_listed(allowed)} bits, not {_listed(wrong)}"


def group_refusal(
    storage: Storage, title: str, columns: int, allowed: tuple[int, ...] | None
) -> str | None:
    """Why groups of this size in a row of `columns` cannot be written; `allowed` None for all."""
    size = storage.group_size
    if size is None:
        return None
    if allowed is not None and size not in allowed:
        return f"readers of {title} files take groups of {_listed(allowed)}, or a row, not {size}"
    if columns % size:
        return (
            f"groups of {size} do not divide {columns} columns, and readers of {title} files take "
            "no ragged groups"
        )
    return None


def _listed(values: Iterable[int]) -> str:
    first, *rest = [str(value) for value in values]
    return first if not rest else f"{', '.join([first, *rest[:-1]])} and {rest[-1]}"


class IntegerFormat(CheckpointFormat[AffineWeight]):
    """A format of integer codes on grids."""

    def own(self, path: str, weight: PackedWeight) -> AffineWeight:
        if not isinstance(weight, AffineWeight):
            kind = type(weight).__name__
            raise ConfigError(f"{self.title} files hold integer codes; {path} is {kind}")
        return weight


def group_of(weight: AffineWeight) -> int | None:
    """Group size as settings name it: None where a grid is a row."""
    return None if weight.group_size >= weight.columns else weight.group_size


def common_group(packed: Mapping[str, AffineWeight], title: str) -> int | None:
    """The group size that all linears share, a row (None) being one where every linear has it.

    Raises: ConfigError where there is none that says all of them exactly.
    """
    sizes = {group_of(weight) for weight in packed.values()} - {None}
    if not sizes:
        return None
    size = min(one for one in sizes if one is not None)
    for path, weight in packed.items():
        if min(size, weight.columns) != weight.group_size or weight.columns % size:
            raise ConfigError(
                f"{title} files have one group size for all linears, and it divides their columns: "
                f"{path} has {weight.columns} columns in groups of {weight.group_size}, others "
                f"groups of {size}"
            )
    return size


def check_fields(
    where: str, expected: Mapping[str, Expected], stored: Mapping[str, Stored]
) -> None:
    """Raises: ModelError for a field that is missing, or of another shape or dtype."""
    for field, wanted in expected.items():
        found = stored.get(field)
        if found is None:
            raise ModelError(f"model: {where} lacks its {field}")
        if found.dtype not in wanted.dtypes or found.shape != wanted.shape:
            raise ModelError(
                f"model: {where} has {field} of {found.dtype} {list(found.shape)}; "
                f"expected {' or '.join(wanted.dtypes)} {list(wanted.shape)}"
            )


def checked_scales(scales: Tensor) -> Tensor:
    """Scales as they are kept: float16 or float32. Raises: ConfigError unless finite and > 0 ."""
    kept = scales if scales.dtype in (torch.float16, torch.float32) else scales.float()
    if not all_finite(kept):
        raise ConfigError("scales are not finite")
    if bool((kept < 0).any()):
        raise ConfigError("scales are negative")
    return kept.contiguous()


def columns_by_group(index: Tensor, size: int, field: str) -> Tensor:
    """The order that puts the columns of a group side by side: int64 [columns] from the group of
    each, int64 [columns]. Raises: ConfigError unless every group has `size` of them."""
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], torch.arange(index.numel()) // size):
        raise ConfigError(f"{field} does not put {size} columns into each group")
    return order


def group_count(columns: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-columns // group_size)

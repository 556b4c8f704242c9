"""The checkpoint formats by name, and what each can say of a method's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantlab.errors import ConfigError
from quantlab.export.awq import AWQFormat
from quantlab.export.base import CheckpointFormat
from quantlab.export.bitsandbytes import BitsAndBytesFormat
from quantlab.export.compressed_tensors import CompressedTensorsFormat
from quantlab.export.gptq import GPTQFormat
from quantlab.models.outline import Outline
from quantlab.packing import Storage

ALL: tuple[CheckpointFormat[Any], ...] = (
    GPTQFormat(),
    AWQFormat(),
    CompressedTensorsFormat(),
    BitsAndBytesFormat(),
)
FORMATS: Mapping[str, CheckpointFormat[Any]] = {one.name: one for one in ALL}


def check_storage(format: CheckpointFormat[Any], storage: Storage, label: str) -> None:
    """Refuse what the format has no words for. Raises: ConfigError."""
    if reason := format.refusal(storage):
        raise ConfigError(f"format: {label} cannot be written as {format.name}: {reason}")


def check_shapes(
    format: CheckpointFormat[Any], storage: Storage, outline: Outline, label: str
) -> None:
    """Refuse a model whose linears do not fit, before it is loaded. Raises: ConfigError."""
    if outline.transposed and not format.conv1d:
        raise ConfigError(
            f"format: {label} cannot be written as {format.name}: {outline.family.name} has "
            f"Conv1D layers, and readers of {format.title} files replace plain linears only"
        )
    linears = outline.linears()
    widest = max(columns for _, columns in linears.values())
    if storage.group_size is not None and storage.group_size >= widest:
        storage = dataclasses.replace(storage, group_size=None)
    for path, (rows, columns) in linears.items():
        if reason := format.shape_refusal(storage, rows, columns):
            raise ConfigError(
                f"format: {label} cannot be written as {format.name}: {path}: {reason}"
            )

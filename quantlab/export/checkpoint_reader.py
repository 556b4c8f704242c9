"""Folders that others quantized, on QuantLab's own layers.

    model, about = read(folder)     # of any format in FORMATS, from anywhere

Every header is held against the shapes that config.json implies before a weight is loaded, so that
a damaged or hostile folder costs neither memory nor time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ConfigError, ModelError
from quantlab.export.base import (
    FLOATS,
    CheckpointFormat,
    Expected,
    Layer,
    Linear,
    Stored,
    check_fields,
)
from quantlab.export.formats import FORMATS
from quantlab.grid import all_finite
from quantlab.layers import QuantLinear, replace_linear
from quantlab.models import LoadedModel
from quantlab.models.loading import load_tokenizer_of
from quantlab.models.outline import Outline, outline_of, unfilled
from quantlab.models.quantization import Quantization, quantization_of
from quantlab.models.shards import Shards, open_shards
from quantlab.models.source import locate

CONSTANTS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Ends of the names of constants that older checkpoints carry along."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Survey:
    """A folder whose headers fit. `names`: the module's names of tensors -> those in the files;
    `plain`: tensors outside of packed linears, by the module's names."""

    folder: Path
    quantization: Quantization
    shards: Shards
    outline: Outline
    names: Mapping[str, str]
    layers: Mapping[str, Layer]
    plain: tuple[str, ...]

    @property
    def about(self) -> dict[str, Any]:
        """What records keep: format, bits, and sizes as `Prepared` counts them."""
        return {
            "format": self.quantization.format,
            "bits": min(layer.scheme.bits for layer in self.layers.values()),
            "activation_bits": self.quantization.activation_bits,
            "packed": len(self.layers),
            "size_bytes": self.shards.nbytes,
            "parameters": self.outline.parameters,
        }

    def fetch(self, name: str) -> Tensor:
        return self.shards.read(self.names[name])


def survey(folder: Path) -> Survey:
    """Look at a folder without loading its weights. Raises: ModelError."""
    quantization = quantization_of(folder)
    if quantization is None:
        raise ModelError(f"model: {folder.name} is not quantized: its config.json does not say how")
    shards = open_shards(folder)
    shape = outline_of(folder)
    names = _names(shards, shape)
    format = FORMATS[quantization.format]
    parts = {name: format.split(name) for name in names}
    paths = sorted({path for path, field in parts.values() if field in format.marks})
    if not paths:
        raise ModelError(
            f"model: {folder.name} says that it is {format.title}, but holds no {format.marks[0]}"
        )
    stored: dict[str, dict[str, Stored]] = {path: {} for path in paths}
    for name, (path, field) in parts.items():
        if path in stored:
            entry = shards.table[names[name]]
            stored[path][field] = Stored(entry.dtype, entry.shape)
    layers = {
        path: _layer(folder.name, path, quantization, format, fields, shape)
        for path, fields in stored.items()
    }
    plain = _plain(folder.name, names, layers, shards, shape)
    return Survey(folder, quantization, shards, shape, names, layers, plain)


def read(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LoadedModel, dict[str, Any]]:
    """The runnable model of such a folder, and what is to be said about it (`Survey.about`).

    The tokenizer is None where the folder has none. Raises: ModelError for anything missing,
    corrupt, not finite, or that QuantLab does not read.
    """
    found = survey(folder)
    format = FORMATS[found.quantization.format]
    made = unfilled(folder, dtype)
    module = made.module
    for path, layer in found.layers.items():
        where = f"model: {folder.name}: {path}"
        tensors = {field: found.fetch(f"{path}.{field}") for field in layer.fields}
        bias = found.fetch(f"{path}.bias") if layer.bias else None
        if bias is not None and not all_finite(bias):
            raise ModelError(f"{where}: its bias is not finite")
        if bias is not None and module.get_submodule(path).bias is None and not bool(bias.any()):
            bias = None  # AutoGPTQ gave every linear one
        try:
            weight = format.decode(found.quantization, layer, tensors)
        except ConfigError as error:
            raise ModelError(f"{where}: {error}") from None
        kept = None if bias is None else bias.to(dtype)
        replace_linear(module, path, QuantLinear(weight, kept, dtype=dtype))
    _fill(module, found)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    source = locate(str(folder))
    tokenizer = load_tokenizer_of(source) if has_tokenizer else None
    return LoadedModel(source, module, tokenizer, made.family), found.about


def _names(shards: Shards, shape: Outline) -> dict[str, str]:
    """The module's name of each tensor -> its name in the files, which may lack the prefix of the
    model inside (GPT-2's do); constants are left out."""
    modules = dict(shape.module.named_modules())
    prefix = f"{shape.module.base_model_prefix}."
    found = {}
    for name in shards.table:
        if name.endswith(CONSTANTS):
            continue
        path = name.rpartition(".")[0]
        full = prefix + name
        lacks = path not in modules and full.rpartition(".")[0] in modules
        found[full if lacks else name] = name
    return found


def _layer(
    folder: str,
    path: str,
    quantization: Quantization,
    format: CheckpointFormat[Any],
    stored: Mapping[str, Stored],
    shape: Outline,
) -> Layer:
    """Raises: ModelError where the linear is none of the model's or does not have its shape."""
    try:
        linear = shape.module.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"model: {folder} has packed weights for {path[:80]}, no linear of its model"
        )
    rows, columns = linear.weight.shape
    where = f"{folder}: {path}"
    packed = Linear(path, (rows, columns), stored)
    scheme = format.scheme(quantization, packed)
    fields = format.fields(scheme, packed)
    check_fields(where, fields, stored)
    bias = "bias" in stored
    if bias or linear.bias is not None:
        check_fields(where, {"bias": Expected(FLOATS, (rows,))}, stored)
    return Layer(scheme, packed.shape, tuple(fields), bias)


def _plain(
    folder: str,
    names: Mapping[str, str],
    layers: Mapping[str, Layer],
    shards: Shards,
    shape: Outline,
) -> tuple[str, ...]:
    """Names of the tensors outside of packed linears. Raises: ModelError for one that is missing,
    unexpected or misshapen."""
    own = shape.module.state_dict(keep_vars=True)
    used = {f"{path}.{f}" for path, layer in layers.items() for f in (*layer.fields, "bias")}
    plain = tuple(name for name in names if name not in used)
    for name in plain:
        path, _, field = name.rpartition(".")
        wanted = tuple(own[name].shape) if name in own and path not in layers else None
        if wanted is not None and path in shape.transposed and field == "weight":
            wanted = wanted[::-1]
        entry = shards.table[names[name]]
        if wanted is None:
            raise ModelError(f"model: {folder} has an unexpected tensor {name[:80]}")
        if entry.shape != wanted or entry.dtype not in FLOATS:
            raise ModelError(
                f"model: {folder} has {name} of {entry.dtype} {list(entry.shape)}; expected "
                f"floats {list(wanted)}"
            )
    # Tied weights are one parameter, and stored under any of its names.
    there = {id(own[name]) for name in plain}
    inside = tuple(f"{path}." for path in layers)
    missing = [n for n, t in own.items() if id(t) not in there and not n.startswith(inside)]
    if missing:
        raise ModelError(f"model: {folder} lacks {len(missing)} weights, such as {min(missing)}")
    return plain


@torch.no_grad()
def _fill(module: nn.Module, found: Survey) -> None:
    """Copy the plain weights in place. Raises: ModelError for one that is not finite."""
    own = dict(module.state_dict(keep_vars=True))
    for name in found.plain:
        tensor = found.fetch(name)
        if not all_finite(tensor):
            raise ModelError(f"model: {found.folder.name}: {name} is not finite")
        path, _, field = name.rpartition(".")
        turned = field == "weight" and path in found.outline.transposed
        own[name].copy_(tensor.t() if turned else tensor)

"""GGUF: one file that llama.cpp runs, and back.

    write(path, model, packed, outer, "q4_k_m")     # metadata, tokenizer and tensors
    weights = read(path)                            # ggml name -> GGMLWeight, bytes as in the file

The `gguf` package writes the container; what stands in it is decided in `gguf_architectures`,
`gguf_model` and `gguf_tokenizer`. Source: the GGUF specification and llama.cpp's model loader
(ggml-org).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.errors import ConfigError, ModelError
from quantlab.export.gguf_architectures import ARCHITECTURES
from quantlab.export.gguf_model import (
    add_metadata,
    architecture,
    rope_factors,
    shape_of,
    weight_names,
)
from quantlab.export.gguf_tokenizer import add_tokenizer
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.layers import QuantLinear
from quantlab.models import LoadedModel
from quantlab.models.gguf_header import read_header
from quantlab.packing import GGMLWeight, PackedWeight


def check(model: LoadedModel) -> None:
    """Raise ModelError if this model cannot be written as GGUF.

    Cheap (the tokenizer is tried in llama.cpp, which takes about a second for a large vocabulary);
    meant to be called before quantizing.
    """
    _header(model, ftype=0)


def write(
    path: Path,
    model: LoadedModel,
    packed: Mapping[str, PackedWeight],
    outer: Mapping[str, PackedWeight],
    file_type: str,
) -> Path:
    """Write the file and return `path`.

    packed: GGMLWeights by the full paths of the linears; outer: by 'token_embd' and 'output'.
    Every other weight (norms, biases, position embeddings, linears that are not packed) is taken
    from `model.module` and written as float32. file_type: a key of FILE_TYPES, for the metadata.

    Written beside the target and renamed, so that a crash leaves no half file under that name.
    Raises: ModelError, ConfigError before anything is written; OSError (a full disk), after which
    the partial file is gone.
    """
    if file_type not in FILE_TYPES:
        raise ConfigError(f"type: unknown {file_type!r}; known: {', '.join(FILE_TYPES)}")
    writer = _header(model, FILE_TYPES[file_type].ftype)
    entries = list(_entries(model, packed, outer))
    for entry in entries:
        entry.announce(writer)
    partial = path.with_name(f"{path.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # Not the writer's own way: numpy's tofile hides why a write failed (no errno on a full
        # disk), and rows in another order need a copy only while they are written.
        with partial.open("ab") as file:
            for entry in entries:
                file.write(bytes(-file.tell() % writer.data_alignment))
                file.write(entry.array().data)
            file.write(bytes(-file.tell() % writer.data_alignment))
        partial.replace(path)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> dict[str, GGMLWeight]:
    """Every tensor by its ggml name, bytes and row order as in the file; vectors have one row.

    Raises: ModelError for a file that is corrupt, truncated or holds a format QuantLab lacks.
    """
    names = {entry.type_id: entry.name for entry in FORMATS.values()}
    weights = {}
    with path.open("rb") as file:
        for info in read_header(path).tensors.values():
            if info.type_id not in names:
                raise ModelError(
                    f"model: {path.name} holds {info.name} in ggml type {info.type_id}, which "
                    f"QuantLab does not read; it reads {', '.join(FORMATS)}"
                )
            data = bytearray(info.size)
            file.seek(info.start)
            file.readinto(data)
            rows = math.prod(info.shape[1:])
            weights[info.name] = GGMLWeight(
                torch.frombuffer(data, dtype=torch.uint8).view(rows, -1),
                names[info.type_id],
                info.shape[0],
            )
    return weights


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors in the file, without metadata and padding. Raises: ModelError."""
    return sum(info.size for info in read_header(path).tensors.values())


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file. `order`: rows in the file's order, None as they are."""

    name: str
    weight: GGMLWeight | Tensor
    order: Tensor | None = None

    def announce(self, writer: Any) -> None:
        """Name, shape and type for the table of contents."""
        from gguf import GGMLQuantizationType

        if isinstance(self.weight, GGMLWeight):
            kind = GGMLQuantizationType(FORMATS[self.weight.type].type_id)
            shape, size = tuple(self.weight.data.shape), self.weight.nbytes
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        else:
            shape, size = tuple(self.weight.shape), 4 * self.weight.numel()
            writer.add_tensor_info(self.name, shape, np.dtype(np.float32), size)

    def array(self) -> NDArray[Any]:
        """The bytes to write, C-contiguous."""
        weight = self.weight
        data = weight.data if isinstance(weight, GGMLWeight) else weight.detach().float()
        data = data if self.order is None else data[self.order.to(data.device)]
        return data.cpu().contiguous().numpy()


def _header(model: LoadedModel, ftype: int) -> Any:
    """A gguf.GGUFWriter with all metadata and no tensors; no file. Raises: ModelError."""
    from gguf import GGUFWriter

    writer = GGUFWriter(None, architecture(model))
    add_metadata(writer, model, ftype)
    add_tokenizer(writer, model, shape_of(model).vocabulary)
    return writer


def _entries(
    model: LoadedModel, packed: Mapping[str, PackedWeight], outer: Mapping[str, PackedWeight]
) -> Iterator[_Entry]:
    """The tensors in the order of the file. Raises: ConfigError for weights of another kind."""
    assert model.family.gguf is not None
    shape, offset = shape_of(model), model.family.norm_offset
    ordered = ARCHITECTURES[model.family.gguf].orders
    orders = {kind: order(shape) for kind, order in ordered.items()}
    factors = rope_factors(model.module.config, shape.head_dim)
    if factors is not None:
        yield _Entry("rope_freqs.weight", factors)
    head = model.module.get_output_embeddings().weight
    tied = head.data_ptr() == model.module.get_input_embeddings().weight.data_ptr()
    for source, name in weight_names(model):
        path, _, field = source.rpartition(".")
        kind = name.split(".")[-2]
        if kind == "output" and tied:
            continue
        owner = model.module.get_submodule(path)
        weight: Any = packed.get(path, outer.get(kind)) if field == "weight" else None
        if weight is None and field == "weight" and isinstance(owner, QuantLinear):
            weight = owner.weight_packed
        if weight is None:
            weight = getattr(owner, field, None)
        elif not isinstance(weight, GGMLWeight):
            raise ConfigError(f"GGUF files hold ggml blocks; {path} is {type(weight).__name__}")
        if offset and kind.endswith("_norm") and isinstance(weight, Tensor):
            # llama.cpp multiplies by the norm's weight as it stands.
            weight = weight.detach().float() + offset
        if weight is not None:
            yield _Entry(name, weight, orders.get(kind))

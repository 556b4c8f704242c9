"""The models of a benchmark: loaded or generated, packed for QuantLab, and as GGUF files.

The generated model is Llama-shaped with a thousand million weights: random ones, which cost the
same time as trained ones. Its blocks are copies of one block, each in memory of its own, so that it
is made and quantized in seconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.native_linear import NativeLinear
from kernels.native_probe import copy_of
from quantlab.bench.spec import GENERATED, Weights
from quantlab.blockwise import install, quantize_blocks, quantize_outer
from quantlab.errors import StorageError
from quantlab.export import gguf
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import tensor_type
from quantlab.layers import QuantEmbedding, QuantLinear, replace_linear
from quantlab.methods import METHODS, configure
from quantlab.models import LoadedModel, ModelSource, block_list, bundled, get_block, load, skeleton
from quantlab.models.gguf_header import read_header
from quantlab.models.loading import family_of, prepare_bundled
from quantlab.outer import pack_outer, tied
from quantlab.packing import PackedWeight
from quantlab.paths import home
from quantlab.types import VariantSpec

SHAPE: dict[str, int] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""Of the generated model; everything else, vocabulary included, is the bundled model's."""


@dataclass(frozen=True)
class Outer:
    """Bits of embedding and head: what `pack_outer` asks of a config."""

    embedding_bits: int
    head_bits: int
    group_size: int

    def outer_bits(self) -> tuple[int, int]:
        return self.embedding_bits, self.head_bits


def read(name: str, dtype: torch.dtype) -> LoadedModel:
    """The model, loaded or generated. Raises: ModelError."""
    return generate(dtype) if name == GENERATED else load(name, dtype=dtype)


def label(name: str) -> str:
    """The model in the keys of the results: a path's or Hub id's last part."""
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or name


def folder() -> Path:
    """Where generated files are kept: `bench` in QuantLab's home."""
    return home() / "bench"


@torch.no_grad()
def generate(dtype: torch.dtype) -> LoadedModel:
    """The 1B-shaped model, the same weights every time. Raises: ModelError, OSError."""
    place = folder() / GENERATED
    if not (place / "config.json").is_file():
        original = prepare_bundled()
        place.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(original / name, place / name)
        config = json.loads((original / "config.json").read_text(encoding="utf-8"))
        (place / "config.json").write_text(json.dumps(config | SHAPE), encoding="utf-8")
    module, tokenizer = skeleton(place, dtype)
    generator = torch.Generator().manual_seed(0)
    first, *others = module.base_model.layers
    for owner in (module.get_input_embeddings(), first, module.base_model.norm):
        for parameter in owner.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    for other in others:
        other.load_state_dict(first.state_dict())
    source = ModelSource(GENERATED, "folder", place, f"generated:{json.dumps(SHAPE)}")
    return LoadedModel(source, module, tokenizer, family_of(module), bundled.find_gguf())


def repeated(model: LoadedModel) -> bool:
    """Whether every block holds the same weights."""
    return model.source.name == GENERATED


def outer_of(model: LoadedModel, weights: Weights, group_size: int) -> Outer:
    """Embedding and head at the bits that llama.cpp's file of as many bits gives them."""
    if weights.method is None:
        return Outer(16, 16, group_size)
    mix = "q8_0" if weights.bits == 8 else "q4_0"
    rows, columns = model.module.get_input_embeddings().weight.shape
    shared = tied(model)

    def bits(kind: str) -> int:
        name = tensor_type(mix, kind, 0, 0, columns, rows, gqa=1, tied_head=shared)
        return FORMATS[name].bits

    return Outer(bits("token_embd"), bits("token_embd" if shared else "output"), group_size)


@torch.no_grad()
def pack(model: LoadedModel, weights: Weights, group_size: int) -> dict[str, Any]:
    """Replace the model's linears, embedding and head by packed ones; what was done, as JSON.

    Raises: MethodError, ConfigError."""
    outer = outer_of(model, weights, group_size)
    if weights.method is not None:
        options = (("activations", "token"),) if weights.method == "dynamic_int8" else ()
        config = configure(VariantSpec(weights.method, weights.bits, options), group_size)
        method = METHODS[weights.method]
        pack_outer(model, outer)
        if repeated(model):
            first, *others = block_list(model.module, model.family)
            block = get_block(model.module, model.family, 0)
            install(block, method.quantize_block(block, {}, config))
            for other in others:
                for path in block.linears:
                    replace_linear(other, path, twin(first.get_submodule(path)))
        else:
            quantize_blocks(model, method, config, None, lambda done, total: None)
    return {
        "method": weights.method,
        "bits": weights.bits,
        "embedding_bits": outer.embedding_bits,
        "head_bits": outer.head_bits,
        "bytes": weight_bytes(model),
    }


def twin(linear: Any) -> Any:
    """A QuantLinear of the same weight whose kernel reads memory of its own. Preparing each of a
    hundred layers anew would take most of the benchmark's time."""
    prepared = linear.prepared
    if not isinstance(prepared, NativeLinear):
        return QuantLinear(linear.weight_packed, linear.bias, linear.dtype)
    made = object.__new__(QuantLinear)
    made.__dict__.update(linear.__dict__)
    made._prepared = copy.copy(prepared)
    made._prepared.matrix = copy_of(prepared.matrix)
    return made


def weight_bytes(model: LoadedModel) -> int:
    """Bytes of all weights as packed, a tied head counted once."""
    module = model.module
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    shared = isinstance(embedding, QuantEmbedding) and module.config.tie_word_embeddings
    packed = sum(
        part.nbytes
        for part in module.modules()
        if isinstance(part, (QuantLinear, QuantEmbedding)) and not (shared and part is head)
    )
    return packed + sum(parameter.nbytes for parameter in module.parameters())


def gguf_file(model: LoadedModel, file_type: str) -> Path:
    """The model as a GGUF file of that type, from QuantLab's home or made and kept there.

    Raises: ModelError for a model that llama.cpp does not run; StorageError."""
    key = hashlib.sha256(model.source.fingerprint.encode()).hexdigest()[:12]
    path = folder() / f"{label(model.source.name)}-{key}-{file_type}.gguf"
    if path.is_file():
        return path
    method = METHODS["gguf"]
    config = configure(VariantSpec("gguf", None, (("type", file_type),)))
    gguf.check(model)
    count = len(block_list(model.module, model.family))
    packed: dict[str, PackedWeight] = {}
    made: dict[str, PackedWeight] = {}
    for index in range(count):
        if index == 0 or not repeated(model):
            block = get_block(model.module, model.family, index)
            made = method.quantize_block(block, {}, config)
        for path_in_block, weight in made.items():
            packed[f"{model.family.blocks}.{index}.{path_in_block}"] = weight
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return gguf.write(path, model, packed, quantize_outer(model, method, config), file_type)
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from None


def peer_facts(path: Path) -> dict[str, Any]:
    """What the file's own header says: bytes, and the formats of embedding and head."""
    tensors = read_header(path).tensors
    names = {entry.type_id: entry.name for entry in FORMATS.values()}
    embedding = tensors["token_embd.weight"]
    head = tensors.get("output.weight", embedding)
    return {
        "bytes": gguf.weight_bytes(path),
        "embedding": names[embedding.type_id],
        "head": names[head.type_id],
    }

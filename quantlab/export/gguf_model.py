"""What llama.cpp has to know of an architecture: metadata, names of tensors, order of rows.

Everything llama.cpp cannot express is refused here, before a model is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.models import LoadedModel, block_list

QUANTIZATION_VERSION = 2
"""Of ggml's block formats (GGML_QNT_VERSION)."""


@dataclass(frozen=True)
class Names:
    """Paths in transformers' module -> tensor names of GGUF, without '.weight' and '.bias'."""

    outer: dict[str, str]
    norms: dict[str, str]
    """Relative to a block."""
    activations: tuple[str, ...]
    rotated: tuple[str, ...] = ()
    """Kinds of linears whose rows llama.cpp wants in another order (`rope_order`)."""


def _llama_like(rotated: tuple[str, ...]) -> Names:
    return Names(
        outer={
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        },
        norms={"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
        activations=("silu", "swish"),
        rotated=rotated,
    )


ARCHITECTURES: dict[str, Names] = {
    "llama": _llama_like(rotated=("attn_q", "attn_k")),
    "qwen2": _llama_like(rotated=()),
    "gpt2": Names(
        outer={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        norms={"ln_1": "attn_norm", "ln_2": "ffn_norm"},
        activations=("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    ),
}
"""By llama.cpp's name of the architecture."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its metadata and its row orders need."""

    blocks: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocabulary: int


def architecture(model: LoadedModel) -> str:
    """llama.cpp's name of the architecture. Raises: ModelError where it has none, or where this
    configuration of it has a part that llama.cpp leaves out."""
    name = model.family.gguf
    if name is None or name not in ARCHITECTURES:
        raise ModelError(f"model: llama.cpp has no {model.family.name} architecture")
    config = model.module.config
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if act not in ARCHITECTURES[name].activations:
        _refuse(name, f"activation {act}", ARCHITECTURES[name].activations[0])
    if not getattr(config, "scale_attn_weights", True):
        _refuse(name, "attention without scaling", "scale_attn_weights")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        _refuse(name, "attention scaled by layer", "scale_attn_by_inverse_layer_idx=false")
    shape = shape_of(model)
    if name == "qwen2" and shape.heads * shape.head_dim != shape.width:
        _refuse(name, f"heads of {shape.head_dim}", f"heads of {shape.width // shape.heads}")
    if hasattr(config, "rope_parameters"):
        _check_rope(config, name)
    known = {path for path, _ in weight_names(model)}
    strange = [path for path, _ in model.module.named_parameters() if path not in known]
    if strange:
        raise ModelError(f"model: llama.cpp's {name} architecture has no place for {strange[0]}")
    return name


def _refuse(name: str, what: str, right: str) -> None:
    raise ModelError(f"model: llama.cpp's {name} architecture has no {what}, only {right}")


def shape_of(model: LoadedModel) -> Shape:
    """Read from the configuration; a sliding window bounds the context, because llama.cpp attends
    to everything in these architectures: within the window both compute the same."""
    config = model.module.config
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    window = getattr(config, "sliding_window", None)
    context = int(config.max_position_embeddings)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Shape(
        blocks=len(block_list(model.module, model.family)),
        width=width,
        feed_forward=int(inner or 4 * width),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or width // heads),
        context=min(context, int(window)) if window else context,
        vocabulary=int(model.module.get_input_embeddings().weight.shape[0]),
    )


def add_metadata(writer: Any, model: LoadedModel, ftype: int) -> None:
    """Everything but the tokenizer, into a gguf.GGUFWriter. ftype: number of the file type."""
    config, shape = model.module.config, shape_of(model)
    writer.add_type("model")
    writer.add_name(_title(model))
    writer.add_quantized_by("QuantLab")
    writer.add_file_type(ftype)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_block_count(shape.blocks)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if hasattr(config, "rope_parameters"):
        writer.add_rope_dimension_count(shape.head_dim)
        _add_rope(writer, config)


def _title(model: LoadedModel) -> str:
    if model.source.kind == "bundled":
        return "SmolLM2-135M-Instruct, rebuilt by QuantLab"
    return model.source.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0, "mscale_all_dim": 0}
# The only yarn a file can say: llama-cpp-python passes its own betas, whatever stands there.


def _check_rope(config: Any, name: str) -> None:
    """Raises: ModelError for a rope that llama.cpp turns differently."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        _refuse(name, "partial rope", "heads rotated whole")
    if kind == "llama3" and name != "llama":
        _refuse(name, "llama3 rope scaling", "linear and yarn")
    if kind not in ("default", "linear", "llama3", "yarn"):
        _refuse(name, f"{kind} rope scaling", "linear, llama3 and yarn")
    if kind == "yarn":
        for key, value in _YARN.items():
            if rope.get(key) not in (None, value):
                _refuse(name, f"yarn with {key}={rope[key]}", f"{key}={value}")


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = int(rope["original_max_position_embeddings"])
        factor = float(rope["factor"] or config.max_position_embeddings / original)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope.get("attention_factor") is not None:
            # llama.cpp multiplies the usual factor by this one.
            usual = 0.1 * math.log(max(factor, 1.0)) + 1.0
            writer.add_rope_scaling_attn_factors(float(rope["attention_factor"]) / usual)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """By what llama3 scaling divides each frequency: float32 [head_dim / 2]; None without it.

    With wavelength l and n = original context / l turns of it: high_freq_factor turns or more stay,
    low_freq_factor or fewer are divided by `factor`, and between them 1 / divisor is linear in n.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / lengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / float(rope["factor"]))).float()


def rope_order(heads: int, head_dim: int) -> Tensor:
    """Row order of q or k in the file: int64 [heads * head_dim].

    transformers rotates channel i of a head with i + head_dim / 2, llama.cpp 2i with 2i + 1.
    """
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def weight_names(model: LoadedModel) -> Iterator[tuple[str, str]]:
    """(name in transformers, name in GGUF) of every weight and bias that the architecture may
    have, in the order of the file."""
    assert model.family.gguf is not None
    names = ARCHITECTURES[model.family.gguf]
    paths = list(names.outer.items())
    for index in range(len(block_list(model.module, model.family))):
        inside = {**names.norms, **dict(model.family.linears)}
        base = f"{model.family.blocks}.{index}"
        paths += [(f"{base}.{path}", f"blk.{index}.{kind}") for path, kind in inside.items()]
    for path, name in paths:
        yield f"{path}.weight", f"{name}.weight"
        yield f"{path}.bias", f"{name}.bias"

"""What llama.cpp has to know of a model besides its tensors: the metadata."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantlab.export.gguf_architectures import ARCHITECTURES, rope_of, shape_of
from quantlab.models import LoadedModel

QUANTIZATION_VERSION = 2
"""Of ggml's block formats (GGML_QNT_VERSION)."""


def add_metadata(writer: Any, model: LoadedModel, ftype: int) -> None:
    """Everything but the tokenizer, into a gguf.GGUFWriter. ftype: number of the file type."""
    config, shape = model.module.config, shape_of(model)
    assert model.family.gguf is not None
    names = ARCHITECTURES[model.family.gguf]
    writer.add_type("model")
    writer.add_name(title(model))
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
    elif hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    if names.windows:
        writer.add_sliding_window(int(config.sliding_window))
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "rope_parameters"):
        part = float(rope_of(config).get("partial_rotary_factor") or 1.0)
        writer.add_rope_dimension_count(int(shape.head_dim * part))
        _add_rope(writer, config)


def title(model: LoadedModel) -> str:
    """What the file calls the model; llama.cpp has rules for tokens that go by it (phi-3)."""
    if model.source.kind == "bundled":
        return "SmolLM2-135M-Instruct, rebuilt by QuantLab"
    return model.source.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
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
    rope = rope_of(config) if getattr(config, "rope_parameters", None) else {}
    if rope.get("rope_type", "default") != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / lengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / float(rope["factor"]))).float()

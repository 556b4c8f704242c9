"""What llama.cpp has to know of a model besides its tensors: metadata and the tensors' names.

Everything llama.cpp cannot express is refused here, before a model is quantized.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.export.gguf_architectures import ARCHITECTURES, Shape
from quantlab.models import LoadedModel, block_list

QUANTIZATION_VERSION = 2
"""Of ggml's block formats (GGML_QNT_VERSION)."""


def architecture(model: LoadedModel) -> str:
    """llama.cpp's name of the architecture. Raises: ModelError where it has none, or where this
    configuration of it has a part that llama.cpp leaves out."""
    name = model.family.gguf
    if name is None or name not in ARCHITECTURES:
        raise ModelError(f"model: llama.cpp has no {model.family.name} architecture")
    names, config, shape = ARCHITECTURES[name], model.module.config, shape_of(model)
    fields = ("hidden_act", "activation_function", "hidden_activation")
    act = next((getattr(config, f) for f in fields if getattr(config, f, None)), None)
    if act not in names.activations:
        _refuse(name, f"activation {act}", names.activations[0])
    for right, what, wanted in names.claims:
        if not right(config, shape):
            _refuse(name, what, wanted)
    if hasattr(config, "rope_parameters"):
        _check_rope(config, name)
    _check_places(model, name)
    return name


def _check_places(model: LoadedModel, name: str) -> None:
    """Raises: ModelError for a weight the architecture has no place for, or a bias it misses."""
    linears = {kind for _, kind in model.family.linears}
    known = {}
    for path, gguf in weight_names(model):
        known[path] = path.endswith(".bias") and gguf.split(".")[-2] in linears
    found = [path for path, _ in model.module.named_parameters()]
    biases = ARCHITECTURES[name].biases
    strange = [p for p in found if p not in known or (biases == "no" and known[p])]
    if strange:
        raise ModelError(f"model: llama.cpp's {name} architecture has no place for {strange[0]}")
    # Quantized layers keep their biases as buffers.
    there = {*found, *model.module.state_dict()}
    if biases == "must" and (missing := {p for p, bias in known.items() if bias} - there):
        _refuse(name, f"linears without bias, such as {min(missing)}", "those with one")


def _refuse(name: str, what: str, right: str) -> None:
    raise ModelError(f"model: llama.cpp's {name} architecture has no {what}, only {right}")


def shape_of(model: LoadedModel) -> Shape:
    """Read from the configuration; a sliding window bounds the context where llama.cpp attends to
    everything: within the window both compute the same."""
    config = model.module.config
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    window = getattr(config, "sliding_window", None)
    if model.family.gguf in ARCHITECTURES and ARCHITECTURES[model.family.gguf].windows:
        window = None
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


_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0, "mscale_all_dim": 0}
# The only yarn a file can say: llama-cpp-python passes its own betas, whatever stands there.


def rope_of(config: Any) -> dict[str, Any]:
    """The rope of the blocks that see everything; others may have one of their own."""
    rope: dict[str, Any] = config.rope_parameters
    whole: dict[str, Any] = rope.get("full_attention", rope)
    return whole


def _check_rope(config: Any, name: str) -> None:
    """Raises: ModelError for a rope that llama.cpp turns differently."""
    rope, names = rope_of(config), ARCHITECTURES[name]
    kind = rope.get("rope_type", "default")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0 and not names.partial_rope:
        _refuse(name, "partial rope", "heads rotated whole")
    if kind not in names.ropes:
        *others, last = [known for known in names.ropes if known != "default"] or ["plain rope"]
        known = " and ".join([", ".join(others), last] if others else [last])
        _refuse(name, f"{kind} rope scaling", known)
    if kind == "yarn":
        for key, value in _YARN.items():
            if rope.get(key) not in (None, value):
                _refuse(name, f"yarn with {key}={rope[key]}", f"{key}={value}")


def weight_names(model: LoadedModel) -> list[tuple[str, str]]:
    """(name in transformers, name in GGUF) of every weight and bias that the architecture may
    have, in the order of the file."""
    assert model.family.gguf is not None
    names = ARCHITECTURES[model.family.gguf]
    paths = list(names.outer.items())
    for index in range(len(block_list(model.module, model.family))):
        inside = {**names.norms, **dict(model.family.linears)}
        base = f"{model.family.blocks}.{index}"
        paths += [(f"{base}.{path}", f"blk.{index}.{kind}") for path, kind in inside.items()]
    return [
        (f"{path}.{field}", f"{name}.{field}")
        for path, name in paths
        for field in ("weight", "bias")
    ]


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

"""What cpu/decoder.cpp reads of a transformers module: its linears, norms and rotation tables."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels import native
from kernels.build import BuildError
from kernels.native_linear import NativeLinear
from quantlab.layers import QuantEmbedding, QuantLinear
from quantlab.native_weights import matrix_of, native_form

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""transformers' model types whose blocks cpu/decoder.cpp computes."""

PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_tanh": 1}


def refusal(module: Any) -> str | None:
    """Why this model cannot run natively, None where it can."""
    if reason := structure_refusal(module.config):
        return reason
    for linear in (*linears_of(module), module.get_output_embeddings()):
        if isinstance(linear, nn.Linear) and linear.weight.dtype != torch.bfloat16:
            return f"the native decoder takes no {linear.weight.dtype} weights"
        if isinstance(linear, QuantLinear) and linear.input_order is not None:
            return "the native decoder does not reorder the columns of an input (act-order)"
        if isinstance(linear, QuantLinear) and not isinstance(linear.prepared, NativeLinear):
            form = native_form(linear.weight_packed)
            if form is not None:
                return form
    embedding = module.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding):
        return native_form(embedding.weight_packed)
    return None


def structure_refusal(config: Any) -> str | None:
    """Why blocks of this configuration have no native form, whatever their weights."""
    if config.model_type not in FAMILIES:
        return f"the native decoder has no {config.model_type} blocks"
    if activation_of(config) not in ACTIVATIONS:
        return f"the native decoder has no activation {activation_of(config)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            return f"the native decoder has no {kind['rope_type']} rotation"
    try:
        native.native()
    except BuildError as error:
        return str(error)
    return None


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def linears_of(module: Any) -> Iterator[Any]:
    for block in module.base_model.layers:
        for path in PATHS.values():
            yield block.get_submodule(path)


class Records:
    """Records of one module's parts, and the memory they point to.

    `capacity`: positions that rotation tables reach; `mode`: how inputs enter weight-only linears.
    """

    def __init__(self, module: Any, capacity: int, mode: int) -> None:
        self.module, self.mode = module, mode
        self.capacity = -(-capacity // native.LANES) * native.LANES
        self.modes: set[int] = set()
        self._kept: list[Any] = []
        self._tables: dict[str | None, tuple[int, int, int]] = {}

    def model(self, layers: list[native.LayerRecord], **more: Any) -> native.ModelRecord:
        """The model of these layers; `more` are fields of cache, embedding and head."""
        config, attention = self.module.config, self.module.base_model.layers[0].self_attn
        return native.ModelRecord(
            layers=(native.LayerRecord * len(layers))(*layers),
            layer_count=len(layers),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            rotary=next(iter(self._tables.values()))[2],
            ffn=config.intermediate_size,
            gelu=ACTIVATIONS[activation_of(config)],
            capacity=self.capacity,
            eps=config.rms_norm_eps,
            attention_scale=attention.scaling,
            attention_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=embedding_scale(self.module),
            **more,
        )

    def layer(self, block: Any, index: int) -> native.LayerRecord:
        """One decoder block as its modules are now."""
        linears = {name: self.linear(block.get_submodule(path)) for name, path in PATHS.items()}
        record = self.frame(block, index)
        for name, linear in linears.items():
            setattr(record, name, linear)
        return record

    def frame(self, block: Any, index: int) -> native.LayerRecord:
        """A decoder block without its linears: norms, rotation, and how far it sees."""
        config = self.module.config
        norms = [block.input_layernorm, block.post_attention_layernorm, None, None]
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 and 3
            norms = [
                *(block.input_layernorm, block.pre_feedforward_layernorm),
                *(block.post_attention_layernorm, block.post_feedforward_layernorm),
            ]
        norms += [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
        kept = {
            name: None if norm is None else self.norm(norm)
            for name, norm in zip(native.NORMS, norms, strict=True)
        }
        kinds = getattr(config, "layer_types", None)
        kind = kinds[index] if kinds else None
        cosine, sine, _ = self.rotation(kind)
        window = window_of(config, kind)
        return native.LayerRecord(**kept, cosine=cosine, sine=sine, window=window)

    def linear(self, linear: Any) -> native.LinearRecord:
        matrix, how = self._matrix(linear)
        self.modes.add(how.mode)
        return self.described(matrix, getattr(linear, "bias", None), how)

    def described(
        self, matrix: native.Matrix, bias: Tensor | None, how: native.How | None = None
    ) -> native.LinearRecord:
        """A linear of this matrix; without `how` its input enters as `mode` says."""
        kept = None if bias is None else self.keep(bias.detach().float().contiguous())
        entering = native.How(self.mode) if how is None else how
        return native.LinearRecord(w=self.point(matrix), bias=kept, how=entering)

    def point(self, matrix: native.Matrix) -> Any:
        """A pointer to the matrix's record, which stays alive with its memory."""
        self._kept.append(matrix)
        return ctypes.pointer(matrix.record)

    def keep(self, tensor: Tensor) -> int:
        """The tensor's address; it stays alive."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def forget(self) -> None:
        """Let go of what was kept so far, in a copy that shares the tables with its original."""
        self._kept = []

    @property
    def held(self) -> int:
        """How many parts are kept alive."""
        return len(self._kept)

    def release(self, held: int) -> None:
        """Let go of what was kept after the first `held` parts; no record may point there."""
        del self._kept[held:]

    def norm(self, norm: Any) -> int:
        offset = 1.0 if self.module.config.model_type.startswith("gemma") else 0.0
        return self.keep((norm.weight.detach().float() + offset).contiguous())

    def _matrix(self, linear: Any) -> tuple[native.Matrix, native.How]:
        free = native.How(self.mode)
        if not isinstance(linear, QuantLinear):
            return native.Matrix.plain(linear.weight), free
        prepared = linear.prepared
        if isinstance(prepared, NativeLinear):
            # The layer's own memory; a weight-only layer follows the mode asked for.
            return prepared.matrix, free if prepared.how.mode == native.EXACT else prepared.how
        matrix, how = matrix_of(linear.weight_packed)
        return matrix, free if how is None else how

    def rotation(self, kind: str | None) -> tuple[int, int, int]:
        """Tables of cos and sin for every position, and the numbers a head rotates; one set a kind
        of layer."""
        if kind not in self._tables:
            positions = torch.arange(self.capacity)[None]
            by_kind = (kind,) if self.module.config.model_type == "gemma3_text" else ()
            rotary = self.module.base_model.rotary_emb
            cosine, sine = rotary(torch.empty(1, dtype=torch.float32), positions, *by_kind)
            count = int(cosine.shape[-1])  # both halves are alike
            tables = (t[0, :, : count // 2].float().contiguous() for t in (cosine, sine))
            self._tables[kind] = (*(self.keep(table) for table in tables), count)  # type: ignore[assignment]
        return self._tables[kind]


def embedding_scale(module: Any) -> float:
    """What the embedding is multiplied by: sqrt(width) in the Gemma family, in its dtype."""
    embedding = module.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    if scale is None and module.config.model_type in ("gemma", "gemma2"):
        scale = torch.tensor(module.config.hidden_size**0.5)
    if scale is None:
        return 1.0
    return float(torch.as_tensor(scale).to(torch.bfloat16))


def window_of(config: Any, kind: str | None) -> int:
    """How many positions a layer sees, 0 for all."""
    window = getattr(config, "sliding_window", None)
    if not window or kind == "full_attention":
        return 0
    if kind is None and config.model_type != "mistral":
        return 0
    return int(window)

"""Llama-like models on the native kernels: every token, or a whole prompt, in one C++ call.

`NativeDecoder` reads a transformers module once (weights, norms, rotation tables) and runs it without
transformers afterwards. Linears keep what they are: bfloat16 weights, or the packed weights of a
QuantLinear. Families and options that the C++ does not know are refused with the reason, and run as
transformers modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels import native
from kernels.build import BuildError
from kernels.native_linear import NativeLinear
from quantlab.engine import Choose, context_length, greedy
from quantlab.errors import ConfigError
from quantlab.layers import QuantEmbedding, QuantLinear
from quantlab.native_weights import matrix_of

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
CHUNK = 128
"""Positions whose logits are made at a time: 25 MB at a vocabulary of 49,152."""


def refusal(module: Any) -> str | None:
    """Why this model cannot run natively, None where it can."""
    config = module.config
    if config.model_type not in FAMILIES:
        return f"the native decoder has no {config.model_type} blocks"
    if activation_of(config) not in ACTIVATIONS:
        return f"the native decoder has no activation {activation_of(config)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            return f"the native decoder has no {kind['rope_type']} rotation"
    for linear in (*linears_of(module), module.get_output_embeddings()):
        if isinstance(linear, nn.Linear) and linear.weight.dtype != torch.bfloat16:
            return f"the native decoder takes no {linear.weight.dtype} weights"
        if linear.weight.device.type != "cpu":
            return "the native decoder runs on a CPU"
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


class NativeDecoder:
    """A model and its cache for one sequence of at most `capacity` tokens.

    `exact` false lets weight-only layers round their inputs to int8 in blocks of 32 columns, as
    llama.cpp does. Raises: BuildError; ConfigError for a model that `refusal` refuses.
    """

    def __init__(self, module: Any, capacity: int, *, exact: bool = True) -> None:
        if reason := refusal(module):
            raise ConfigError(reason)
        self.mode = native.EXACT if exact else native.INT8_BLOCK
        config = module.config
        self.vocabulary = module.get_output_embeddings().weight.shape[0]
        self.embedded = module.get_input_embeddings().weight.shape[0]
        self.context = context_length(module)
        self.capacity = -(-capacity // native.LANES) * native.LANES
        self._kept: list[Any] = []  # what the records point to
        blocks = module.base_model.layers
        attention = blocks[0].self_attn
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = attention.head_dim
        layers = (native.LayerRecord * len(blocks))(
            *(self._layer(module, block, i) for i, block in enumerate(blocks))
        )
        shape = (len(blocks), kv_heads, self.capacity, head_dim)
        embedding, head = self._outer(module)
        self._record = native.ModelRecord(
            layers=layers,
            layer_count=len(blocks),
            width=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary=self._rotary,
            ffn=config.intermediate_size,
            vocabulary=self.vocabulary,
            gelu=ACTIVATIONS[activation_of(config)],
            capacity=self.capacity,
            eps=config.rms_norm_eps,
            attention_scale=attention.scaling,
            attention_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=embedding_scale(module),
            embedding=embedding,
            head=head,
            final_norm=self._norm(module, module.base_model.norm),
            keys=self._keep(torch.zeros(shape)),
            values=self._keep(torch.zeros(shape)),
        )

    def read(self, ids: Sequence[int], first: int, *, every: bool = False) -> tuple[int, Tensor]:
        """Read tokens after the `first` that were read; (likeliest next token, float32 logits [1 or
        tokens, vocabulary]). Raises: ConfigError where the cache has no room, for no tokens, and for
        tokens that the embedding does not have."""
        if not len(ids):
            raise ConfigError("there are no tokens to read")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.embedded:
                raise ConfigError(f"token {token}: this model has 0 to {self.embedded - 1}")
        if first + len(ids) > self.capacity:
            raise ConfigError(f"{first + len(ids)} tokens do not fit a cache of {self.capacity}")
        tokens = torch.tensor(ids, dtype=torch.int32)
        logits = torch.empty(len(ids) if every else 1, self.vocabulary)
        record = ctypes.byref(self._record)
        token = native.native()("ql_read", record, tokens, first, len(ids), int(every), logits)
        return token, logits

    def chunks(self, window: Tensor, bos: int | None) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [n, vocabulary]) of the window's own tokens."""
        ids = window.tolist()
        first = 0
        if bos is not None:
            self.read([bos], 0)
            first = 1
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            yield start, self.read(part, first + start, every=True)[1]

    def _layer(self, module: Any, block: Any, index: int) -> native.LayerRecord:
        config = module.config
        linears = {
            name: self._linear(block.get_submodule(path), (index, name))
            for name, path in PATHS.items()
        }
        norms = [block.input_layernorm, block.post_attention_layernorm, None, None]
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 and 3
            norms = [
                *(block.input_layernorm, block.pre_feedforward_layernorm),
                *(block.post_attention_layernorm, block.post_feedforward_layernorm),
            ]
        norms += [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
        kept = {
            name: None if norm is None else self._norm(module, norm)
            for name, norm in zip(native.NORMS, norms, strict=True)
        }
        kinds = getattr(config, "layer_types", None)
        kind = kinds[index] if kinds else None
        cosine, sine = self._rotation(module, kind)
        return native.LayerRecord(
            **linears, **kept, cosine=cosine, sine=sine, window=window_of(config, kind)
        )

    def _linear(self, linear: Any, _place: tuple[int, str] | None = None) -> native.LinearRecord:
        matrix, how = self._matrix(linear)
        bias = getattr(linear, "bias", None)
        kept = None if bias is None else self._keep(bias.detach().float().contiguous())
        return native.LinearRecord(w=ctypes.pointer(matrix.record), bias=kept, how=how)

    def _matrix(self, linear: Any) -> tuple[native.Matrix, native.How]:
        exact = native.How(self.mode)
        if isinstance(linear, QuantLinear):
            prepared = linear.prepared
            if isinstance(prepared, NativeLinear):
                # The layer's own memory; a weight-only layer follows the decoder's mode.
                matrix, how = prepared.matrix, prepared.how
                how = exact if how.mode == native.EXACT else how
            else:
                matrix, how = matrix_of(linear.weight_packed)
                how = exact if how is None else how
        else:
            matrix, how = native.Matrix.plain(linear.weight), exact
        self._kept.append(matrix)
        return matrix, how

    def _outer(self, module: Any) -> tuple[Any, native.LinearRecord]:
        """The embedding's matrix and the head; tied ones share their memory."""
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        record = self._linear(head)
        if isinstance(embedding, QuantEmbedding):
            matrix, _ = matrix_of(embedding.weight_packed)
        elif embedding.weight.data_ptr() == head.weight.data_ptr():
            return record.w, record
        else:
            matrix = native.Matrix.plain(embedding.weight)
        self._kept.append(matrix)
        return ctypes.pointer(matrix.record), record

    def _norm(self, module: Any, norm: Any) -> int:
        offset = 1.0 if module.config.model_type.startswith("gemma") else 0.0
        return self._keep((norm.weight.detach().float() + offset).contiguous())

    def _rotation(self, module: Any, kind: str | None) -> tuple[int, int]:
        """Tables of cos and sin for every position of the cache; one pair a kind of layer."""
        tables: dict[str | None, tuple[int, int]] = self.__dict__.setdefault("_tables", {})
        if kind not in tables:
            positions = torch.arange(self.capacity)[None]
            rotary = module.base_model.rotary_emb
            by_kind = () if module.config.model_type != "gemma3_text" else (kind,)
            cosine, sine = rotary(torch.empty(1, dtype=torch.float32), positions, *by_kind)
            self._rotary = cosine.shape[-1]
            half = self._rotary // 2  # both halves are alike
            tables[kind] = (
                self._keep(cosine[0, :, :half].float().contiguous()),
                self._keep(sine[0, :, :half].float().contiguous()),
            )
        return tables[kind]

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


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


class NativeSession:
    """One sequence, as `quantlab.engine.Session`: `prefill`, `step`, `logits`."""

    logits: Tensor

    def __init__(self, decoder: NativeDecoder, choose: Choose = greedy) -> None:
        self._decoder, self._choose, self._read = decoder, choose, 0
        self.context = decoder.context

    def prefill(self, ids: Sequence[int]) -> int:
        """Start over with a prompt. Raises: ConfigError for one that is empty or too long."""
        if not len(ids):
            raise ConfigError("the prompt has no tokens")
        limit = min(self._decoder.capacity, self.context or self._decoder.capacity)
        if len(ids) > limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens; this model reads at most {limit}")
        self._read = 0
        return self._next(list(ids))

    def step(self, token: int) -> int:
        """Read `token` after everything read so far. Raises: RuntimeError before `prefill`."""
        if not self._read:
            raise RuntimeError("step() before prefill()")
        return self._next([token])

    def _next(self, ids: list[int]) -> int:
        token, logits = self._decoder.read(ids, self._read)
        self._read += len(ids)
        self.logits = logits[0]
        return token if self._choose is greedy else self._choose(self.logits)

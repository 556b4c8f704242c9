"""A decoder as an ONNX graph, built by hand from the model's own weights.

Inputs: ids int64 [1, tokens]; positions int64 [1, tokens] (only where they are learned); first
int64 [1], the first token whose logits are wanted; last_index int32 [1] and total int32 [], what
attention needs of the sequence's length; past_{key,value}_N float32 [1, key-value heads, before,
head size]. Outputs: logits float32 [1, tokens - first, vocabulary]; present_{key,value}_N.

Attention with rotation and cache is ONNX Runtime's GroupQueryAttention, the RMS norm its
SimplifiedLayerNormalization; everything else is standard ONNX, opset 21. By hand, because what
torch's exporters write depends on torch's and transformers' versions, knows no such cache, and
repeats the key and value heads. Everything the graph cannot express is refused here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.models import LoadedModel, block_list

OPSET, IR_VERSION = 21, 10
CONTEXT = 32768
"""Positions whose rotations are kept at most."""
CONTEXT_KEY = "quantlab.context"
"""Metadata of the file: the most tokens the graph reads."""
HEAD = "lm_head"
FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "opt")
MICROSOFT = "com.microsoft"


def build(model: LoadedModel, *, head_apart: bool = False) -> Any:
    """The graph as an `onnx.ModelProto` in float32; nothing of it shares memory with the model.

    With `head_apart` the head has a weight of its own even where it is tied to the embedding, as it
    must to be quantized; else it reads the embedding, which then is stored once. Its node is named
    `HEAD`. Raises: ModelError for an architecture that the graph does not cover.
    """
    kind = str(model.module.config.model_type)
    check_family(kind)
    graph = _Graph(model, head_apart)
    return graph.finish(graph.llama() if kind in FAMILIES[:3] else graph.layer_norm_model(kind))


def check_family(kind: str) -> None:
    """Refuse a model type of transformers that the graph does not know. Raises: ModelError."""
    if kind not in FAMILIES:
        raise ModelError(
            f"model: no ONNX graph for {kind}; onnx_int8 runs {', '.join(FAMILIES)}, and "
            "dynamic_int8 every model"
        )


class _Graph:
    """Nodes and weights while they are collected. Values go by their names."""

    def __init__(self, model: LoadedModel, head_apart: bool) -> None:
        self.module, self.config = model.module, model.module.config
        self.blocks = block_list(model.module, model.family)
        self.head_apart = head_apart
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.used: set[str] = set()
        self.learned_positions = False
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        width = int(self.config.hidden_size)
        self.head_dim = int(getattr(self.config, "head_dim", None) or width // self.heads)
        self.context = min(int(self.config.max_position_embeddings), CONTEXT)

    # --- parts ---------------------------------------------------------------------------------

    def op(
        self, kind: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any
    ) -> str:
        """Add a node; its first output is called `name`."""
        from onnx import helper

        domain = MICROSOFT if kind == "GroupQueryAttention" else ""
        names = [name, *(f"{name}_{index}" for index in range(1, outputs))]
        node = helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def keep(self, name: str, tensor: Tensor) -> str:
        from onnx import numpy_helper

        array = tensor.detach().to("cpu").contiguous()
        array = array if array.dtype == torch.int64 else array.float()
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array.numpy()), name)
        return name

    def parameter(self, path: str, transpose: bool = False) -> str:
        self.used.add(path)
        tensor = self.module.get_parameter(path)
        return self.keep(path, tensor.t() if transpose else tensor)

    def linear(self, x: str, path: str) -> str:
        y = self.op("MatMul", [x, self.parameter(f"{path}.weight", True)], path)
        if self.module.get_submodule(path).bias is None:
            return y
        return self.op("Add", [y, self.parameter(f"{path}.bias")], f"{path}.sum")

    def rms_norm(self, x: str, path: str) -> str:
        norm = self.module.get_submodule(path)
        weight = self.parameter(f"{path}.weight")
        epsilon = float(norm.variance_epsilon)
        return self.op("SimplifiedLayerNormalization", [x, weight], path, axis=-1, epsilon=epsilon)

    def layer_norm(self, x: str, path: str) -> str:
        norm = self.module.get_submodule(path)
        inputs = [x, *(self.parameter(f"{path}.{name}") for name in ("weight", "bias"))]
        return self.op("LayerNormalization", inputs, path, axis=-1, epsilon=float(norm.eps))

    def activate(self, x: str, kind: str, name: str) -> str:
        match kind:
            case "silu" | "swish":
                return self.op("Mul", [x, self.op("Sigmoid", [x], f"{name}.gate")], name)
            case "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh":
                return self.op("Gelu", [x], name, approximate="tanh")
            case "gelu":
                return self.op("Gelu", [x], name)
            case "relu":
                return self.op("Relu", [x], name)
        raise ModelError(f"model: the ONNX graph has no activation {kind}")

    def attention(self, query: str, key: str, value: str, index: int, **attributes: Any) -> str:
        inputs = [query, key, value, f"past_key_{index}", f"past_value_{index}"]
        inputs += ["last_index", "total"]
        if attributes.get("do_rotary"):
            inputs += ["cosines", "sines"]
        name = f"attention_{index}"
        self.op(
            "GroupQueryAttention",
            inputs,
            name,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            **attributes,
        )
        self.nodes[-1].output.extend([f"present_key_{index}", f"present_value_{index}"])
        return name

    def rotations(self) -> None:
        """The model's own cosines and sines, float32 [positions, head size / 2]."""
        rope = self.module.model.rotary_emb
        if getattr(rope, "rope_type", "default") in ("dynamic", "longrope"):
            raise ModelError(f"model: the ONNX graph has no {rope.rope_type} rotary positions")
        count = self.context
        with torch.inference_mode():
            parts = rope(torch.zeros(1), torch.arange(count)[None])
        if parts[0].shape[-1] != self.head_dim:
            raise ModelError("model: the ONNX graph has no partly rotated heads")
        for name, part in zip(("cosines", "sines"), parts, strict=True):
            self.keep(name, part[0, :, : self.head_dim // 2].clone())

    # --- architectures -------------------------------------------------------------------------

    def llama(self) -> str:
        """Llama, Mistral, Qwen2: from token ids to the final norm's output."""
        self.rotations()
        act = str(self.config.hidden_act)
        x = self.op("Gather", [self.parameter("model.embed_tokens.weight"), "ids"], "embedded")
        for index, block in enumerate(self.blocks):
            path = f"model.layers.{index}"
            h = self.rms_norm(x, f"{path}.input_layernorm")
            q, k, v = (self.linear(h, f"{path}.self_attn.{n}_proj") for n in "qkv")
            window = self.window(block)
            local = {} if window is None else {"local_window_size": window}
            h = self.attention(q, k, v, index, do_rotary=1, **local)
            h = self.linear(h, f"{path}.self_attn.o_proj")
            x = self.op("Add", [x, h], f"{path}.attended")
            h = self.rms_norm(x, f"{path}.post_attention_layernorm")
            gate, up = (self.linear(h, f"{path}.mlp.{n}_proj") for n in ("gate", "up"))
            h = self.op("Mul", [self.activate(gate, act, f"{path}.active"), up], f"{path}.gated")
            x = self.op("Add", [x, self.linear(h, f"{path}.mlp.down_proj")], path)
        return self.rms_norm(x, "model.norm")

    def window(self, block: Any) -> int | None:
        """Keys that a token of this block attends to, its own included; None for all before it."""
        mistral = self.config.model_type == "mistral"
        window = getattr(self.config if mistral else block.self_attn, "sliding_window", None)
        return None if window is None else int(window)

    def layer_norm_model(self, kind: str) -> str:
        """GPT-2 and OPT: learned positions, layer norms, biases; from ids to the head's input."""
        gpt2 = kind == "gpt2"
        self._check_layer_norm_model()
        self.learned_positions = True
        top = "transformer" if gpt2 else "model.decoder"
        table = f"{top}.{'wte' if gpt2 else 'embed_tokens'}.weight"
        places = f"{top}.{'wpe' if gpt2 else 'embed_positions'}.weight"
        # OPT's table begins two rows early.
        offset = 0 if gpt2 else int(self.module.get_submodule(f"{top}.embed_positions").offset)
        self.used.add(places)
        self.keep(places, self.module.get_parameter(places)[offset:])
        tokens = self.op("Gather", [self.parameter(table), "ids"], "tokens")
        x = self.op("Add", [tokens, self.op("Gather", [places, "positions"], "places")], "embedded")
        before = gpt2 or bool(self.config.do_layer_norm_before)
        act = str(self.config.activation_function)
        norms = ("ln_1", "ln_2") if gpt2 else ("self_attn_layer_norm", "final_layer_norm")
        inner = ("mlp.c_fc", "mlp.c_proj") if gpt2 else ("fc1", "fc2")
        for index in range(len(self.blocks)):
            path = f"{top}.{'h' if gpt2 else 'layers'}.{index}"
            h = self.layer_norm(x, f"{path}.{norms[0]}") if before else x
            h = self._attention_of(h, path, index, gpt2)
            x = self.op("Add", [x, h], f"{path}.attended")
            x = x if before else self.layer_norm(x, f"{path}.{norms[0]}")
            h = self.layer_norm(x, f"{path}.{norms[1]}") if before else x
            h = self.activate(self.linear(h, f"{path}.{inner[0]}"), act, f"{path}.active")
            x = self.op("Add", [x, self.linear(h, f"{path}.{inner[1]}")], path)
            x = x if before else self.layer_norm(x, f"{path}.{norms[1]}")
        if gpt2:
            return self.layer_norm(x, "transformer.ln_f")
        return self.layer_norm(x, f"{top}.final_layer_norm") if before else x

    def _attention_of(self, x: str, path: str, index: int, gpt2: bool) -> str:
        if gpt2:
            fused = self.linear(x, f"{path}.attn.c_attn")
            self.op("Split", [fused], f"{path}.split", outputs=3, axis=-1, num_outputs=3)
            q, k, v = f"{path}.split", f"{path}.split_1", f"{path}.split_2"
            return self.linear(self.attention(q, k, v, index), f"{path}.attn.c_proj")
        q, k, v = (self.linear(x, f"{path}.self_attn.{n}_proj") for n in "qkv")
        return self.linear(self.attention(q, k, v, index), f"{path}.self_attn.out_proj")

    def _check_layer_norm_model(self) -> None:
        config = self.config
        if not getattr(config, "scale_attn_weights", True):
            raise ModelError("model: the ONNX graph has no attention without scaling")
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ModelError("model: the ONNX graph has no attention scaled by layer")

    # --- the whole -----------------------------------------------------------------------------

    def head(self, hidden: str) -> None:
        """Logits of the tokens from `first` on."""
        end = self.keep("end", torch.tensor([2**62]))
        axis = self.keep("token_axis", torch.tensor([1]))
        wanted = self.op("Slice", [hidden, "first", end, axis], "wanted")
        head = self.module.get_output_embeddings()
        table = self.module.get_input_embeddings()
        self.used.add("lm_head.weight")
        if head.weight.data_ptr() == table.weight.data_ptr() and not self.head_apart:
            path = next(name for name, p in self.module.named_parameters() if p is table.weight)
            # Folded into a constant when the session opens, so that only the file shares it.
            matrix = self.op("Transpose", [path], "head_matrix", perm=[1, 0])
        else:
            matrix = self.keep("head_matrix", head.weight.t())
        if head.bias is not None:
            raise ModelError("model: the ONNX graph has no bias in the head")
        self.op("MatMul", [wanted, matrix], HEAD)
        self.op("Identity", [HEAD], "logits")

    def finish(self, hidden: str) -> Any:
        from onnx import TensorProto, helper

        self.head(hidden)
        strange = [n for n, _ in self.module.named_parameters() if n not in self.used]
        if strange:
            raise ModelError(f"model: the ONNX graph has no place for {strange[0]}")
        value, whole, real = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
        inputs = [value("ids", whole, [1, "tokens"])]
        if self.learned_positions:
            inputs.append(value("positions", whole, [1, "tokens"]))
        inputs.append(value("first", whole, [1]))
        inputs.append(value("last_index", TensorProto.INT32, [1]))
        inputs.append(value("total", TensorProto.INT32, []))
        vocabulary = int(self.module.get_output_embeddings().weight.shape[0])
        outputs = [value("logits", real, [1, "wanted", vocabulary])]
        for index in range(len(self.blocks)):
            for part in ("key", "value"):
                before = (1, self.kv_heads, "before", self.head_dim)
                inputs.append(value(f"past_{part}_{index}", real, before))
                after = (1, self.kv_heads, "after", self.head_dim)
                outputs.append(value(f"present_{part}_{index}", real, after))
        graph = helper.make_graph(
            self.nodes, "decoder", inputs, outputs, list(self.weights.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        # The second says that nothing is left to simplify, or quantizing would log advice.
        proto.metadata_props.add(key=CONTEXT_KEY, value=str(self.context))
        proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        return proto

"""A peer reads folders that QuantLab wrote; its own Python runs this, so nothing of QuantLab's is
imported.

    python peer_worker.py PEER IDS.json FOLDER ...

Beside each folder, `FOLDER.logits` gets `logits` (float32) and the dequantized weights by path.
Weights are in float16 or float32 and computed in that, never in less.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def gptqmodel(folder: Path):
    """GPTQModel's loader and its torch layers, float16."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    ).model
    packed = {p: m for p, m in loaded.named_modules() if hasattr(m, "qweight")}
    return loaded, {path: layer.dequantize_weight().t() for path, layer in packed.items()}


def gptq_transformers(folder: Path):
    """transformers' GptqHfQuantizer by optimum, with GPTQModel's plain torch layers, float16."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = GPTQConfig(bits=settings["bits"], backend="torch")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=config
    )
    packed = {p: m for p, m in loaded.named_modules() if hasattr(m, "qweight")}
    return loaded, {path: layer.dequantize_weight().t() for path, layer in packed.items()}


def awq_transformers(folder: Path):
    """transformers' AwqQuantizer with GPTQModel's plain torch layers, float16."""
    from transformers import AutoModelForCausalLM, AwqConfig

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = AwqConfig(
        bits=settings["bits"], group_size=settings["group_size"], backend="torch_awq"
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=config
    )
    packed = {p: m for p, m in loaded.named_modules() if hasattr(m, "qweight")}
    return loaded, {path: torch.empty(0) for path in packed}


def autoawq(folder: Path):
    """AutoAWQ's own layers in a model of its transformers, float16. (Its loader wants a GPU or
    Intel's extension.)"""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    del config.quantization_config
    loaded = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    weights = {}
    for path in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        linear = loaded.get_submodule(path)
        layer = WQLinear_GEMM.from_linear(
            linear, settings["bits"], settings["group_size"], init_only=True
        )
        loaded.set_submodule(path, layer)
        weights[path] = dequantize_gemm(
            *(stored[f"{path}.{field}"] for field in ("qweight", "qzeros", "scales")),
            settings["bits"],
            layer.group_size,
        ).t()
    missing = loaded.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys or loaded.config.tie_word_embeddings
    return loaded.eval(), weights


def compressed_tensors(folder: Path):
    """transformers' own reader where it reads such files at all: of several config groups it takes
    the first for all linears, so each linear is decompressed by its own scheme then."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**settings)
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    weights = {}
    for path in [name.removesuffix(".weight_scale") for name in stored if "weight_scale" in name]:
        fields = {
            name.removeprefix(f"{path}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{path}.")
        }
        groups = config.config_groups.values()
        scheme = next(
            (g for g in groups if path in g.targets),
            next(g for g in groups if "Linear" in g.targets),
        )
        kind = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        weights[path] = kind.decompress(fields, scheme)["weight"]
    if len(config.config_groups) == 1:
        inputs = next(iter(config.config_groups.values())).input_activations
        how = {} if inputs else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        return loaded, weights
    plain = AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    loaded = AutoModelForCausalLM.from_config(plain, dtype=torch.float32)
    rest = {n: t for n, t in stored.items() if not any(n.startswith(f"{p}.") for p in weights)}
    rest |= {f"{path}.weight": weight for path, weight in weights.items()}
    rest |= {n: t for n, t in stored.items() if n.endswith(".bias")}
    loaded.load_state_dict(rest, strict=False)
    return loaded.eval(), weights


def bitsandbytes(folder: Path):
    """transformers' reader and bitsandbytes' layers, float32. (Its bfloat16 product for CPUs, which
    also fails where blocks do not divide a row, is left aside.)"""
    import bitsandbytes.nn.modules
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for parameter in loaded.parameters():  # what is not quantized comes in bfloat16
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    weights = {}
    for path, layer in loaded.named_modules():
        if type(layer).__name__ == "Linear4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            weights[path] = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif type(layer).__name__ == "Linear8bitLt":
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            weights[path] = layer.weight.data.float() * (scales / 127)[:, None]
    return loaded, weights


def main() -> None:
    peer, ids, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = torch.tensor(json.loads(Path(ids).read_text()))
    for name in folders:
        folder = Path(name)
        loaded, weights = globals()[peer](folder)
        with torch.inference_mode():
            logits = loaded(tokens, use_cache=False).logits
        found = {path: weight.float().contiguous() for path, weight in weights.items()}
        save_file({"logits": logits.float().contiguous(), **found}, f"{folder}.logits")


if __name__ == "__main__":
    main()

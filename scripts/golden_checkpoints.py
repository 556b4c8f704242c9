"""Makes tests/golden/checkpoints: tiny models as the peers quantize and write them.

    .venv-peers/gptqmodel/bin/python scripts/golden_checkpoints.py gptqmodel
    .venv-peers/gptqmodel/bin/python scripts/golden_checkpoints.py compressed-tensors
    .venv-peers/awq/bin/python scripts/golden_checkpoints.py autoawq

Run by a peer's own Python (`make peers`), so it imports nothing of QuantLab. Each folder holds the
checkpoint and, in expected.safetensors, the weights that the peer's own code makes of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "checkpoints"
WIDTH, HIDDEN, VOCABULARY = 32, 64, 48

GPTQ = {
    "gptq-4bit-g16-sym": {"bits": 4, "group_size": 16, "sym": True},
    "gptq-4bit-g16-act-order": {"bits": 4, "group_size": 16, "sym": True, "desc_act": True},
    "gptq-3bit-row-asym": {
        "bits": 3, "group_size": -1, "sym": False, "act_group_aware": False,
    },
    "gptq-4bit-g32-asym-v1": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-2bit-g16-asym-v2": {"bits": 2, "group_size": 16, "sym": False, "format": "gptq_v2"},
    "gptq-8bit-g32-act-order-sharded": {
        "bits": 8, "group_size": 32, "sym": True, "desc_act": True,
    },
    "gptq-mixed-bits": {
        "bits": 4, "group_size": 32, "sym": True, "dynamic": {r"+:.*\.down_proj": {"bits": 8}},
    },
}  # fmt: skip
AWQ = {"awq-4bit-g16": 16, "awq-4bit-g32-sharded": 32}
COMPRESSED = {
    "ct-w8a8-dynamic": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "ct-w8a8-static-asym-sharded": {
        "weights": {"num_bits": 8, "strategy": "tensor"},
        "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    },
    "ct-w4a16-sym": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}},
    "ct-w4a16-asym": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    },
    "ct-w8a16-channel": {"weights": {"num_bits": 8, "strategy": "channel"}},
}
SHARD = "12KB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden checkpoints of one peer.")
    parser.add_argument("peer", choices=["gptqmodel", "autoawq", "compressed-tensors"])
    peer = parser.parse_args().peer
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        original = save_original(Path(folder) / "original")
        if peer == "gptqmodel":
            for name, settings in GPTQ.items():
                gptqmodel(original, name, settings)
        elif peer == "autoawq":
            for name, group_size in AWQ.items():
                autoawq(original, name, group_size)
        else:
            for name, scheme in COMPRESSED.items():
                compressed_tensors(original, name, scheme)


def save_original(folder: Path) -> Path:
    """A Llama of one block with random weights, and a tokenizer of numbered words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            size = 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(noise * size + (1 if name.endswith("norm.weight") else 0))
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w1", unk_token="w2"
    ).save_pretrained(folder)
    return folder


def calibration(count: int) -> list[list[int]]:
    """Random token ids, some words far more frequent than others."""
    import torch

    chances = 1.0 / torch.arange(1, VOCABULARY - 1)
    drawn = torch.multinomial(chances.expand(count, -1), 64, replacement=True) + 2
    return drawn.tolist()


def keep(name: str, folder: Path, expected: dict) -> None:
    """Put the checkpoint and what the peer makes of it into the repository."""
    from safetensors.torch import save_file

    target = TARGET / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors" or file.name.endswith("index.json") or file.name in (
            "config.json", "quantize_config.json", "tokenizer.json", "tokenizer_config.json",
        ):  # fmt: skip
            shutil.copy(file, target / file.name)
    for file in target.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        # GPTQModel names a temporary folder of this machine.
        file.write_text(re.sub(r'\s*"offload_to_disk_path": "[^"]*",', "", text), encoding="utf-8")
    (target / "expected").mkdir()
    kept = {path: weight.detach().contiguous() for path, weight in expected.items()}
    save_file(kept, target / "expected" / "weights.safetensors")
    print(name, sorted(file.name for file in target.iterdir()))


def gptqmodel(original: Path, name: str, settings: dict) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch.manual_seed(1)
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration(32)]
    model = GPTQModel.load(str(original), QuantizeConfig(**settings), device="cpu")
    model.quantize(data, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        sharded = {"max_shard_size": SHARD} if name.endswith("sharded") else {}
        model.save(folder, **sharded)
        again = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        expected = {
            path: layer.dequantize_weight().t()
            for path, layer in again.model.named_modules()
            if hasattr(layer, "qweight")
        }
        keep(name, Path(folder), expected)


def autoawq(original: Path, name: str, group_size: int) -> None:
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    class Patched(AwqQuantizer):
        """On a CPU its scale search restores weights from a state dict that aliases them."""

        def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
            live = module2inspect.state_dict
            module2inspect.state_dict = lambda: {k: v.clone() for k, v in live().items()}
            try:
                return super()._compute_best_scale(
                    x, w_mean, x_mean, module2inspect, *args, **kwargs
                )
            finally:
                del module2inspect.state_dict

    torch.manual_seed(1)
    pieces = calibration(32)
    model = AutoAWQForCausalLM.from_pretrained(str(original), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(original))
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM",
        },
        calib_data=pieces,
        max_calib_samples=len(pieces),
        max_calib_seq_len=len(pieces[0]),
        apply_clip=False,  # it asserts rows in multiples of 64
        quantizer_cls=Patched,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sharded = {"shard_size": SHARD} if name.endswith("sharded") else {}
        model.save_quantized(folder, **sharded)
        tokenizer.save_pretrained(folder)
        stored = {}
        for file in Path(folder).glob("*.safetensors"):
            stored |= load_file(file)
        expected = {}
        for field in [field for field in stored if field.endswith(".qweight")]:
            path = field.removesuffix(".qweight")
            parts = [stored[f"{path}.{part}"] for part in ("qweight", "qzeros", "scales")]
            expected[path] = dequantize_gemm(*parts, 4, group_size).t()
        keep(name, Path(folder), expected)


def compressed_tensors(original: Path, name: str, scheme: dict) -> None:
    """What llm-compressor does with this library: attach a scheme, find grids, compress, save."""
    import torch
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(original)
    group = QuantizationScheme(targets=["Linear"], **scheme)
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for layer in model.modules():
        if not hasattr(layer, "quantization_scheme"):
            continue
        wanted = layer.quantization_scheme.weights
        grouped = {
            "group": lambda w, size=wanted.group_size: w.unflatten(1, (-1, size or 1)),
            "channel": lambda w: w[:, None],
            "tensor": lambda w: w.reshape(1, 1, -1),
        }[wanted.strategy](layer.weight.detach())
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), wanted)
        layer.weight_scale.data.copy_(scale.reshape(layer.weight_scale.shape))
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data.copy_(zero.reshape(layer.weight_zero_point.shape))
        if hasattr(layer, "input_scale"):
            inputs = layer.quantization_scheme.input_activations
            low, high = -1.0 - torch.rand(1), 2.0 + torch.rand(1)
            scale, zero = calculate_qparams(low, high, inputs)
            layer.input_scale.data.copy_(scale.reshape(layer.input_scale.shape))
            layer.input_zero_point.data.copy_(zero.reshape(layer.input_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    expected = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "quantization_scheme"):
            kind = compressor.quantization_config.format
            made = BaseCompressor.get_value_from_registry(kind).decompress(
                dict(layer.state_dict()), layer.quantization_scheme
            )
            expected[path] = made["weight"]
    with tempfile.TemporaryDirectory() as folder:
        sharded = {"max_shard_size": SHARD} if name.endswith("sharded") else {}
        model.save_pretrained(folder, **sharded)
        compressor.update_config(folder)
        AutoTokenizer.from_pretrained(original).save_pretrained(folder)
        keep(name, Path(folder), expected)


if __name__ == "__main__":
    main()

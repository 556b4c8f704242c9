"""Tiny random models of every family, a small real tokenizer, and planted data.

Norms, biases and embeddings are random as well, so that one that is forgotten shows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from quantlab.models import Block, LoadedModel, ModelSource, get_block
from quantlab.models.families import Family
from quantlab.models.loading import family_of, prepare_module
from quantlab.texts import ASSETS

VOCABULARY = 384
CONTEXT = 128
BOS, EOS = 0, 1

FIRST_CLASS = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "phi3"),
    *("gpt2", "neox", "neox-serial", "opt", "opt-post"),
)
GENERIC = "falcon"
FAMILIES = (*FIRST_CLASS, GENERIC)
"""`opt-post` normalises after each sublayer, as OPT-350m does; GPT-NeoX runs both sublayers on the
block's input, `neox-serial` one after the other. `falcon` is a generic family."""
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "phi3")
"""Families with two query heads a key-value head here."""
FEW = ("llama", "gemma3", "phi3", "gpt2", "neox", "opt", GENERIC)
"""One of each kind of block, for tests that take long."""


def raw_model(name: str, *, width: int = 64, blocks: int = 2, tied: bool = False) -> Any:
    """A transformers causal LM with heads of 16 channels, two query heads a key-value head where
    the family has groups, and weights that transformers initialised."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "tie_word_embeddings": tied,
    }
    heads = width // 16
    kv_heads = heads // 2 if heads % 2 == 0 else 1
    llama = shared | {
        "hidden_size": width,
        "intermediate_size": width + 32,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
    }
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**llama))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**llama, head_dim=16, sliding_window=8))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**llama))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**llama, head_dim=16))
        case "smollm3":
            return SmolLM3ForCausalLM(SmolLM3Config(**llama, no_rope_layers=[1, 0] * blocks))
        case "gemma":
            return GemmaForCausalLM(GemmaConfig(**llama, head_dim=16))
        case "gemma2":
            size = llama | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
            return Gemma2ForCausalLM(Gemma2Config(**size))
        case "gemma3":
            size = llama | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
            kinds = ["sliding_attention", "full_attention"] * blocks
            return Gemma3ForCausalLM(Gemma3TextConfig(**size, layer_types=kinds[:blocks]))
        case "phi3":
            return Phi3ForCausalLM(Phi3Config(**llama, sliding_window=8))
        case "gpt2":
            size = {"n_embd": width, "n_layer": blocks, "n_head": heads, "n_inner": width + 32}
            return GPT2LMHeadModel(GPT2Config(**shared, **size, n_positions=CONTEXT))
        case "opt" | "opt-post":
            size = llama | {"ffn_dim": width + 32, "word_embed_proj_dim": width}
            for gone in ("intermediate_size", "num_key_value_heads"):
                del size[gone]
            return OPTForCausalLM(OPTConfig(**size, do_layer_norm_before=name == "opt"))
        case "neox" | "neox-serial":
            size = {key: value for key, value in llama.items() if key != "num_key_value_heads"}
            parallel = name == "neox"
            return GPTNeoXForCausalLM(GPTNeoXConfig(**size, use_parallel_residual=parallel))
        case "falcon":
            size = {key: value for key, value in llama.items() if key != "num_key_value_heads"}
            size["ffn_hidden_size"] = size.pop("intermediate_size")
            return FalconForCausalLM(FalconConfig(**size, new_decoder_architecture=False))
    raise ValueError(name)


def randomize(module: nn.Module, seed: int) -> None:
    """Matrices with outputs of about the size of their inputs, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def tiny(
    name: str = "llama", *, seed: int = 0, width: int = 64, blocks: int = 2, tied: bool = False
) -> LoadedModel:
    """A random model as `quantlab.models.load` returns it, with the small tokenizer."""
    module = prepare_module(raw_model(name, width=width, blocks=blocks, tied=tied))
    randomize(module, seed)
    source = ModelSource(name, "folder", None, f"tiny:{name}:{seed}:{width}:{blocks}:{tied}")
    return LoadedModel(source, module, tokenizer(), family_of(module))


def block_of(model: LoadedModel, index: int = 0) -> Block:
    return get_block(model.module, model.family, index)


def saved(folder: Path, name: str = "llama", *, seed: int = 0, tied: bool = False) -> Path:
    """A tiny model in a folder that transformers loads, tokenizer included."""
    module = raw_model(name, tied=tied)
    randomize(module, seed)
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 384 tokens, trained on the project's prose; no token is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    prose = (ASSETS / "evaluation.txt").read_text(encoding="utf-8")
    bpe.train_from_iterator([prose[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def token_ids(pieces: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, no special ones: int64 [pieces, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (pieces, length), generator=generator)


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    """float64 [pieces, length, vocabulary]"""
    return module(ids, use_cache=False).logits.double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [rows, columns] whose channels move together and differ in size."""
    mixing = random(columns, columns, seed=seed) / columns**0.5
    sizes = torch.exp(0.7 * random(columns, seed=seed + 1))
    return (random(rows, columns, seed=seed + 2) @ (mixing + 0.3 * torch.eye(columns))) * sizes


def lone_block(weights: dict[str, Tensor]) -> Block:
    """A block of bare linears without folds, for methods on matrices of one's own."""
    module = nn.ModuleDict()
    for path, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        module[path] = linear
    linears = {path: module[path] for path in weights}
    return Block(0, 1, module, linears, dict.fromkeys(weights, "ffn_up"), (), 1, 1, 1)


@contextmanager
def recorded_inputs(family: Family, module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Every input of every linear of the blocks, float64 [tokens, columns], by full path."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for path, inner in module.named_modules():
        if path.startswith(f"{family.blocks}.") and isinstance(inner, nn.Linear):

            def hook(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                seen.setdefault(path, []).append(args[0].detach().flatten(0, -2).double())

            handles.append(inner.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

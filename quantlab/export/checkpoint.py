"""Folders of quantized weights that others load: safetensors, config.json and the tokenizer.

What stands in a linear's tensors is decided in `gptq`, `awq`, `compressed_tensors` and
`bitsandbytes`; reading is in `checkpoint_reader`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ConfigError
from quantlab.export.formats import FORMATS
from quantlab.export.quantlab_format import plain_weights
from quantlab.models import LoadedModel
from quantlab.models.json_files import read_json
from quantlab.models.outline import transposed_linears
from quantlab.packing import PackedWeight

SHARD_BYTES = 5 * 10**9


def check_target(folder: Path) -> None:
    """Refuse to write over anything. Raises: ConfigError."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"out: {folder} holds other files; name a new or empty folder")


def write(
    folder: Path,
    name: str,
    model: LoadedModel,
    packed: Mapping[str, PackedWeight],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` (its linears already replaced by `packed`) in the format `name`.

    Everything that is not packed is written in bfloat16. Written to a folder beside the target and
    renamed, so that a crash leaves nothing half done. Raises: ConfigError for weights that the
    format cannot say; OSError on a full disk.
    """
    check_target(folder)
    format = FORMATS[name]
    weights = {path: format.own(path, weight) for path, weight in packed.items()}
    inside = f"{model.family.blocks}."
    plain = [p for p, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    inner = [path for path in plain if path.startswith(inside)]
    settings = format.settings(weights, inner, [path for path in plain if path not in inner])
    tensors = _plain_tensors(model)
    for path, weight in weights.items():
        tensors |= {f"{path}.{field}": part for field, part in format.encode(weight).items()}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _save_shards(partial, tensors, shard_bytes)
        _save_config(partial, model, "bfloat16", settings)
        for file, document in format.more_files(settings).items():
            _write_json(partial / file, document)
        if folder.is_dir():
            folder.rmdir()  # empty: see check_target
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def write_original(folder: Path, model: LoadedModel) -> None:
    """The unquantized model in float32, in words that transformers of any release reads: what a
    peer starts from. (Without `rope_theta`, transformers 4 takes 10,000 and says nothing.)

    Raises: OSError on a full disk.
    """
    folder.mkdir(parents=True)
    _save_shards(folder, _plain_tensors(model, torch.float32), SHARD_BYTES)
    _save_config(folder, model, "float32", None)


def _plain_tensors(model: LoadedModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """All weights that are not packed by transformers' names, as its files have them."""
    transposed = transposed_linears(model)
    found = {}
    for name, tensor in plain_weights(model.module).items():
        kept = tensor.to(dtype) if tensor.is_floating_point() else tensor
        path, _, field = name.rpartition(".")
        found[name] = kept.t() if field == "weight" and path in transposed else kept
    return found


def _save_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One file, or as many as `shard_bytes` asks for and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name].contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _save_config(
    folder: Path, model: LoadedModel, dtype: str, settings: Mapping[str, Any] | None
) -> None:
    """config.json, generation_config.json and the tokenizer, in words that releases of transformers
    before 5 understand as well."""
    model.module.config.save_pretrained(folder)
    generation = getattr(model.module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config |= {"dtype": dtype, "torch_dtype": dtype, "quantization_config": settings}
    if settings is None:
        del config["quantization_config"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    _write_json(folder / "config.json", config)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        words = read_json(tokenizer)
        if words.get("tokenizer_class") == "TokenizersBackend":
            _write_json(tokenizer, words | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")

"""QuantLab's own folder: packed weights as they are in memory, ready to run.

    quantlab.json       {"format": 1, "model": …, "method": …, "packed": {path: description}, …}
    weights.safetensors packed tensors as `path::field`, all other weights in bfloat16
    block-00000.safetensors, … the same of the blocks, where they were written one by one
    config.json, tokenizer files as transformers writes them

Only the weights' meaning is stored, nothing that a kernel made of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ConfigError, ModelError
from quantlab.export.spool import PATTERN, Spool
from quantlab.layers import QuantEmbedding, QuantLinear, replace_linear
from quantlab.models import ARTIFACT_FILE, LoadedModel, skeleton
from quantlab.models.json_files import read_json
from quantlab.models.loading import family_of
from quantlab.models.source import check_safetensors, locate
from quantlab.packing import PackedWeight, describe, restore

FORMAT = 1
WEIGHTS = "weights.safetensors"


def save(
    folder: Path,
    model: LoadedModel,
    packed: Mapping[str, PackedWeight],
    about: Mapping[str, Any],
    spool: Spool | None = None,
) -> Path:
    """Write `model` (its linears already replaced) with its packed weights; returns `folder`.

    `about` is kept in quantlab.json (method, config, original); the files of `spool` are moved here
    as they are, and nothing that they hold is written again. Written to a folder beside the
    target and renamed, so that a crash leaves nothing half done. Raises: OSError on a full disk.
    """
    from safetensors.torch import save_file

    check_target(folder)
    kept = set() if spool is None else spool.names
    tensors = {
        f"{path}::{field}": tensor.contiguous()
        for path, weight in packed.items()
        for field, tensor in weight.tensors().items()
        if f"{path}::{field}" not in kept
    }
    for name, tensor in plain_weights(model.module).items():
        if name not in kept:
            tensors[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for file in [] if spool is None else sorted(spool.folder.glob(PATTERN)):
            file.rename(partial / file.name)
        model.module.config.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        document = {
            "format": FORMAT,
            **about,
            "packed": {path: describe(weight) for path, weight in packed.items()},
        }
        (partial / ARTIFACT_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def check_target(folder: Path) -> None:
    """Refuse to write over anything but an artifact of ours. Raises: ConfigError."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ARTIFACT_FILE).is_file():
        raise ConfigError(f"out: {folder} holds other files; name a new or empty folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {folder} is a file; name a folder")


def plain_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight that no packed layer holds, tied ones once, by name."""
    inside = {
        f"{path}."
        for path, child in module.named_modules()
        if isinstance(child, (QuantEmbedding, QuantLinear))
    }
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if any(name.startswith(prefix) for prefix in inside) and not name.endswith(".bias"):
            continue
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.detach().contiguous()
    return found


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LoadedModel, dict[str, Any]]:
    """The runnable model of such a folder, and its quantlab.json.

    Raises: ModelError for anything missing, corrupt or of an unknown version.
    """
    from safetensors.torch import load_file

    about = read_json(folder / ARTIFACT_FILE)
    if about.get("format") != FORMAT:
        raise ModelError(f"model: {folder.name} has format {about.get('format')}, not {FORMAT}")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"model: {folder.name} has no {WEIGHTS}")
    tensors: dict[str, Tensor] = {}
    for file in (folder / WEIGHTS, *sorted(folder.glob(PATTERN))):
        check_safetensors(file)
        tensors |= load_file(file)
    module, tokenizer = skeleton(folder, dtype)
    family = family_of(module)  # while its linears are still plain
    try:
        for path, description in about["packed"].items():
            fields = {
                name.split("::")[1]: tensors.pop(name)
                for name in [n for n in tensors if n.startswith(f"{path}::")]
            }
            weight = restore(description, fields)
            old = module.get_submodule(path)
            bias = tensors.get(f"{path}.bias")
            if tuple(weight.shape) != tuple(old.weight.shape):
                raise ConfigError(f"{path} has shape {weight.shape}")
            if isinstance(old, torch.nn.Embedding):
                _install_embedding(module, path, weight, tensors, dtype)
            else:
                replace_linear(module, path, QuantLinear(weight, bias, dtype=dtype))
    except (ConfigError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"model: {folder.name} is damaged ({error})") from None
    _fill(module, tensors, folder.name)
    model = LoadedModel(locate(str(folder)), module, tokenizer, family)
    return model, about


def _install_embedding(
    module: Any, path: str, weight: PackedWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """A packed embedding, and, where the model ties them, the head on the same packed weight."""
    old, head = module.get_submodule(path), module.get_output_embeddings()
    if head is not None and head.weight.data_ptr() == old.weight.data_ptr():
        where = next(name for name, child in module.named_modules() if child is head)
        replace_linear(
            module, where, QuantLinear(weight, tensors.get(f"{where}.bias"), dtype=dtype)
        )
    replace_linear(module, path, QuantEmbedding(weight, dtype))


def _fill(module: torch.nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Copy the plain weights in place. Raises: ModelError when one is missing or misshapen."""
    wanted = plain_weights(module)
    missing = set(wanted) - set(tensors)
    if missing:
        raise ModelError(f"model: {name} lacks {len(missing)} weights, such as {min(missing)}")
    own = dict(module.state_dict(keep_vars=True))
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key not in own or own[key].shape != tensor.shape:
                raise ModelError(f"model: {name} has an unexpected weight {key}")
            own[key].copy_(tensor)

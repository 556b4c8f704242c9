"""Models whose blocks stay in their files until they are worked on, one at a time.

`stream` gives the module that `load` gives, but with the weights of its decoder blocks on torch's
meta device: shapes without memory. `LoadedModel.fetch` reads one block's weights. What lies outside
the blocks (embedding, last norm, head) is in memory as usual: it does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.models import bundled
from quantlab.models.block_files import BlockFiles, Place, block_places, read
from quantlab.models.blocks import block_list
from quantlab.models.json_files import read_json
from quantlab.models.loading import (
    LoadedModel,
    _one_message,
    _quiet_transformers,
    empty_module,
    family_of,
    load,
    load_tokenizer,
    prepare_bundled,
    prepare_module,
)
from quantlab.models.source import ModelSource

INDEX = "model.safetensors.index.json"


def stream(
    source: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """As `load`, but the blocks' weights stay in their safetensors files until they are fetched.

    Models that lie elsewhere (GGUF, pickles), that run their own code, or whose files do not hold
    the modules' weights as they are, are loaded whole: `files` is None then. Raises: ModelError.
    """
    if not trust_remote_code and source.kind in ("folder", "hub", "bundled"):
        with _quiet_transformers(), _one_message(source.name):
            streamed = _streamed(source, dtype)
        if streamed is not None:
            return streamed
    return load(source, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _streamed(source: ModelSource, dtype: torch.dtype) -> LoadedModel | None:
    folder = source.path
    notes: tuple[str, ...] = ()
    if source.kind == "bundled":
        folder, notes = prepare_bundled(), (bundled.NOTE,)
    elif source.kind == "hub":
        folder = hub_folder(source)
    files = [] if folder is None else weight_files(folder)
    if folder is None or not files:
        return None
    module = empty_module(folder, dtype)
    if getattr(module.config, "quantization_config", None) is not None:
        return None
    family = family_of(module)
    places = find_places(module, files)
    if places is None or not fill_outside(module, family.blocks, places):
        return None
    if family.note is not None:
        notes += (family.note,)
    count = len(block_list(module, family))
    return LoadedModel(
        source,
        prepare_module(module),
        load_tokenizer(str(folder)),
        family,
        source.path if source.kind == "bundled" else None,
        notes,
        BlockFiles(block_places(family.blocks, count, places), dtype),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, [] where it would not or where the index
    names anything but files beside it."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return []
    named = read_json(folder / INDEX).get("weight_map")
    names = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    files = [folder / name for name in sorted(names)]
    beside = all(file.name == name and file.is_file() for file, name in zip(files, sorted(names)))  # noqa: B905
    return files if beside else []


def hub_folder(source: ModelSource) -> Path | None:
    """The folder in the Hub's cache with the configuration and the safetensors files of a model,
    fetched where they are not there; None for a model that has none."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    config = cached_file(source.name, "config.json", **missing)
    if config is None:
        return None
    if cached_file(source.name, "model.safetensors", **missing) is None:
        index = cached_file(source.name, INDEX, **missing)
        if index is None:
            return None
        get_checkpoint_shard_files(source.name, index)
    return Path(config).parent


def find_places(module: Any, files: Iterable[Path]) -> dict[str, Place] | None:
    """Where each tensor of the module's state lies; None where a file does not simply hold it: it
    is missing, of another shape, or made of others by a rule of transformers.

    `module`: as transformers made it, before `prepare_module`.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = module.state_dict()
    transposed = transposed_weights(module)
    found: dict[str, Place] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    name, converted = rename_source_key(
                        key, renamings, converters, module.base_model_prefix, state
                    )
                    if name not in state:
                        # A rule may have renamed what has its name already.
                        name, converted = rename_source_key(
                            key, [], [], module.base_model_prefix, state
                        )
                    if name not in state:
                        continue
                    shape = tuple(opened.get_slice(key).get_shape())
                    if converted is not None or shape != tuple(state[name].shape) or name in found:
                        return None
                    found[name] = Place(file, key, name in transposed)
        except (SafetensorError, OSError):
            return None
    return found


def transposed_weights(module: nn.Module) -> set[str]:
    """Names of the weights that GPT-2 keeps as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, Conv1D)}


@torch.no_grad()
def fill_outside(module: Any, blocks: str, places: Mapping[str, Place]) -> bool:
    """Read everything outside the list of blocks into the module, and let go of the blocks' own
    weights; False, with the module spoilt, where that cannot be done faithfully: a tensor is
    missing, tied ones differ in the files, or blocks share weights."""
    state = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    outside: dict[str, Place] = {}
    for alike in names.values():
        there = [name for name in alike if name in places]
        if not there or (len(alike) > 1 and any(n.startswith(f"{blocks}.") for n in alike)):
            return False
        parameter = isinstance(state[there[0]], nn.Parameter)
        if not there[0].startswith(f"{blocks}.") or not parameter:
            outside |= {name: places[name] for name in there}
    filled: set[int] = set()
    for name, tensor in read(outside):
        target = state[name]
        if id(target) in filled and not torch.equal(target, tensor.to(target.dtype)):
            return False
        target.copy_(tensor)
        filled.add(id(target))
    for name, parameter in list(module.get_submodule(blocks).named_parameters()):
        owner, _, leaf = name.rpartition(".")
        empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
        setattr(module.get_submodule(f"{blocks}.{owner}"), leaf, empty)
    return True

"""A model's modules without its weights: shapes before anything is loaded, or room for weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab.models.blocks import block_list, get_block
from quantlab.models.families import Family
from quantlab.models.loading import (
    LoadedModel,
    _one_message,
    _quiet_transformers,
    family_of,
    prepare_bundled,
    prepare_module,
)
from quantlab.models.source import ModelSource


@dataclass(frozen=True)
class Outline:
    """`module`: transformers' causal LM as `load` prepares it, its weights without values or
    memory. `transposed`: paths of linears that files keep as [in, out] (GPT-2's Conv1D)."""

    module: Any
    family: Family
    transposed: frozenset[str]

    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every linear of the blocks, by full path."""
        found = {}
        for index in range(len(block_list(self.module, self.family))):
            block = get_block(self.module, self.family, index)
            for path, linear in block.linears.items():
                rows, columns = linear.weight.shape
                found[f"{self.family.blocks}.{index}.{path}"] = (rows, columns)
        return found

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        rows: int = self.module.get_input_embeddings().weight.shape[0]
        return rows


def outline(source: ModelSource, *, trust_remote_code: bool = False) -> Outline:
    """The outline of a model that need not be loaded. Raises: ModelError."""
    if source.kind == "bundled":
        return outline_of(prepare_bundled())
    where = source.name if source.path is None else str(source.path)
    if source.kind == "gguf":
        assert source.path is not None
        return _build(str(source.path.parent), "meta", None, file=source.path.name)
    return _build(where, "meta", None, trust_remote_code=trust_remote_code)


def outline_of(folder: Path) -> Outline:
    """The outline of a folder with a config.json. Raises: ModelError."""
    return _build(str(folder), "meta", None)


def transposed_linears(model: LoadedModel) -> frozenset[str]:
    """Paths of the linears that the model's own files keep as [in, out]."""
    from transformers.initialization import no_init_weights

    with _quiet_transformers(), no_init_weights(), torch.device("meta"):
        return _transposed(type(model.module)(model.module.config))


def _transposed(module: Any) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    return frozenset(p for p, m in module.named_modules() if isinstance(m, Conv1D))


def unfilled(folder: Path, dtype: torch.dtype) -> Outline:
    """The same with memory for the weights, which hold anything. Raises: ModelError."""
    return _build(str(folder), "cpu", dtype)


def _build(
    where: str,
    device: str,
    dtype: torch.dtype | None,
    *,
    file: str | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    extra: dict[str, Any] = {} if file is None else {"gguf_file": file}
    with _quiet_transformers(), _one_message(file or Path(where).name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the linears are plain until they are replaced
        with no_init_weights(), torch.device("meta") if device == "meta" else nullcontext():
            module: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code
            )
        module.tie_weights()
        transposed = _transposed(module)
        module = prepare_module(module)
        return Outline(module, family_of(module), transposed)

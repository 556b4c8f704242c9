"""Loading a model, float32, with its tokenizer and its row of the architecture table."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.models import bundled
from quantlab.models.block_files import BlockFiles
from quantlab.models.blocks import block_list, longest_module_list
from quantlab.models.families import FAMILIES, Family, generic_family
from quantlab.models.gguf_header import read_header
from quantlab.models.hub import quantized_config
from quantlab.models.pre_tokenizers import restore_rules
from quantlab.models.source import ModelSource, locate
from quantlab.paths import home


@dataclass
class LoadedModel:
    """A model in memory. `module` is transformers' causal LM, in eval mode, gradients off;
    `gguf` the GGUF file it came from (its tokenizer and metadata can be copied from there);
    `files` says where its blocks lie when they are not in memory (`quantlab.models.streaming`)."""

    source: ModelSource
    module: Any
    tokenizer: Any
    family: Family
    gguf: Path | None = None
    notes: tuple[str, ...] = ()
    files: BlockFiles | None = None

    def fetch(self, index: int) -> None:
        """Bring the weights of block `index` into memory, if they are not. Raises: ModelError."""
        if self.files is not None:
            block = block_list(self.module, self.family)[index]
            self.files.fetch(block, index)

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def load(
    name: str | ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load by name (see `locate`). Raises: ModelError with one message."""
    source = (
        locate(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        if isinstance(name, str)
        else name
    )
    if source.kind in ("quantlab", "checkpoint"):
        raise ModelError(
            f"model: {source.name} is already quantized; evaluate or generate with it, "
            "or quantize its original"
        )
    if source.kind == "hub" and quantized_config(source.name) is not None:
        raise ModelError(
            f"model: {source.name} is already quantized; evaluate or generate with it, or compare "
            f"it with its original as checkpoint:{source.name}"
        )
    notes: tuple[str, ...] = ()
    gguf = source.path if source.kind in ("gguf", "bundled") else None
    if source.kind == "bundled":
        folder, notes = prepare_bundled(), (bundled.NOTE,)
        module, tokenizer = _from_transformers(str(folder), dtype, False, False, None)
    else:
        where = str(source.path) if source.path is not None else source.name
        file = None
        if source.kind == "gguf":
            assert source.path is not None
            where, file = str(source.path.parent), source.path.name
        module, tokenizer = _from_transformers(where, dtype, allow_pickle, trust_remote_code, file)
    family = family_of(module)
    if family.note is not None:
        notes += (family.note,)
    return LoadedModel(source, prepare_module(module), tokenizer, family, gguf, notes)


def family_of(module: Any) -> Family:
    """The row of the architecture table for a transformers model, or a generic one."""
    model_type = str(module.config.model_type)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    return generic_family(model_type, longest_module_list(module))


def prepare_module(module: Any) -> Any:
    """Eval mode, no gradients, and GPT-2's transposed Conv1D layers as plain linears."""
    from transformers.pytorch_utils import Conv1D

    for name, child in list(module.named_modules()):
        if isinstance(child, Conv1D):
            rows = child.weight.shape[1]
            linear = nn.Linear(child.weight.shape[0], rows, dtype=child.weight.dtype, device="meta")
            linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
            linear.bias = nn.Parameter(child.bias.detach())
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)
    return module.eval().requires_grad_(False)


def skeleton(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The module (weights uninitialised, GPT-2's linears in place) and tokenizer that a folder's
    config describes; for formats that bring their own weights. Raises: ModelError."""
    with _quiet_transformers(), _one_message(folder.name):
        return prepare_module(empty_module(folder, dtype)), load_tokenizer(str(folder))


def empty_module(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' module for a folder's config; the system gives memory to its weights only when
    they are written."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder)
    with no_init_weights():
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.tie_weights()
    return module


def load_tokenizer(where: str, file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, Hub id or GGUF file."""
    from transformers import AutoTokenizer

    extra = {} if file is None else {"gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    if file is not None:
        restore_rules(tokenizer, Path(where) / file)
    return tokenizer


def load_tokenizer_of(source: ModelSource) -> Any:
    """The tokenizer of a model that need not be loaded itself. Raises: ModelError."""
    with _quiet_transformers(), _one_message(source.name):
        if source.kind == "bundled":
            return load_tokenizer(str(prepare_bundled()))
        if source.kind == "gguf":
            assert source.path is not None
            return load_tokenizer(str(source.path.parent), source.path.name)
        return load_tokenizer(source.name if source.path is None else str(source.path))


def context_of(source: ModelSource) -> int | None:
    """Most tokens the model reads at once, None where its files do not say; weights stay unread.

    Raises: ModelError.
    """
    if source.kind == "gguf":
        assert source.path is not None
        fields = read_header(source.path).fields
        architecture = bytes(fields["general.architecture"].values[0]).decode()
        field = fields.get(f"{architecture}.context_length")
        return None if field is None else int(field.values[0])
    from transformers import AutoConfig

    where = str(prepare_bundled() if source.kind == "bundled" else source.path or source.name)
    with _quiet_transformers(), _one_message(source.name):
        limit = getattr(AutoConfig.from_pretrained(where), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def prepare_bundled() -> Path:
    """The folder of the rebuilt and permuted bundled model, made the first time.

    Raises: ModelError when the package is missing; OSError when the disk is full.
    """
    folder = home() / "models" / f"bundled-{bundled.SEED}-{bundled.REVISION}"
    if (folder / "model.safetensors").is_file():
        return folder
    from safetensors.torch import save_file

    gguf = bundled.find_gguf()
    module, tokenizer = _from_transformers(str(gguf.parent), torch.float32, False, False, gguf.name)
    config = module.config
    state: dict[str, Tensor] = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    state = bundled.permute_channels(state, config.num_attention_heads, config.num_key_value_heads)
    # The module still carries transformers' GGUF quantizer, which refuses save_pretrained.
    del config.quantization_config
    config._name_or_path = bundled.REBUILT
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    with _quiet_transformers():
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _from_transformers(
    where: str, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool, file: str | None
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {} if file is None else {"gguf_file": file}
    if file is None and not allow_pickle:
        extra["use_safetensors"] = True
    with _quiet_transformers(), _one_message(file or where):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
        module, found = loaded
        _check_complete(file or where, found)
        return module, load_tokenizer(where, file, trust_remote_code)


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """Raise ModelError for tensors that transformers would silently fill with random numbers."""
    for keys, problem in (
        ([key for key, *_ in found["mismatched_keys"]], "of another shape than config.json says"),
        (found["missing_keys"], "missing"),
    ):
        if keys:
            raise ModelError(
                f"model: {name} is incomplete: {len(keys)} tensors are {problem}, "
                f"for example {min(keys)}; fetch it again"
            )


class _one_message:
    """Turns whatever transformers raises while loading into one ModelError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ModelError, MemoryError)) or not isinstance(error, Exception):
            return
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"model: {self.name} cannot be loaded ({reason})") from None


class _quiet_transformers:
    """No progress bars and no advice on stderr while transformers loads; restored afterwards."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._restore: Callable[[], None] = logging.enable_progress_bar
        self._verbosity = logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        # Some bars are drawn with plain tqdm, which no switch of transformers reaches.
        self._stderr = contextlib.redirect_stderr(io.StringIO())
        self._stderr.__enter__()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        self._warnings.__exit__(None, None, None)
        self._stderr.__exit__(None, None, None)
        logging.set_verbosity(self._verbosity)
        self._restore()

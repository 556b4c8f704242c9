"""Models that come quantized: what lies at a path, and whether it can stand beside an original."""

from __future__ import annotations

import math
from pathlib import Path

from quantlab.errors import ModelError
from quantlab.export.checkpoint_reader import TOKENIZER_FILES, survey
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS
from quantlab.models import ARTIFACT_FILE, ModelSource, hub, locate
from quantlab.models.gguf_header import read_header
from quantlab.models.json_files import read_json
from quantlab.models.loading import load_tokenizer_of
from quantlab.models.outline import outline, outline_of
from quantlab.prepared import Prepared
from quantlab.types import VariantSpec


def identify(source: ModelSource) -> tuple[VariantSpec, Prepared] | None:
    """The variant that a quantized source is, and its weights; None for one that is not quantized.

    A quantized model of the Hub is fetched. Raises: ModelError.
    """
    if source.kind == "hub":
        known = hub.quantized_config(source.name)
        return None if known is None else checkpoint_folder(hub.fetch(source.name), source.name)
    if source.path is None:
        return None
    if source.kind == "gguf":
        return gguf_file(source.path)
    if source.kind == "quantlab":
        return quantlab_folder(source.path)
    if source.kind == "checkpoint":
        return checkpoint_folder(source.path)
    return None


def adopt(path: str, original: ModelSource) -> Prepared:
    """The quantized weights at `path`, to be compared with `original`.

    Raises: ModelError where they are damaged, not quantized, or have another vocabulary.
    """
    source = locate(path)
    found = identify(source)
    if found is None:
        raise ModelError(f"model: {path} is not quantized; compare it as --model")
    prepared = found[1]
    if source.kind == "hub":
        source = locate(str(prepared.path))
    check_vocabulary(source, original)
    return prepared


def check_vocabulary(source: ModelSource, original: ModelSource) -> None:
    """Refuse weights whose tokens are not the original's. Raises: ModelError."""
    assert source.path is not None
    name = source.path.name
    wanted = load_tokenizer_of(original).get_vocab()
    rows = outline(original).vocabulary
    if source.kind == "gguf":
        field = read_header(source.path).fields.get("tokenizer.ggml.tokens")
        words = [] if field is None else [bytes(word).decode() for word in field.values]
        found, size = {word: index for index, word in enumerate(words)}, len(words)
    else:
        size = outline_of(source.path).vocabulary
        has_tokenizer = any((source.path / file).is_file() for file in TOKENIZER_FILES)
        found = load_tokenizer_of(source).get_vocab() if has_tokenizer else wanted
    if size != rows:
        raise ModelError(
            f"model: {name} has a vocabulary of {size:,}, {original.name} of {rows:,}; only "
            "quantizations of the same model can be compared"
        )
    others = sum(found.get(word) != index for word, index in wanted.items())
    if others:
        raise ModelError(
            f"model: {name} has another tokenizer than {original.name} ({others:,} of "
            f"{len(wanted):,} tokens differ); only quantizations of the same model can be compared"
        )


def gguf_file(path: Path) -> tuple[VariantSpec, Prepared]:
    """A .gguf file, by its mix where it is a known one."""
    header = read_header(path)
    field = header.fields.get("general.file_type")
    number = None if field is None else int(field.values[0])
    names = [name for name, entry in FILE_TYPES.items() if entry.ftype == number]
    tensors = header.tensors.values()
    size = sum(tensor.size for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    options = (("type", names[0]),) if names else ()
    return VariantSpec("gguf", None, options), Prepared("gguf", path, size, parameters)


def quantlab_folder(path: Path) -> tuple[VariantSpec, Prepared]:
    """A folder that `quantize` wrote. Raises: ModelError for one that is incomplete."""
    about = read_json(path / ARTIFACT_FILE)
    try:
        method, config = str(about["method"]), dict(about["config"])
        size, parameters = int(about["size_bytes"]), int(about["parameters"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model: {path.name}/{ARTIFACT_FILE} is incomplete ({error})") from None
    if method not in METHODS:
        raise ModelError(f"model: {path.name} was made by an unknown method {method!r}")
    bits = config.pop("bits", None)
    variant = VariantSpec(method, bits, tuple(sorted(config.items())))
    return variant, Prepared("quantlab", path, size, parameters)


def checkpoint_folder(path: Path, name: str | None = None) -> tuple[VariantSpec, Prepared]:
    """A folder of GPTQ, AWQ or compressed-tensors weights, known as `name`. Raises: ModelError."""
    about = survey(path).about
    size, parameters = about.pop("size_bytes"), about.pop("parameters")
    prepared = Prepared("checkpoint", path, size, parameters, details={"checkpoint": about})
    return VariantSpec("checkpoint", None, (("path", name or str(path)),)), prepared

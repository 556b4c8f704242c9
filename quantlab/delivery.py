"""Moving a finished artifact to where a person asked for it, and opening one that is there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, ModelError
from quantlab.export import quantlab_format
from quantlab.methods import METHODS, configure
from quantlab.models import ARTIFACT_FILE, ModelSource, locate
from quantlab.models.gguf_header import read_header
from quantlab.models.json_files import read_json
from quantlab.models.loading import load_tokenizer_of
from quantlab.results import ResultRecord
from quantlab.types import RunSpec, VariantSpec
from quantlab.variants import GGUF_FILE, Prepared


def check_out(out: Path, format: str) -> None:
    """Refuse a target that holds something else, before any work. Raises: ConfigError."""
    if format == "gguf":
        target = gguf_target(out)
        if target.is_dir():
            raise ConfigError(f"out: {target} is a folder; name a .gguf file or another folder")
    else:
        quantlab_format.check_target(out)


def gguf_target(out: Path) -> Path:
    """`out` itself where it names a .gguf file, else model.gguf inside it."""
    return out if out.suffix.lower() == ".gguf" else out / GGUF_FILE


def writable_parent(out: Path) -> Path:
    """The nearest existing folder above `out`: the same disk, so that delivery is a rename."""
    parent = out.resolve().parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


def deliver(prepared: Prepared, out: Path) -> Path:
    """Move what was written to `out`; returns the folder or file. Raises: OSError."""
    if prepared.kind == "gguf":
        target = gguf_target(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        prepared.path.replace(target)
        return target
    record = prepared.path / ARTIFACT_FILE
    about = json.loads(record.read_text(encoding="utf-8"))
    about |= {"parameters": prepared.parameters, "size_bytes": prepared.size_bytes}
    record.write_text(json.dumps(about, indent=1), encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        shutil.rmtree(out)
    prepared.path.rename(out)
    return out


def open_as_is(spec: RunSpec) -> tuple[VariantSpec, Prepared, ModelSource, Any]:
    """(variant, prepared, source, tokenizer) of a model that is measured as it is.

    Raises: ModelError.
    """
    source = locate(
        spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code
    )
    tokenizer = load_tokenizer_of(source)
    if source.kind == "gguf":
        assert source.path is not None
        return *_gguf_file(source.path), source, tokenizer
    if source.kind == "quantlab":
        assert source.path is not None
        return *_quantlab_folder(source.path), source, tokenizer
    variant = VariantSpec("bf16")
    from quantlab.variants import prepare_variant

    prepared = prepare_variant(variant, source, None, Path(), spec, lambda event: None)
    return variant, prepared, source, tokenizer


def _gguf_file(path: Path) -> tuple[VariantSpec, Prepared]:
    from quantlab.ggml.mixes import FILE_TYPES

    header = read_header(path)
    field = header.fields.get("general.file_type")
    number = None if field is None else int(field.values[0])
    names = [name for name, entry in FILE_TYPES.items() if entry.ftype == number]
    tensors = header.tensors.values()
    size = sum(tensor.size for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    options = (("type", names[0]),) if names else ()
    return VariantSpec("gguf", None, options), Prepared("gguf", path, size, parameters)


def _quantlab_folder(path: Path) -> tuple[VariantSpec, Prepared]:
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


def blank_record(
    variant: VariantSpec, prepared: Prepared, environment: dict[str, Any]
) -> ResultRecord:
    """A failed record to be filled in, for a model measured as it is."""
    method = METHODS[variant.method]
    config = configure(variant)
    return ResultRecord(
        variant=variant.label,
        method=variant.method,
        bits=method.weight_bits(config),
        config=config.to_json(),
        status="failed",
        activation_bits=method.activation_bits(config),
        environment=environment,
    )

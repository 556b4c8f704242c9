"""What can be written where, moving it there when it is finished, and opening what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError
from quantlab.export import checkpoint, quantlab_format
from quantlab.export.formats import FORMATS, check_shapes, check_storage
from quantlab.foreign import identify
from quantlab.methods import METHODS, configure
from quantlab.models import ARTIFACT_FILE, ModelSource, locate
from quantlab.models.loading import load_tokenizer_of
from quantlab.models.outline import outline
from quantlab.prepared import Prepared
from quantlab.results import ResultRecord
from quantlab.types import RunSpec, VariantSpec
from quantlab.variants import GGUF_FILE


def check_format(variant: VariantSpec, format: str, group_size: int | None = None) -> None:
    """Refuse pairs of method and file format that do not exist. Raises: ConfigError."""
    if format not in ("quantlab", "gguf", *FORMATS):
        raise ConfigError(
            f"format: unknown {format!r}; choose quantlab, gguf, {', '.join(FORMATS)}"
        )
    method = METHODS[variant.method]
    if not method.quantizes or method.reads_files:
        raise ConfigError(f"method: {variant.method} does not quantize; there is nothing to write")
    if method.peer is not None:
        raise ConfigError(
            f"method: {variant.method} is measured by compare only; {method.peer.twin} is written"
        )
    if variant.method == "onnx_int8":
        raise ConfigError("method: onnx_int8 is measured by compare only; dynamic_int8 is written")
    if (variant.method == "gguf") != (format == "gguf"):
        raise ConfigError(
            f"format: {variant.method} cannot be written as {format}; "
            f"use --format {'gguf' if variant.method == 'gguf' else 'quantlab'}"
        )
    if format in FORMATS:
        storage = method.storage(configure(variant, group_size))
        check_storage(FORMATS[format], storage, variant.label)


def check_fit(variant: VariantSpec, format: str, source: ModelSource, spec: RunSpec) -> None:
    """Refuse a model whose linears the format cannot say, before it is loaded.

    Raises: ConfigError, ModelError."""
    if format in FORMATS:
        storage = METHODS[variant.method].storage(configure(variant, spec.group_size))
        shape = outline(source, trust_remote_code=spec.trust_remote_code)
        check_shapes(FORMATS[format], storage, shape, variant.label)


def check_out(out: Path, format: str) -> None:
    """Refuse a target that holds something else, before any work. Raises: ConfigError."""
    if format == "gguf":
        target = gguf_target(out)
        if target.is_dir():
            raise ConfigError(f"out: {target} is a folder; name a .gguf file or another folder")
    elif format in FORMATS:
        checkpoint.check_target(out)
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
    if prepared.kind == "quantlab":
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
    found = identify(source)
    if found is not None:
        return *found, source, tokenizer
    variant = VariantSpec("bf16")
    from quantlab.variants import prepare_variant

    prepared = prepare_variant(variant, source, None, Path(), spec, lambda event: None)
    return variant, prepared, source, tokenizer


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

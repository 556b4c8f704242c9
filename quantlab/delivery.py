"""Moving a finished artifact to where a person asked for it, and opening one that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError
from quantlab.export import checkpoint, quantlab_format
from quantlab.export.formats import FORMATS
from quantlab.foreign import identify
from quantlab.methods import METHODS, configure
from quantlab.models import ARTIFACT_FILE, ModelSource, locate
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

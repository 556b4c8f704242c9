"""From a variant to something on disk that can run: quantize once, keep, open.

What is measured is what was written: a fresh variant is read back from its artifact like any other.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import keys, peer_run
from quantlab.artifacts import prune
from quantlab.blockwise import quantize_blocks, quantize_outer, train_blocks
from quantlab.environment import default_threads, resolve_device
from quantlab.errors import MethodError
from quantlab.export import checkpoint, checkpoint_reader, gguf, onnx_int8, quantlab_format
from quantlab.export.formats import FORMATS
from quantlab.export.spool import Spool
from quantlab.foreign import adopt
from quantlab.methods import METHODS, configure
from quantlab.metrics.memory import peak_rss_bytes, reset_peak
from quantlab.models import LoadedModel, ModelSource, load, stream
from quantlab.outer import check_outer, pack_outer, plain_embedding, put_outer
from quantlab.packing import PackedWeight
from quantlab.packing.affine import static_inputs
from quantlab.paths import home
from quantlab.prepared import Kind, Prepared, keep_about, read_about
from quantlab.runners import LlamaCppRunner, OnnxRunner, Runner, open_module
from quantlab.training.workshop import Workshop
from quantlab.types import Emit, Progress, RunSpec, VariantSpec

GGUF_FILE = "model.gguf"
ONNX_FILE = "model.onnx"
MAX_CONTEXT = 2048
ENGINE_FORMATS = {"llama.cpp": "gguf", "quantlab": "quantlab"}
"""What the engines of the GGUF method read."""
CHECKPOINT_BYTES = 4 * 2**30
"""Kept of trainings that were stopped, the least recently used removed first."""


def prepare_variant(
    variant: VariantSpec,
    source: ModelSource,
    ids: Tensor | None,
    folder: Path,
    spec: RunSpec,
    emit: Emit,
    format: str = "quantlab",
) -> Prepared:
    """The artifact of a variant, from `folder` if it is there, else quantized and kept there.

    ids: int64 [pieces, length], the calibration tokens of methods that need them. `format`: how
    weights are written that no other engine runs. Weights that an option names stay where they are.
    Raises: MethodError, ModelError, OSError on a full disk.
    """
    if not METHODS[variant.method].quantizes:
        return _unquantized(variant, source, spec)
    if METHODS[variant.method].reads_files:
        return adopt(configure(variant).path, source)
    known = read_about(folder)
    if known is not None:
        return known
    emit(Progress(variant.label, "load", 0, 1, 0.0))
    method, config = METHODS[variant.method], configure(variant, spec.group_size)
    if method.peer is not None:
        assert ids is not None
        return peer_run.quantize(
            variant, method.peer, config.to_json(), source, ids, folder, spec, emit
        )
    model = _load(source, spec, whole=method.whole_model(config))
    # A file that was asked for is written; `engine` is about what runs a row.
    as_gguf = (
        variant.method == "gguf"
        and model.family.gguf is not None
        and "gguf" in (format, ENGINE_FORMATS[configure(variant).engine])
    )
    if as_gguf:
        gguf.check(model)
    if variant.method == "onnx_int8":
        onnx_int8.check(model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if variant.method == "onnx_int8":
            return _quantize_onnx(variant, model, folder, spec, emit)
        return _quantize(variant, model, ids, folder, spec, "gguf" if as_gguf else format, emit)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _quantize(
    variant: VariantSpec,
    model: LoadedModel,
    ids: Tensor | None,
    folder: Path,
    spec: RunSpec,
    format: str,
    emit: Emit,
) -> Prepared:
    method, config = METHODS[variant.method], configure(variant, spec.group_size)
    parameters = model.parameters
    torch.manual_seed(spec.seed)
    reset_peak()
    started = time.perf_counter()
    check_outer(model, config)
    plan = method.plan(
        model,
        ids,
        config,
        lambda done, total: emit(Progress(variant.label, "plan", done, total, 0.0)),
    )
    # Blocks see the error of the embedding as well; training needs gradients through the head.
    packed = {} if method.trains else pack_outer(model, config)
    workshop = _workshop(variant, model.source, ids, spec, emit)
    spool = None if model.files is None else Spool(folder / "blocks", model.family.blocks)
    packed |= _packed(variant, model, ids, plan, workshop, spool, emit)
    if method.trains:
        packed |= pack_outer(model, config)
    outer = quantize_outer(model, method, config) if variant.method == "gguf" else {}
    fallbacks: tuple[str, ...] = () if model.family.note is None else (model.family.note,)
    if format != "gguf" and outer and not plain_embedding(model):
        outer = {}
        fallbacks += (
            f"embedding and head stay in 16 bits: the embedding of {model.family.name} does more "
            "than look up rows",
        )
    if format != "gguf":
        packed |= put_outer(model, outer.get("token_embd"), outer.get("output"))
    details = method.report(model, plan, packed) | static_inputs(packed)
    seconds = time.perf_counter() - started + workshop.earlier_seconds
    kind: Kind = "quantlab"
    if format == "gguf":
        kind = "gguf"
        path = gguf.write(folder / GGUF_FILE, model, packed, outer, config.type)
        size = gguf.weight_bytes(path)
    else:
        if variant.method == "gguf" and model.family.gguf is None:
            fallbacks += (
                f"llama.cpp has no {model.family.name} architecture: blocks run in torch",
            )
        if format in FORMATS:
            kind = "checkpoint"
            path = checkpoint.write(folder / "weights", format, model, packed)
        else:
            path = quantlab_format.save(
                folder / "weights",
                model,
                packed,
                {"model": model.source.name, "method": variant.method, "config": config.to_json()},
                spool,
            )
        plain = quantlab_format.plain_weights(model.module)
        size = sum(weight.nbytes for weight in packed.values())
        size += sum(2 * tensor.numel() for tensor in plain.values())
    prepared = Prepared(
        kind=kind,
        path=path,
        size_bytes=size,
        parameters=parameters,
        seconds=seconds,
        peak_rss=peak_rss_bytes(),
        fallbacks=fallbacks,
        details=details,
        curves=workshop.curves,
    )
    if spool is not None:
        shutil.rmtree(spool.folder)
    prepared = keep_about(prepared, folder)
    workshop.clear()
    return prepared


def _quantize_onnx(
    variant: VariantSpec, model: LoadedModel, folder: Path, spec: RunSpec, emit: Emit
) -> Prepared:
    """ONNX Runtime quantizes the whole model at once, from a graph that is written first."""
    config = configure(variant, spec.group_size)
    emit(Progress(variant.label, "quantize", 0, 1, 0.0))
    reset_peak()
    started = time.perf_counter()
    path = onnx_int8.write(
        folder / ONNX_FILE,
        model,
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        head=config.head,
    )
    prepared = Prepared(
        kind="onnx",
        path=path,
        size_bytes=onnx_int8.weight_bytes(path),
        parameters=model.parameters,
        seconds=time.perf_counter() - started,
        peak_rss=peak_rss_bytes(),
    )
    emit(Progress(variant.label, "quantize", 1, 1, 0.0))
    return keep_about(prepared, folder)


def _packed(
    variant: VariantSpec,
    model: LoadedModel,
    ids: Tensor | None,
    config: Any,
    workshop: Workshop,
    spool: Spool | None,
    emit: Emit,
) -> dict[str, PackedWeight]:
    method = METHODS[variant.method]
    if not method.trains:
        return quantize_blocks(
            model,
            method,
            config,
            ids,
            lambda done, total: emit(Progress(variant.label, "quantize", done, total, 0.0)),
            None if spool is None else spool.keep,
        )
    assert ids is not None
    try:
        return train_blocks(model, method, config, ids, workshop)
    except MethodError:
        workshop.clear()  # It would only fail there again.
        raise


def _workshop(
    variant: VariantSpec, source: ModelSource, ids: Tensor | None, spec: RunSpec, emit: Emit
) -> Workshop:
    """Where a method that trains keeps its checkpoints: apart from the artifact, which is removed
    when it is not finished, and by what the training follows from, so that any later run of the
    same (also `quantize` to a folder) goes on from them."""
    config = configure(variant, spec.group_size)
    folder = None
    if METHODS[variant.method].trains:
        key = keys.artifact_key(source.fingerprint, variant, config.to_json(), None, ids, spec.seed)
        folder = home() / "training" / key
        prune(folder.parent, CHECKPOINT_BYTES, {key})

    def report(stage: str, done: int, total: int) -> None:
        emit(Progress(variant.label, stage, done, total, 0.0))

    return Workshop(folder, report, spec.seed)


def _unquantized(variant: VariantSpec, source: ModelSource, spec: RunSpec) -> Prepared:
    model = _load(source, spec, whole=False)
    bytes_each = 4 if variant.method == "fp32" else 2
    return Prepared("unquantized", Path(), bytes_each * model.parameters, model.parameters)


def _load(
    source: ModelSource, spec: RunSpec, dtype: torch.dtype = torch.float32, *, whole: bool = True
) -> LoadedModel:
    return (load if whole else stream)(
        source,
        dtype=dtype,
        allow_pickle=spec.allow_pickle,
        trust_remote_code=spec.trust_remote_code,
    )


def open_runner(
    variant: VariantSpec, prepared: Prepared, source: ModelSource, bos: int | None, spec: RunSpec
) -> Runner:
    """The prepared variant, ready to run. Raises: ModelError."""
    threads = spec.threads or default_threads()
    device = resolve_device(spec.device)
    if prepared.kind == "gguf":
        return LlamaCppRunner(prepared.path, bos, threads, max(MAX_CONTEXT, spec.window + 1))
    if prepared.kind == "onnx":
        return OnnxRunner(prepared.path, bos, threads, MAX_CONTEXT)
    if prepared.kind == "quantlab":
        model, _ = quantlab_format.load(prepared.path)
    elif prepared.kind == "checkpoint":
        model, _ = checkpoint_reader.read(prepared.path)
    else:
        dtype = torch.float32 if variant.method == "fp32" else torch.bfloat16
        model = _load(source, spec, dtype)
    context = int(getattr(model.module.config, "max_position_embeddings", MAX_CONTEXT))
    return open_module(model.module, bos, device, min(context, MAX_CONTEXT))

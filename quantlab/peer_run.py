"""A peer as a row of the comparison: the same weights and tokens in, a standard checkpoint out.

The folder that a peer leaves is read and measured like any other that others quantized; what is
checked here is that the peer started from the same model, and that it did not break it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.environment import default_threads
from quantlab.errors import MethodError
from quantlab.export import checkpoint
from quantlab.foreign import checkpoint_folder
from quantlab.metrics.perplexity import negative_log_likelihood
from quantlab.metrics.quality import Reference
from quantlab.models import LoadedModel, ModelSource, load
from quantlab.peers.environments import Peer
from quantlab.peers.process import Report, run
from quantlab.prepared import Prepared, keep_about
from quantlab.types import Emit, Progress, RunSpec, VariantSpec

LOSS_TOLERANCE = 1e-3
"""Nats a token by which a peer's reading of the unquantized model may differ from QuantLab's: a
wrong rotary base costs a hundred times as much, float32 sums in another order a hundredth."""
EXPLODED = 10.0
"""Times the original's perplexity that no row is failed for, however few words a model knows."""


def quantize(
    variant: VariantSpec,
    peer: Peer,
    options: Mapping[str, Any],
    source: ModelSource,
    ids: Tensor,
    folder: Path,
    spec: RunSpec,
    emit: Emit,
) -> Prepared:
    """Let `peer` quantize `source` on the tokens `ids` (int64 [pieces, length]) into `folder`.

    Needs room for the weights in float32 while it works. Raises: MethodError with the peer's reason
    (not installed, refused, crashed), ModelError for a checkpoint that cannot be read; nothing is
    left in `folder` then.
    """
    refused = "" if torch.cuda.is_available() else peer.gpu_only
    if reason := refused or peer.absence():
        raise MethodError(reason, peer.install)

    def step(stage: str, done: int, total: int) -> None:
        emit(Progress(variant.label, stage, done, total, 0.0))

    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    try:
        loss, parameters = hand_over(source, ids, work / "model", spec)
        threads = spec.threads or default_threads()
        report = run(peer, work / "model", ids.tolist(), work, options, threads, step)
        check_start(report, loss)
        return keep(work / "checkpoint", folder, report, parameters)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def hand_over(source: ModelSource, ids: Tensor, target: Path, spec: RunSpec) -> tuple[float, int]:
    """Write the original to `target`; its loss on the first piece, and how many weights it has."""
    model = load(source, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    checkpoint.write_original(target, model)
    return original_loss(model, ids), model.parameters


@torch.inference_mode()
def original_loss(model: LoadedModel, ids: Tensor) -> float:
    """Mean negative log-likelihood of the first calibration piece, unquantized, nats a token."""
    logits = model.module(ids[:1], use_cache=False).logits[0, :-1].float()
    return float(negative_log_likelihood(logits, ids[0, 1:]).mean())


def check_start(report: Report, loss: float) -> None:
    """Raises: MethodError where the peer quantized something else than the original."""
    difference = abs(report.original_loss - loss)
    if not difference <= LOSS_TOLERANCE:
        raise MethodError(
            f"{report.peer} {report.version} reads another model than QuantLab: before quantizing, "
            f"its loss is {report.original_loss:.3f} nats a token instead of {loss:.3f}",
            f"its transformers is {report.versions.get('transformers', 'unknown')}, which may not "
            "know this architecture",
        )


def keep(written: Path, folder: Path, report: Report, parameters: int) -> Prepared:
    """Move the checkpoint to its place in `folder`, and remove what the peer needed."""
    found = checkpoint_folder(written)[1]  # refuses what cannot be read before anything is kept
    place = folder / "weights"
    written.rename(place)
    shutil.rmtree(folder / "work")
    patched = f"{report.peer} {report.version} is patched: {report.patch}"
    prepared = Prepared(
        kind="checkpoint",
        path=place,
        size_bytes=found.size_bytes,
        parameters=parameters,
        seconds=report.seconds,
        peak_rss=report.peak_rss_bytes,
        fallbacks=() if report.patch is None else (patched,),
        details=found.details | {"peer": report.to_json()},
    )
    return keep_about(prepared, folder)


def check_result(
    prepared: Prepared, perplexity: float, reference: Reference | None, windows: Sequence[Tensor]
) -> None:
    """Refuse a peer's checkpoint that has lost the model, which says nothing of the method.

    Lost is more than half of the way, in nats, from the original to guessing evenly among all
    words: a perplexity above sqrt(original * vocabulary). Raises: MethodError.
    """
    who = prepared.details.get("peer")
    if who is None or reference is None:
        return
    vocabulary = reference.vocabulary
    if perplexity <= math.sqrt(vocabulary):  # the original's is at least 1
        return
    original = reference.perplexity(windows)
    limit = max(EXPLODED * original, math.sqrt(original * vocabulary))
    if perplexity > limit:
        raise MethodError(
            f"{who['peer']} {who['version']} wrote a broken checkpoint: its perplexity is "
            f"{perplexity:,.0f}, the original's {original:,.2f}, and guessing evenly would have "
            f"{vocabulary:,}",
            "this is the peer's failure on this model and machine and says nothing of its method",
        )

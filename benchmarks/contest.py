"""One contest of `benchmarks.quantize`: QuantLab quantizes, then the peer, on the same inputs."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.phases import KEEPING, LOADING, OTHER, READING, WRITING, watching
from quantlab.errors import MethodError
from quantlab.export import checkpoint
from quantlab.foreign import checkpoint_folder
from quantlab.methods import METHODS, configure
from quantlab.metrics.quality import measure_quality
from quantlab.models import LoadedModel
from quantlab.peer_run import check_start, original_loss
from quantlab.peers import process
from quantlab.peers.environments import Peer
from quantlab.prepared import Prepared
from quantlab.types import RunSpec, VariantSpec, ignore
from quantlab.variants import open_runner, prepare_variant

LLAMACPP = Path(__file__).with_name("llamacpp_worker.py")


@dataclass(frozen=True)
class Contest:
    """A pair; without a `peer` it is llama.cpp. `limit`: QuantLab's seconds over the peer's, at
    most. `writes`: whether the peer's seconds include writing its file, so that QuantLab's must as
    well."""

    name: str
    variant: VariantSpec
    limit: float
    peer: Peer | None
    writes: bool = False


CONTESTS = {
    contest.name: contest
    for contest in (
        Contest("gptq", VariantSpec("gptq", 4), 1 / 5, METHODS["gptqmodel"].peer),
        Contest("awq", VariantSpec("awq", 4), 1 / 20, METHODS["autoawq"].peer),
        Contest(
            "q4_k_m",
            VariantSpec("gguf", None, (("type", "q4_k_m"),)),
            2.0,
            None,
            writes=True,
        ),
    )
}


@dataclass
class Setting:
    """What all contests share; `ids` int64 [pieces, length] is what both sides calibrate on."""

    spec: RunSpec
    model: LoadedModel
    ids: Tensor
    windows: list[Tensor]
    bos: int | None
    work: Path
    repeat: int
    awq_blocks: int
    quality: bool
    peers: bool


@dataclass
class Side:
    """One side's result; `scaled` is what `seconds` of the first blocks only would come to."""

    name: str
    seconds: float | None = None
    scaled: float | None = None
    blocks: tuple[int, int] | None = None
    perplexity: float | None = None
    settings: str = ""
    error: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    runs: list[float] = field(default_factory=list)


def run_quantlab(contest: Contest, setting: Setting) -> Side:
    """Quantize with fresh artifacts, `repeat` times where it is short, and measure the last one."""
    method = METHODS[contest.variant.method]
    folder = setting.work / f"quantlab-{contest.name}"
    ids = setting.ids if method.needs else None
    runs: list[tuple[float, dict[str, float]]] = []
    prepared: Prepared | None = None
    for _ in range(1 if method.needs else setting.repeat):
        shutil.rmtree(folder, ignore_errors=True)
        with watching(method) as phases:
            started = time.perf_counter()
            prepared = prepare_variant(
                contest.variant, setting.model.source, ids, folder, setting.spec, ignore
            )
            whole = time.perf_counter() - started
        assert prepared.seconds is not None
        parts = dict(phases.seconds)
        parts[OTHER] = whole - sum(parts.values())
        counted = prepared.seconds - parts.get(READING, 0.0)
        # Blocks are written while they are quantized, the rest afterwards.
        counted += parts.get(WRITING, 0.0) if contest.writes else -parts.get(KEEPING, 0.0)
        runs.append((counted, parts))
    assert prepared is not None
    seconds = statistics.median_low([counted for counted, _ in runs])
    side = Side(f"QuantLab {contest.variant.label}", seconds)
    side.runs = [counted for counted, _ in runs]
    side.phases = next(parts for counted, parts in runs if counted == seconds)
    outside = [LOADING, READING, OTHER]
    outside[2:2] = [] if contest.writes else [KEEPING, WRITING]
    side.settings = f"not counted, as on the peer's side: {', '.join(outside)}"
    if setting.quality:
        side.perplexity = perplexity(contest.variant, prepared, setting)
    return side


def run_peer(contest: Contest, setting: Setting) -> Side:
    """Quantize with the peer in its own process. A failure is a result, with its reason."""
    folder = setting.work / f"peer-{contest.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if contest.peer is None:
        return run_llamacpp(contest, setting, folder)
    if not (setting.work / "model").is_dir():
        checkpoint.write_original(setting.work / "model", setting.model)
    options = configure(VariantSpec(contest.peer.recipe, 4), setting.spec.group_size).to_json()
    blocks = setting.awq_blocks if contest.name == "awq" else 0
    try:
        report = process.run(
            contest.peer,
            setting.work / "model",
            setting.ids.tolist(),
            folder,
            options,
            setting.spec.threads,
            lambda stage, done, total: None,
            blocks=blocks,
        )
        check_start(report, original_loss(setting.model, setting.ids))
    except MethodError as error:
        hint = "" if error.hint is None else f" ({error.hint})"
        return Side(contest.peer.title, error=f"{error}{hint}")
    patched = "" if report.patch is None else f"patched: {report.patch}; "
    side = Side(f"{report.peer} {report.version}", report.seconds)
    side.settings = patched + report.settings
    if report.blocks is not None:
        side.blocks = report.blocks
        side.scaled = report.seconds * side.blocks[1] / side.blocks[0]
    elif setting.quality:
        variant, prepared = checkpoint_folder(folder / "checkpoint")
        side.perplexity = perplexity(variant, prepared, setting)
    return side


def run_llamacpp(contest: Contest, setting: Setting, folder: Path) -> Side:
    """llama.cpp in QuantLab's own Python, in a process of its own."""
    model = float_gguf(setting)
    command = [
        *(sys.executable, str(LLAMACPP), "--model", str(model), "--out", str(folder)),
        *("--repeat", str(setting.repeat), "--threads", str(setting.spec.threads)),
    ]
    log = folder / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(setting.spec.threads)},
        )
    if done.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return Side(LLAMACPP.name, error=f"failed: {lines[-1][:160]} (all of it: {log})")
    facts: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    side = Side(facts["peer"], facts["seconds"], settings=facts["settings"])
    side.runs = facts["runs"]
    if setting.quality:
        prepared = Prepared("gguf", folder / "model.gguf", 0, 0)
        side.perplexity = perplexity(contest.variant, prepared, setting)
    return side


def perplexity(variant: VariantSpec, prepared: Prepared, setting: Setting) -> float | None:
    """Of a prepared variant on the windows of the run."""
    runner = open_runner(variant, prepared, setting.model.source, setting.bos, setting.spec)
    try:
        return measure_quality(runner, setting.windows, None, variant.label, ignore).perplexity
    finally:
        runner.close()


def float_gguf(setting: Setting) -> Path:
    """QuantLab's F32 GGUF file of the model: what llama.cpp starts from."""
    variant = VariantSpec("gguf", None, (("type", "f32"),))
    folder = setting.work / "float"
    prepared = prepare_variant(variant, setting.model.source, None, folder, setting.spec, ignore)
    return prepared.path


def share_of(part: str, side: Side) -> float:
    """Fraction of all measured phases, for the listing."""
    return side.phases[part] / max(sum(side.phases.values()), 1e-9)

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

import torch
from torch import Tensor

from benchmarks.phases import KEEPING, LOADING, OTHER, READING, WRITING, watching
from quantlab.methods import METHODS
from quantlab.metrics.quality import measure_quality
from quantlab.models import LoadedModel, locate
from quantlab.prepared import Prepared
from quantlab.types import RunSpec, VariantSpec, ignore
from quantlab.variants import open_runner, prepare_variant

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).with_name("peers")
LOSS_TOLERANCE = 1e-3
"""Nats a token by which a peer's reading of the unquantized model may differ from QuantLab's: a
wrong rotary base costs a hundred times as much, float32 sums in another order a hundredth."""


@dataclass(frozen=True)
class Contest:
    """A pair. `limit`: QuantLab's seconds over the peer's, at most. `writes`: whether the peer's
    seconds include writing its file, so that QuantLab's must as well."""

    name: str
    variant: VariantSpec
    limit: float
    worker: str
    python: str = ""
    writes: bool = False


CONTESTS = {
    contest.name: contest
    for contest in (
        Contest("gptq", VariantSpec("gptq", 4), 1 / 5, "gptqmodel_worker.py", "gptqmodel"),
        Contest("awq", VariantSpec("awq", 4), 1 / 20, "autoawq_worker.py", "awq"),
        Contest(
            "q4_k_m",
            VariantSpec("gguf", None, (("type", "q4_k_m"),)),
            2.0,
            "llamacpp_worker.py",
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
    """Quantize with the peer in its own process. A failure is a result, with its last words."""
    python = ROOT / ".venv-peers" / contest.python / "bin" / "python"
    if contest.python and not python.is_file():
        return Side(
            contest.worker.split("_")[0], error=f"not installed: make peers ({contest.python})"
        )
    folder = setting.work / f"peer-{contest.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = ["--threads", str(setting.spec.threads)]
    if contest.python:
        inputs = ["--model", peer_folder(setting), "--ids", ids_file(setting)]
        inputs += ["--group-size", str(setting.spec.group_size)]
        if contest.name == "awq" and setting.awq_blocks:
            inputs += ["--blocks", str(setting.awq_blocks)]
        command = [python, WORKERS / contest.worker, *inputs, *threads, "--out", folder]
    else:
        inputs = ["--model", float_gguf(setting), "--repeat", str(setting.repeat)]
        command = [sys.executable, WORKERS / contest.worker, *inputs, *threads, "--out", folder]
    log = folder / "log.txt"
    with log.open("w") as output:
        # Elsewhere than the checkout: its folder `kernels` hides a package that peers try to use.
        done = subprocess.run(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(setting.spec.threads)},
        )
    if done.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return Side(contest.worker, error=f"failed: {lines[-1][:160]} (all of it: {log})")
    return read_peer(contest, setting, folder)


def read_peer(contest: Contest, setting: Setting, folder: Path) -> Side:
    """The peer's own report, and the perplexity of what it wrote."""
    facts: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    side = Side(facts["peer"], facts["seconds"], settings=facts["settings"])
    side.runs = facts.get("runs", [])
    if facts["blocks"] is not None:
        side.blocks = (facts["blocks"][0], facts["blocks"][1])
        side.scaled = facts["seconds"] * side.blocks[1] / side.blocks[0]
    if "original_loss" in facts:
        difference = abs(facts["original_loss"] - original_loss(setting))
        if difference > LOSS_TOLERANCE:
            side.error = f"reads another model: its loss before quantizing is {difference:.3f} off"
    if setting.quality and side.blocks is None and not side.error:
        if contest.python:
            plain = str(folder / "plain")
            prepared = Prepared("unquantized", Path(), 0, 0)
            side.perplexity = perplexity(VariantSpec("fp32"), prepared, setting, plain)
        else:
            prepared = Prepared("gguf", folder / "model.gguf", 0, 0)
            side.perplexity = perplexity(contest.variant, prepared, setting)
    return side


def perplexity(
    variant: VariantSpec, prepared: Prepared, setting: Setting, model: str = ""
) -> float | None:
    """Of a prepared variant, or of the float32 folder `model`, on the windows of the run."""
    source = locate(model) if model else setting.model.source
    runner = open_runner(variant, prepared, source, setting.bos, setting.spec)
    try:
        return measure_quality(runner, setting.windows, None, variant.label, ignore).perplexity
    finally:
        runner.close()


def original_loss(setting: Setting) -> float:
    """Mean negative log-likelihood of the first calibration piece, unquantized, nats a token."""
    piece = setting.ids[:1]
    with torch.inference_mode():
        logits = setting.model.module(piece, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, piece[0, 1:]))


def ids_file(setting: Setting) -> Path:
    path = setting.work / "ids.json"
    path.write_text(json.dumps(setting.ids.tolist()), encoding="utf-8")
    return path


def peer_folder(setting: Setting) -> Path:
    """The model in float32 for transformers of any release: what has changed its name since stands
    there under both names. (Without `rope_theta`, transformers 4 takes 10,000 and says nothing.)"""
    from safetensors.torch import save_file

    folder = setting.work / "model"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    module = setting.model.module
    tied = module.config.tie_word_embeddings
    state = {
        name: tensor.float().contiguous()
        for name, tensor in module.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    setting.model.tokenizer.save_pretrained(folder)
    tokenizer = folder / "tokenizer_config.json"
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.write_text(json.dumps(values), encoding="utf-8")
    config = module.config.to_dict()
    config |= {"torch_dtype": "float32", "dtype": "float32"}
    config["architectures"] = [type(module).__name__]
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        config["rope_theta"] = rotary["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def float_gguf(setting: Setting) -> Path:
    """QuantLab's F32 GGUF file of the model: what llama.cpp starts from."""
    variant = VariantSpec("gguf", None, (("type", "f32"),))
    folder = setting.work / "float"
    prepared = prepare_variant(variant, setting.model.source, None, folder, setting.spec, ignore)
    return prepared.path


def share_of(part: str, side: Side) -> float:
    """Fraction of all measured phases, for the listing."""
    return side.phases[part] / max(sum(side.phases.values()), 1e-9)

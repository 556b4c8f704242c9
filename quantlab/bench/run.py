"""The whole benchmark, as the document that `--json` writes.

    {"schema": 1, "environment": {…}, "models": {…},
     "decode": {"q4/bundled/2": {"quantlab": x, "llama.cpp": y, "ratio": r, …}, …},
     "prefill": {…},
     "gemv_fraction_of_bandwidth": {"q4/2": 0.85, …}, "prefill_fraction_of_peak": {…},
     "gemv": {"q4/2": {…}, …}, "linears": {…}}

Speeds are tokens a second, medians over rounds in which all sides took turns; `range` holds the
least and the greatest. A key names the weights, the model and the threads. q4 and q8 round their
inputs to int8 in blocks of 32, as llama.cpp does; q4-exact and q8-exact do not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from kernels import native
from kernels.build import BuildError
from quantlab.bench import contest, linears, subjects
from quantlab.bench.sides import check_peer, here, open_peer, peer
from quantlab.bench.spec import BLOCKWISE, GENERATED, PLAIN, W8A8, BenchSpec, Weights, goal
from quantlab.engine import Session, context_length
from quantlab.environment import machine
from quantlab.errors import ConfigError
from quantlab.metrics.speed import CONTEXT_TOKENS, PROMPT_TOKENS, Decoder
from quantlab.models import LoadedModel, locate
from quantlab.native_decoder import NativeDecoder, NativeSession
from quantlab.native_records import refusal

Say = Callable[[str], None]
"""Told what is measured now."""

CAPACITY = PROMPT_TOKENS + CONTEXT_TOKENS
FLOATS = {"transformers float32": torch.float32, "transformers bfloat16": torch.bfloat16}


def run(spec: BenchSpec, say: Say) -> dict[str, Any]:
    """Measure. Raises: ConfigError where there is nothing to measure with or to compare with,
    ModelError; all of it before anything is measured, as far as that can be known."""
    info = check(spec)
    threads = torch.get_num_threads()
    document: dict[str, Any] = {
        "schema": 1,
        "environment": environment(spec, info),
        "models": {},
        "decode": {},
        "prefill": {},
        "gemv_fraction_of_bandwidth": {},
        "prefill_fraction_of_peak": {},
        "gemv": {},
        "linears": {},
    }
    try:
        if {"decode", "prefill"} & set(spec.parts):
            for name in spec.models:
                measure_model(spec, name, document, say)
        for count in spec.threads:
            if "gemv" in spec.parts:
                say(f"products of one row, {threads_of(count)}")
                document["gemv"] |= linears.gemv(count, spec.group_size, spec.quick)
            if "linears" in spec.parts:
                say(f"products of {PROMPT_TOKENS} rows, {threads_of(count)}")
                document["linears"] |= linears.prefill(count, spec.group_size, spec.quick)
    finally:
        torch.set_num_threads(threads)
    for short, long in (
        ("gemv", "gemv_fraction_of_bandwidth"),
        ("linears", "prefill_fraction_of_peak"),
    ):
        document[long] = {key: entry["fraction"] for key, entry in document[short].items()}
    return document


def check(spec: BenchSpec) -> str | None:
    """llama.cpp's build where it is wanted. Raises: ConfigError, ModelError."""
    try:
        native.native()
    except BuildError as error:
        raise ConfigError(f"bench: there is nothing to measure: {error}") from None
    for name in spec.models:
        source = locate("bundled" if name == GENERATED else name)
        if source.kind == "quantlab":
            raise ConfigError(f"--model: {name} is quantized already; name its original")
    labels = [subjects.label(name) for name in spec.models]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--model: two models are called {', '.join(labels)}; measure them apart")
    return check_peer() if spec.llamacpp else None


def environment(spec: BenchSpec, info: str | None) -> dict[str, Any]:
    """The machine, the builds, and what was asked for."""
    return {
        **machine(),
        "native": native.native().level.label,
        "llama.cpp": info,
        "threads": list(spec.threads),
        "group_size": spec.group_size,
        "quick": spec.quick,
    }


def threads_of(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def measure_model(spec: BenchSpec, name: str, document: dict[str, Any], say: Say) -> None:
    """Both contests of a model, into the document: packed weights beside llama.cpp, then W8A8 and
    bfloat16 beside transformers. They do not share a round: all at once would fill the memory."""
    label = subjects.label(name)
    facts: dict[str, Any] = {"weights": {}, "peers": {}}
    document["models"][label] = facts
    say(f"{label}: packing")
    plain, tokens = open_plain(spec, name, facts)
    ours = [("bf16", PLAIN, plain), *open_packed(spec, name, BLOCKWISE, facts)]
    files = make_files(spec, name, facts, say)
    for count in spec.threads:
        say(f"{label}: {'llama.cpp and ' if files else ''}QuantLab, {threads_of(count)}")
        with ExitStack() as stack:
            sides = [here(side, decoder, count, row.parts) for side, row, decoder in ours]
            for title, path in files.items():
                engine = open_peer(path, count, CAPACITY)
                stack.callback(engine.close)
                sides.append(peer(title, engine))
            rates = contest.take_turns(sides, tokens, spec.parts, spec.quick)
        for row in BLOCKWISE:
            beside = None if row.peer is None else ("llama.cpp", title_of(row.peer))
            note(document, rates, row, label, count, beside, "bf16", say)
    del ours
    gc.collect()
    other = [("bf16", PLAIN, plain), *open_packed(spec, name, (W8A8,), facts)]
    models = {title: Session(subjects.read(name, dtype).module) for title, dtype in FLOATS.items()}
    for count in spec.threads:
        say(f"{label}: transformers and QuantLab, {threads_of(count)}")
        sides = [here(side, decoder, count) for side, _, decoder in other]
        sides += [here(title, session, count) for title, session in models.items()]
        rates = contest.take_turns(sides, tokens, spec.parts, spec.quick)
        note(
            document,
            rates,
            PLAIN,
            label,
            count,
            ("transformers", "transformers bfloat16"),
            None,
            say,
        )
        note(
            document,
            rates,
            W8A8,
            label,
            count,
            ("transformers", "transformers float32"),
            "bf16",
            say,
        )


def note(
    document: dict[str, Any],
    rates: contest.Rates,
    row: Weights,
    label: str,
    threads: int,
    beside: tuple[str, str] | None,
    plain: str | None,
    say: Say,
) -> None:
    """Enter a row's figures under its key, and say them: a run that is cut short told something."""
    for part in ("decode", "prefill"):
        if (part, row.name) in rates:
            aim = goal(part, row.name, label)
            key = f"{row.name}/{label}/{threads}"
            entry = contest.compared(rates, part, row.name, beside, plain, aim)
            document[part][key] = entry
            ratio = f", {entry['ratio']:.2f} times {entry['peer']}" if "ratio" in entry else ""
            say(f"    {part} {key}: {entry['quantlab']:.1f} tokens/s{ratio}")


def open_plain(spec: BenchSpec, name: str, facts: dict[str, Any]) -> tuple[Decoder, contest.Tokens]:
    """The unquantized native engine, and the tokens that everyone reads. Raises: ConfigError."""
    model = subjects.read(name, torch.bfloat16)
    if reason := refusal(model.module):
        raise ConfigError(f"--model: {name}: {reason}; choose another model")
    facts["parameters"] = model.parameters
    facts["weights"]["bf16"] = subjects.pack(model, PLAIN, spec.group_size)
    vocabulary = int(model.module.get_input_embeddings().weight.shape[0])
    tokens = contest.draw(vocabulary, context_length(model.module), spec.quick)
    return NativeSession(NativeDecoder(model.module, CAPACITY)), tokens


def open_packed(
    spec: BenchSpec, name: str, rows: tuple[Weights, ...], facts: dict[str, Any]
) -> list[tuple[str, Weights, Decoder]]:
    """(side, row, decoder) of packed weights; rows that differ in their inputs alone share them."""
    opened: list[tuple[str, Weights, Decoder]] = []
    packed: dict[tuple[str | None, int], LoadedModel] = {}
    for row in rows:
        if not set(row.parts) & set(spec.parts):
            continue
        kind = (row.method, row.bits)
        if kind not in packed:
            packed = {kind: subjects.read(name, torch.bfloat16)}
            facts["weights"][row.name] = subjects.pack(packed[kind], row, spec.group_size)
        decoder = NativeDecoder(packed[kind].module, CAPACITY, exact=row.exact)
        opened.append((row.name, row, NativeSession(decoder)))
    return opened


def make_files(spec: BenchSpec, name: str, facts: dict[str, Any], say: Say) -> dict[str, Any]:
    """llama.cpp's files by their titles, empty where it is not wanted."""
    if not spec.llamacpp:
        return {}
    types = dict.fromkeys(row.peer for row in BLOCKWISE if row.peer is not None)
    say(f"{subjects.label(name)}: GGUF files {', '.join(types)}")
    model = subjects.read(name, torch.bfloat16)
    files = {title_of(kind): subjects.gguf_file(model, kind) for kind in types}
    facts["peers"] = {title: subjects.peer_facts(path) for title, path in files.items()}
    return files


def title_of(file_type: str) -> str:
    return f"llama.cpp {file_type.upper()}"

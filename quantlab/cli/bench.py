"""`bench`: QuantLab's speed beside llama.cpp, transformers and what the machine can do."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from quantlab.bench.spec import GENERATED, PARTS, BenchSpec
from quantlab.cli import options as o
from quantlab.cli.output import check_writable, to_json, write_text
from quantlab.cli.terminal import print_rows
from quantlab.errors import Cancelled, ConfigError

D = BenchSpec()
SPEEDS = (("decode", "Decode, tokens/s"), ("prefill", "Prefill, tokens/s"))
FRACTIONS = (
    ("gemv", "One row, GB/s", "read bandwidth", 1e9),
    ("linears", "512 rows, TOPS", "peak", 1e12),
)


def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="LIST",
            help="Models, separated by commas: bundled, a Hub id, a folder, a .gguf file, or "
            f"{GENERATED}, a generated model of that shape.",
        ),
    ] = ",".join(D.models),
    against: Annotated[
        Literal["llama.cpp"] | None,
        typer.Option("--against", help="Measure this beside QuantLab, at equal bits."),
    ] = None,
    threads: Annotated[
        str, typer.Option("--threads", metavar="LIST", help="Thread counts, separated by commas.")
    ] = ",".join(map(str, D.threads)),
    only: Annotated[
        str,
        typer.Option("--only", metavar="LIST", help=f"Some of {', '.join(PARTS)}."),
    ] = ",".join(PARTS),
    group_size: o.GroupSize = D.group_size,
    quick: Annotated[
        bool, typer.Option("--quick", help="Once and small: to see that it runs.")
    ] = False,
    json: o.Json = None,
) -> None:
    """Measure speed, in turn with others.

    Every figure is a median over rounds in which all sides took turns, and every ratio is one of
    such medians. transformers is always measured; llama.cpp with --against. Give the machine
    nothing else to do meanwhile. The generated model is kept in QuantLab's home (1.8 GB).
    """
    check_writable("--json", json)
    spec = read_spec(model, against is not None, threads, only, group_size, quick)
    from quantlab.bench.run import run

    try:
        document = run(spec, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        raise Cancelled("cancelled: nothing was written") from None
    print_document(document)
    if json is not None:
        write_text(json, to_json(document))


def read_spec(
    model: str, llamacpp: bool, threads: str, only: str, group_size: int, quick: bool
) -> BenchSpec:
    """The options as a spec. Raises: ConfigError that names the option."""
    counts = listed(threads)
    if not all(count.isdecimal() for count in counts):
        raise ConfigError(f"--threads: {threads!r}: whole numbers with commas, for example 1,2")
    try:
        return BenchSpec(
            models=listed(model),
            llamacpp=llamacpp,
            threads=tuple(int(count) for count in counts),
            parts=listed(only),
            group_size=group_size,
            quick=quick,
        )
    except ConfigError as error:
        raise ConfigError(f"--{error}", error.hint) from None


def listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_document(document: dict[str, Any]) -> None:
    """The document as tables, one a part."""
    for part, title in SPEEDS:
        rows = [speed_row(key, entry) for key, entry in document[part].items()]
        if rows:
            heads = (title, "QuantLab", "peer", "ratio", "goal", "of bf16", "against")
            print_rows(heads, rows)
            print()
    for part, title, limit, unit in FRACTIONS:
        rows = [fraction_row(key, entry, unit) for key, entry in document[part].items()]
        if rows:
            print_rows((title, "QuantLab", limit, "fraction", "goal", "against"), rows)
            print()


def speed_row(key: str, entry: dict[str, Any]) -> tuple[str, ...]:
    peer = entry.get("llama.cpp", entry.get("transformers"))
    return (
        key,
        with_range(entry["quantlab"], entry["range"]["quantlab"]),
        "–" if peer is None else f"{peer:.1f}",
        "–" if "ratio" not in entry else f"{entry['ratio']:.2f}",
        aim(entry, "ratio"),
        f"{entry['ratio_to_unquantized']:.2f}" if "ratio_to_unquantized" in entry else "–",
        entry.get("peer", "–"),
    )


def fraction_row(key: str, entry: dict[str, Any], unit: float) -> tuple[str, ...]:
    low, high = entry["range"]["fraction"]
    return (
        key,
        f"{entry['quantlab'] / unit:.2f}",
        f"{entry['machine'] / unit:.2f}",
        f"{entry['fraction']:.2f} ({low:.2f}–{high:.2f})",
        aim(entry, "fraction"),
        entry.get("peak", "memory"),
    )


def with_range(value: float, ends: list[float]) -> str:
    return f"{value:.1f} ({ends[0]:.0f}–{ends[1]:.0f})"


def aim(entry: dict[str, Any], of: str) -> str:
    """The goal, and whether it is reached."""
    if "goal" not in entry:
        return "–"
    return f"{entry['goal']:g} {'reached' if entry[of] >= entry['goal'] else 'missed'}"

"""GPTQ and AWQ as QuantLab writes them against GPTQModel and AutoAWQ; `make bench-peers`.

    python -m benchmarks.side_by_side [--only gptq:4,gptq:3,awq:4] [--group-sizes 64,128] \
        [--text FILE] [--calibration FILE] [--calibration-tokens N]

QuantLab's side is exported in the peer's own format and read back, the peer's side is what it left;
both are measured alike, on the same windows, and both were calibrated on the same tokens. What the
format cannot say (groups that do not divide a row) is measured as QuantLab keeps it. GPTQModel
takes about a minute a row for the bundled model, AutoAWQ half an hour (`make peers` installs them).
A difference counts where its paired bootstrap interval leaves zero out.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantlab import pipeline
from quantlab.errors import ConfigError
from quantlab.methods import parse_variant
from quantlab.plots import numbers
from quantlab.plots.verdict import difference
from quantlab.results import ResultRecord, document
from quantlab.store import Store
from quantlab.types import Event, Progress, RunSpec, VariantFinished, VariantSpec

PAIRS = {
    "gptq:4": ("gptqmodel:4", "gptq", ("", ":symmetric=true")),
    "gptq:3": ("gptqmodel:3", "gptq", ("", ":symmetric=true")),
    "awq:4": ("autoawq:4", "awq", ("",)),
}
"""QuantLab's method -> the peer's, the format both are in, and the options that are tried: the
method's own defaults, and the grid that GPTQModel has by default."""


@dataclass
class Row:
    """One of QuantLab's ways against the peer's. `reason`: why the format does not hold it."""

    name: str
    group_size: int
    peer: VariantSpec
    ours: VariantSpec
    folder: Path
    format: str
    reason: str = ""
    records: dict[str, ResultRecord] = field(default_factory=dict)

    @property
    def measured(self) -> VariantSpec:
        path = (("path", str(self.folder)),)
        return self.ours if self.reason else VariantSpec("checkpoint", None, path)


def main() -> None:
    given = arguments()
    folder = Path(tempfile.mkdtemp(prefix="side-by-side-")) if given.work is None else given.work
    folder.mkdir(parents=True, exist_ok=True)
    spec = RunSpec(
        model=given.model,
        calibration=given.calibration,
        calibration_tokens=given.calibration_tokens,
        text=given.text,
        eval_tokens=given.eval_tokens,
        threads=given.threads,
    )
    rows = list(rows_of(given.only, given.group_sizes, folder.resolve()))
    try:
        for row in rows:
            write(row, spec)
        records = measure(rows, spec)
    finally:
        if given.work is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"\n{given.model}, calibrated on {given.calibration_tokens:,} tokens of {given.calibration}"
    )
    print(f"measured on {given.eval_tokens:,} tokens of {given.text}, {given.threads} threads\n")
    worse = [row for row in rows if print_row(row)]
    if given.json:
        text = json.dumps(document(pipeline.environment(spec), records), indent=1)
        given.json.write_text(text, encoding="utf-8")
    raise SystemExit(1 if worse else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold QuantLab's checkpoints against the peers'.")
    parser.add_argument("--only", default=",".join(PAIRS), help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--group-sizes", default="64,128")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="project", help="evaluation text: a name or a file")
    parser.add_argument("--calibration", default="project", help="a name or a file")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept if named")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := set(given.only) - PAIRS.keys():
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; of {', '.join(PAIRS)}")
    sizes = given.group_sizes.split(",")
    if not all(size.isdecimal() and int(size) >= 8 for size in sizes):
        parser.error(f"--group-sizes: {given.group_sizes}; needs numbers from 8, such as 64,128")
    given.group_sizes = [int(size) for size in sizes]
    return given


def rows_of(names: Sequence[str], group_sizes: Sequence[int], folder: Path) -> Iterator[Row]:
    for name in names:
        peer, format, ways = PAIRS[name]
        for size in group_sizes:
            for way in ways:
                ours = f"{name}:group_size={size}{way}"
                yield Row(
                    f"{name}{way}",
                    size,
                    parse_variant(f"{peer}:group_size={size}"),
                    parse_variant(ours),
                    folder / ours.replace(":", "-"),
                    format,
                )


def write(row: Row, spec: RunSpec) -> None:
    """QuantLab's checkpoint in the peer's format, or why there can be none."""
    print(f"writing {row.ours.label} as {row.format}", flush=True)
    try:
        pipeline.quantize(spec, row.ours, row.folder, row.format)
    except ConfigError as error:  # what the format cannot say; everything else ends the run
        row.reason = str(error)


def measure(rows: Sequence[Row], spec: RunSpec) -> list[ResultRecord]:
    """All checkpoints and peers in one comparison, so that intervals are paired."""
    variants = {row.measured.label: row.measured for row in rows}
    variants |= {row.peer.label: row.peer for row in rows}
    wanted = RunSpec.from_json(
        spec.to_json() | {"variants": [one.to_json() for one in variants.values()]}
    )
    stages: set[tuple[str, str]] = set()

    def tell(event: Event) -> None:
        if isinstance(event, VariantFinished):
            print(f"{event.variant}: {event.record['status']}", flush=True)
        elif isinstance(event, Progress) and (event.variant, event.stage) not in stages:
            stages.add((event.variant, event.stage))
            print(f"  {event.variant} {event.stage}", flush=True)

    records = pipeline.compare(wanted, store=Store(), emit=tell)
    by_label = {record.variant: record for record in records}
    for row in rows:
        row.records["ours"] = by_label[row.measured.label]
        row.records["peer"] = by_label[row.peer.label]
    return records


def print_row(row: Row) -> bool:
    """Both sides and their difference; whether QuantLab's is clearly the worse one."""
    print(f"{row.name}, groups of {row.group_size}")
    ours, peer = row.records["ours"], row.records["peer"]
    if row.reason:
        print(f"    in QuantLab's own folder: {row.reason}")
    for name, record in (("QuantLab", ours), (who(peer), peer)):
        print(f"    {name:<17} {figures(record)}")
    if ours.status != "finished" or peer.status != "finished":
        return False
    nats, kl = difference(ours, peer, "nll"), difference(ours, peer, "kl")
    assert nats is not None
    assert kl is not None
    assert ours.kl_divergence is not None
    assert peer.kl_divergence is not None
    low, mean, high = (math.exp(value) for value in (nats.low, nats.mean, nats.high))
    verdict = "indistinguishable"
    if kl.clear:
        verdict = "QuantLab is better" if kl.high < 0 else "QuantLab is WORSE"
    print(
        f"    ratio             perplexity {mean:.4f} [{low:.4f}, {high:.4f}], "
        f"KL {ours.kl_divergence / peer.kl_divergence:.3f}; "
        f"KL difference {kl.mean:+.4f} [{kl.low:+.4f}, {kl.high:+.4f}]: {verdict}"
    )
    return kl.low > 0 or nats.low > 0


def who(record: ResultRecord) -> str:
    peer = record.details.get("peer")
    return record.method if peer is None else f"{peer['peer']} {peer['version']}"


def figures(record: ResultRecord) -> str:
    if record.status != "finished":
        return f"{record.status}: {record.error}"
    seconds = "" if record.quantize_seconds is None else f", in {record.quantize_seconds:.0f} s"
    return (
        f"perplexity {numbers.perplexity(record.perplexity)}, "
        f"KL {numbers.divergence(record.kl_divergence)}, "
        f"{numbers.megabytes(record.size_bytes)} MB{seconds}"
    )


if __name__ == "__main__":
    main()

"""Seconds to quantize at 4 bits, against the peers, in one run; `make bench-quantize`.

    python -m benchmarks.quantize [--only gptq,awq,q4_k_m] [--wikitext FILE] [--awq-blocks N]

QuantLab and its peer take turns on the same weights and the same 64 x 512 calibration tokens, each
on the same number of threads; loading and saving are not counted (but with Q4_K_M, where llama.cpp
does all in one call). Both results are then measured on the same evaluation windows: a fast
quantizer that writes a worse model has won nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import CONTESTS, Contest, Setting, Side, run_peer, run_quantlab, share_of
from kernels import native
from kernels.build import BuildError
from quantlab.models import load
from quantlab.pipeline import environment
from quantlab.texts import calibration_ids, tokenize
from quantlab.types import RunSpec, ignore

CALIBRATION_CHARACTERS = 300_000


def main() -> None:
    given = arguments()
    folder = Path(tempfile.mkdtemp(prefix="bench-quantize-")) if given.work is None else given.work
    try:
        setting = prepare(given, folder)
        rows = [
            compete(CONTESTS[name], setting) for name in given.only.split(",") if name in CONTESTS
        ]
        print_rows(rows)
        if given.json:
            document = {"schema": 1, "environment": environment(setting.spec), "contests": rows}
            given.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    finally:
        if given.work is None:
            shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time quantizing against the peers.")
    parser.add_argument("--only", default=",".join(CONTESTS), help=f"of {', '.join(CONTESTS)}")
    parser.add_argument(
        "--wikitext",
        type=Path,
        help="text file: evaluate on its beginning, calibrate on its last 300,000 characters; "
        "the project's own texts without it",
    )
    parser.add_argument("--pieces", type=int, default=64, help="of 512 calibration tokens")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeat", type=int, default=3, help="of the short ones; the median counts"
    )
    parser.add_argument(
        "--awq-blocks",
        type=int,
        default=0,
        help="let AutoAWQ do only the first N blocks (it takes about a minute a block)",
    )
    parser.add_argument("--no-quality", action="store_true", help="seconds only")
    parser.add_argument("--no-peers", action="store_true", help="QuantLab's side only")
    parser.add_argument("--work", type=Path, help="folder for what is written; kept if named")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - CONTESTS.keys():
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; of {', '.join(CONTESTS)}")
    return given


def prepare(given: argparse.Namespace, folder: Path) -> Setting:
    """Model, calibration tokens and evaluation windows, the same for both sides."""
    torch.set_num_threads(given.threads)
    with suppress(BuildError):  # Nobody compiles while the clock runs; the peers come compiled.
        native.native()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    evaluation, calibration = "project", "project"
    if given.wikitext is not None:
        evaluation = str(given.wikitext.resolve())
        tail = folder / "calibration.txt"
        text = given.wikitext.read_text(encoding="utf-8")
        tail.write_text(text[-CALIBRATION_CHARACTERS:], encoding="utf-8")
        calibration = str(tail)
    spec = RunSpec(
        calibration=calibration,
        calibration_tokens=512 * given.pieces,
        text=evaluation,
        eval_tokens=given.eval_tokens,
        threads=given.threads,
    )
    model = load(spec.model)
    length = spec.calibration_length
    ids, _ = calibration_ids(model, calibration, spec.calibration_tokens, length, spec.seed, ignore)
    text_ids = tokenize(model.tokenizer, evaluation, "evaluation")
    windows = text_ids.windows(spec.eval_tokens, spec.window)
    print(
        f"{model.source.name}, {ids.shape[0]} x {ids.shape[1]} calibration tokens, "
        f"{len(windows)} windows of {spec.window}, {given.threads} threads",
        flush=True,
    )
    return Setting(
        spec=spec,
        model=model,
        ids=ids,
        windows=windows,
        bos=text_ids.bos,
        work=folder,
        repeat=given.repeat,
        awq_blocks=given.awq_blocks,
        quality=not given.no_quality,
        peers=not given.no_peers,
    )


def compete(contest: Contest, setting: Setting) -> dict[str, Any]:
    """Both sides, one after the other, as one row of the document."""
    print(f"{contest.name}: QuantLab", flush=True)
    own = run_quantlab(contest, setting)
    if setting.peers:
        print(f"{contest.name}: the peer", flush=True)
        peer = run_peer(contest, setting)
    else:
        peer = Side("peer", error="left out: --no-peers")
    seconds = peer.seconds if peer.blocks is None else peer.scaled
    ratio = None if not seconds or own.seconds is None or peer.error else own.seconds / seconds
    return {
        "contest": contest.name,
        "quantlab": asdict(own) | {"shares": {part: share_of(part, own) for part in own.phases}},
        "peer": asdict(peer),
        "ratio": ratio,
        "limit": contest.limit,
        "holds": None if ratio is None else ratio <= contest.limit,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print()
        for side in (row["quantlab"], row["peer"]):
            print(f"{side['name']:<42} {clock(side):>34}  perplexity {number(side['perplexity'])}")
            for line in filter(None, (side["settings"], side["error"])):
                print(f"    {line}")
        if row["ratio"] is not None:
            verdict = "holds" if row["holds"] else "DOES NOT HOLD"
            basis = "of the scaled figure" if row["peer"]["blocks"] else "of the peer's seconds"
            print(
                f"  ratio {row['ratio']:.3f} {basis} (1/{1 / row['ratio']:.1f}), "
                f"at most {row['limit']:.3f}: {verdict}"
            )
        shares = sorted(row["quantlab"]["phases"].items(), key=lambda item: -item[1])
        print("  where QuantLab's time goes:")
        for part, seconds in shares:
            print(f"    {part:<22} {seconds:8.2f} s  {row['quantlab']['shares'][part]:4.0%}")


def clock(side: dict[str, Any]) -> str:
    if side["seconds"] is None:
        return "no time"
    text = f"{side['seconds']:.2f} s"
    if side["blocks"]:
        done, total = side["blocks"]
        text += f", first {done} of {total} blocks (scaled {side['scaled']:.0f} s)"
    return text


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


if __name__ == "__main__":
    main()

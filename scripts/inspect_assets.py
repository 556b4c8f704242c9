"""Make what the Inspect tab ships: `python scripts/inspect_assets.py [--bits 4 3] [--tokens 1024]`.

Writes assets/inspect: bundled.safetensors, the survey of the bundled model, and for each of the
bits kl-BITS.json, the causal KL divergence of every linear. The latter takes minutes; what was
measured before is kept under $QUANTLAB_HOME and not measured again. With `--bits` and nothing
after it only the survey is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantlab.inspection import capture, causal, survey
from quantlab.models import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    survey.BUNDLED.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    shutil.copyfile(capture.captured("bundled", said), survey.BUNDLED)
    print(f"{survey.BUNDLED.name}: {survey.BUNDLED.stat().st_size:,} bytes, {since(started)}")
    for bits in given.bits:
        started = time.monotonic()
        setting = causal.Setting(bits=bits, tokens=given.tokens)
        _, found = causal.measure(locate("bundled"), setting, (), said)
        path = causal.BUNDLED / f"kl-{bits}.json"
        cells = {
            name: tuple(float(f"{value:.6g}") for value in cell)
            for name, cell in found.cells.items()
        }
        causal.keep(path, dataclasses.replace(found, cells=cells))  # type: ignore[arg-type]
        print(f"{path.name}: {path.stat().st_size:,} bytes, {since(started)}")


def said(stage: str, done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"{stage} {done}/{total}", flush=True)


def since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    main()

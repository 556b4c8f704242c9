"""A peer quantizes a folder; its own Python runs this, by the file's name.

    .venv-peers/NAME/bin/python -P run.py RECIPE.py --model … --ids … --out … --options … …

RECIPE.py has `quantize(job)`: it leaves a checkpoint in `job.checkpoint` and returns what is to be
told of it. What happens goes to standard output as JSON lines, and everything that the peer itself
prints to standard error:

    {"stage": "quantize", "done": 3, "total": 30}
    {"report": {"peer": "GPTQModel", "version": "7.7.0", "seconds": 61.2, …}}     the last, or
    {"error": "No module named 'gptqmodel'", "missing": true}
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCH_SECONDS = 0.25
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Job:
    """`model`: a folder that transformers reads; `pieces`: calibration tokens, all of one length;
    `options`: those of the method; `blocks`: only so many, 0 is all; `step` is told how far it is.
    """

    model: Path
    pieces: list[list[int]]
    checkpoint: Path
    options: dict[str, Any]
    threads: int
    blocks: int
    step: Callable[[str, int, int], None]


class Clock:
    """Seconds since the last question."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def lap(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


def main() -> int:
    parser = argparse.ArgumentParser(description="Let a peer quantize a folder.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True, help="JSON: lists of token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    given = parser.parse_args()
    threading.Thread(target=end_with, args=(given.parent,), daemon=True).start()
    # Peers print to standard output as well; events go to a private copy of it.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    def step(stage: str, done: int, total: int) -> None:
        tell({"stage": stage, "done": done, "total": total})

    pieces = json.loads(given.ids.read_text(encoding="utf-8"))
    job = Job(
        given.model,
        pieces,
        given.out / "checkpoint",
        given.options,
        given.threads,
        given.blocks,
        step,
    )
    try:
        report = work(given.recipe, job)
    except ImportError as error:
        tell({"error": short(error), "missing": True})
        return 1
    except SystemExit as error:  # how a recipe says, in its own words, what it cannot do
        tell({"error": short(error)})
        return 1
    except Exception as error:
        traceback.print_exc()
        tell({"error": f"{type(error).__name__}: {short(error) or place(error)}"})
        return 1
    tell({"report": report})
    return 0


def work(recipe: Path, job: Job) -> dict[str, Any]:
    """The report of a recipe, with what is the same for all of them."""
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    if spec is None or spec.loader is None:
        raise SystemExit(f"there is no {recipe.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job.step("load", 0, 1)
    import torch

    torch.set_num_threads(job.threads)
    import transformers

    module.check()
    loss = original_loss(job)
    report: dict[str, Any] = module.quantize(job, Clock())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return report | {
        "original_loss": loss,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "versions": versions,
    }


def original_loss(job: Job) -> float:
    """Mean negative log-likelihood of the first piece, nats a token, as the peer's transformers
    reads the unquantized folder. QuantLab compares it with its own: configurations have changed
    names between releases, and a wrong rotary base would make the peer look bad."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(job.model), attn_implementation="eager")
    tokens = torch.tensor(job.pieces[:1])
    with torch.inference_mode():
        logits = model.float().eval()(tokens, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


def end_with(parent: int) -> None:
    """Kill this process and all that it started when `parent`, which started it, is gone."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    # It leads a session of its own: the group is its own and its children's.
    os.killpg(os.getpgid(0), signal.SIGKILL)


def short(error: BaseException) -> str:
    return " ".join(str(error).split())[:REASON_CHARACTERS]


def place(error: BaseException) -> str:
    """Where an error without words was raised: `gemm.py, line 132: assert …`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Nothing that libraries do while unloading may hang or crash.

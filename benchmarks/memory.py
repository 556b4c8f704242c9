"""Peak memory and seconds of quantizing against depth.

    python -m benchmarks.memory [--methods rtn,gptq] [--blocks 4,8,16,32] [--whole] [--json FILE]

Random Llamas of one width and several depths are written as bfloat16 shards and quantized by
`quantlab.pipeline.quantize`, each in a fresh process. What is reported:

- peak: the high-water mark of resident memory (VmHWM). It counts pages of mapped files as well,
  which the system can drop whenever it needs the room.
- own: the largest RssAnon seen in samples every 5 ms: memory that only the process itself can free.
- CPU s: seconds of the processor, which other work on the machine does not lengthen.
- above: peak less what the process held before it began (torch and transformers, imported).

`--whole` loads each model into memory first, for comparison. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlab.metrics.memory import peak_rss_bytes, reset_peak

WIDTH, FEED_FORWARD, HEADS, VOCABULARY = 1024, 2816, 16, 512
MEGABYTE = 1e6
HEAD = "blocks  seconds   CPU s  a block   peak MB    own MB  above MB    peak     own   above"


def main() -> None:
    given = arguments()
    if given.make is not None:
        make(given.make, int(given.blocks))
    elif given.child is not None:
        print(json.dumps(measure(*given.child, whole=given.whole, tokens=given.tokens)))
    else:
        rows = compete(given)
        if given.json:
            given.json.write_text(json.dumps({"schema": 1, "rows": rows}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory and seconds against depth.")
    parser.add_argument("--methods", default="rtn,gptq", help="as `compare` takes them")
    parser.add_argument("--blocks", default="4,8,16,32", help="depths")
    parser.add_argument("--tokens", type=int, default=1024, help="of calibration, in pieces of 128")
    parser.add_argument("--whole", action="store_true", help="load models whole")
    parser.add_argument("--work", type=Path, help="folder for the models; a temporary one without")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def compete(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every depth; prints a table a method."""
    depths, rows = [int(depth) for depth in given.blocks.split(",")], []
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=given.work) as work:
        for depth in depths:
            run("--make", f"{work}/{depth}", "--blocks", str(depth))
        for method in given.methods.split(","):
            print(f"\n{method}: width {WIDTH}, feed-forward {FEED_FORWARD}, one thread")
            print(HEAD, flush=True)
            last = None
            for depth in depths:
                settings = ["--whole"] if given.whole else []
                out = f"{work}/out-{depth}-{method.replace(':', '-')}"
                answer = run(
                    *("--child", f"{work}/{depth}", method, out),
                    *("--tokens", str(given.tokens), *settings),
                )
                rows.append({"method": method, "blocks": depth, **json.loads(answer)})
                print(line(rows[-1], last), flush=True)
                last = rows[-1]
            print_slope([row for row in rows if row["method"] == method])
    return rows


def run(*arguments: str) -> str:
    """This file in a process of its own; the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return (done.stdout.splitlines() or [""])[-1]


def make(folder: Path, blocks: int) -> None:
    """A random Llama in bfloat16, in shards, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.initialization import no_init_weights

    from quantlab.texts import ASSETS

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    bpe.train_from_iterator([(ASSETS / "evaluation.txt").read_text(encoding="utf-8")], trainer)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    with no_init_weights():
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def measure(
    folder: str, method: str, out: str, *, whole: bool, tokens: int
) -> dict[str, float | int]:
    """Quantize in this process: bytes and seconds."""
    from quantlab import pipeline, single, variants
    from quantlab.methods import parse_variant
    from quantlab.models import load
    from quantlab.types import RunSpec

    if whole:
        for module in (variants, single):
            vars(module)["stream"] = load
    spec = RunSpec(
        model=folder, calibration_tokens=tokens, calibration_length=128, threads=1, group_size=128
    )
    before = resident("VmRSS")
    reset_peak()
    with Sampled() as sampled:
        started, used = time.perf_counter(), time.process_time()
        pipeline.quantize(spec, parse_variant(method), Path(out))
        seconds, used = time.perf_counter() - started, time.process_time() - used
    peak = peak_rss_bytes()
    return {
        "seconds": seconds,
        "cpu": used,
        "peak": peak,
        "own": sampled.largest,
        "before": before,
        "above": peak - before,
    }


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Sampled:
    """The largest RssAnon while open."""

    def __init__(self) -> None:
        self.largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.largest = max(self.largest, resident("RssAnon"))

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def line(row: dict[str, Any], last: dict[str, Any] | None) -> str:
    """A row of the table, with its growth over the row before."""
    measured = ("peak", "own", "above")
    sizes = [f"{row[key] / MEGABYTE:9.1f}" for key in measured]
    growth = [f"{row[key] / last[key] - 1:+7.1%}" for key in measured] if last else []
    seconds = f"{row['seconds']:8.1f} {row['cpu']:7.1f} {row['cpu'] / row['blocks']:8.2f}"
    return " ".join([f"{row['blocks']:6d}", seconds, *sizes, *growth])


def print_slope(rows: Sequence[dict[str, Any]]) -> None:
    """What a further block costs, between the first row and the last."""
    first, last = rows[0], rows[-1]
    if last is first:
        return
    deeper = last["blocks"] - first["blocks"]
    slope = (last["peak"] - first["peak"]) / deeper / MEGABYTE
    seconds = (last["cpu"] - first["cpu"]) / deeper
    block = 2 * (4 * WIDTH**2 + 3 * WIDTH * FEED_FORWARD) / MEGABYTE
    print(
        f"slope: {slope:.2f} MB and {seconds:.2f} CPU s a block; a block is {block:.1f} MB in "
        "bfloat16",
        flush=True,
    )


if __name__ == "__main__":
    main()

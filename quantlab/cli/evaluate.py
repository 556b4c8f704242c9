"""`evaluate`: one model as it is, measured on one text."""

from __future__ import annotations

import typer

from quantlab.cli import options as o
from quantlab.cli.output import check_writable, to_json, write_text
from quantlab.cli.terminal import TerminalProgress, print_results
from quantlab.errors import Cancelled
from quantlab.types import RunSpec

D = o.DEFAULTS


def evaluate(
    model: o.Model = D.model,
    text: o.Text = D.text,
    eval_tokens: o.EvalTokens = D.eval_tokens,
    window: o.Window = D.window,
    device: o.DeviceOption = "auto",
    threads: o.Threads = D.threads,
    seed: o.Seed = D.seed,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
) -> None:
    """Measure one model as it is.

    Also a folder or .gguf file that `quantize` wrote. Exit code 1 if it could not be measured.
    """
    check_writable("--json", json)
    from quantlab import pipeline
    from quantlab.results import document

    spec = RunSpec(
        model=model,
        text=text,
        eval_tokens=eval_tokens,
        window=window,
        device=device,
        threads=threads,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    try:
        with TerminalProgress() as progress:
            environment, record = pipeline.evaluate(spec, progress)
    except KeyboardInterrupt:
        raise Cancelled("cancelled: nothing was written") from None
    print_results([record])
    if json is not None:
        write_text(json, to_json(document(environment, [record])))
    if record.status != "finished":
        raise typer.Exit(1)

"""`compare`: one model, several variants, one table; optionally JSON and HTML."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli import options as o
from quantlab.cli.output import check_writable, to_json, write_text
from quantlab.cli.terminal import TerminalProgress, print_outputs, print_results, print_verdict
from quantlab.errors import Cancelled, ConfigError
from quantlab.stops import check_stop_strings
from quantlab.types import RunSpec

if TYPE_CHECKING:
    from quantlab.results import ResultRecord

D = o.DEFAULTS


def compare(
    model: o.Model = D.model,
    methods: o.Methods = o.DEFAULT_METHODS,
    group_size: o.GroupSize = D.group_size,
    calibration: o.Calibration = D.calibration,
    calibration_tokens: o.CalibrationTokens = D.calibration_tokens,
    calibration_length: o.CalibrationLength = D.calibration_length,
    text: o.Text = D.text,
    eval_tokens: o.EvalTokens = D.eval_tokens,
    window: o.Window = D.window,
    prompt: o.Prompts = [],  # noqa: B006 - typer reads the default and never changes it
    max_new_tokens: o.MaxNewTokens = D.max_new_tokens,
    stop: o.StopStrings = [],  # noqa: B006 - as above
    device: o.DeviceOption = "auto",
    threads: o.Threads = D.threads,
    seed: o.Seed = D.seed,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure everything anew and keep nothing.")
    ] = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
    html: o.Html = None,
) -> None:
    """Quantize a model several ways and compare.

    Prints what each variant loses and gains as a table. Finished variants are kept: the same again
    is immediate, and an interrupted comparison goes on where it stopped. Exit code 1 if no variant
    could be finished.
    """
    check_writable("--json", json)
    check_writable("--html", html)
    if not all(text.strip() for text in prompt):
        raise ConfigError("--prompt: empty; give the text to continue")
    with o.blame("--stop", prefix="stop: "):
        check_stop_strings(stop)
    from quantlab.methods import parse_variants

    with o.blame("--methods", prefix="methods: "):
        variants = parse_variants(methods)
    spec = RunSpec(
        model=model,
        variants=variants,
        group_size=group_size,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        calibration_length=calibration_length,
        text=text,
        eval_tokens=eval_tokens,
        window=window,
        prompts=tuple(prompt),
        max_new_tokens=max_new_tokens,
        device=device,
        threads=threads,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        stop_strings=tuple(stop),
    )
    started = time.time()
    records = run(spec, keep=not no_cache)
    print_results(records)
    print_verdict(records)
    print_outputs(records, spec.prompts)
    if json is not None or html is not None:
        write(spec, records, started, json, html)
    if not any(record.status == "finished" for record in records):
        raise typer.Exit(1)


def run(spec: RunSpec, *, keep: bool) -> list[ResultRecord]:
    """The records of a comparison, with progress on stderr.

    `keep`: use and fill the cache of finished variants, else a store that is thrown away. Raises:
    Cancelled on Ctrl-C, which says what was kept.
    """
    from quantlab import pipeline
    from quantlab.store import Store

    pipeline.validate(spec)
    progress = TerminalProgress()
    with ExitStack() as stack:
        root = None if keep else Path(stack.enter_context(TemporaryDirectory()))
        store = Store(root)
        try:
            with progress:
                return pipeline.compare(spec, store=store, emit=progress)
        except (KeyboardInterrupt, Cancelled):
            count = f"{len(progress.finished)} of {len(spec.variants)} variants finished"
            if not keep:
                raise Cancelled(f"cancelled: {count}; nothing was kept (--no-cache)") from None
            raise Cancelled(
                f"cancelled: {count} and kept in {store.root}; the same command goes on from there"
            ) from None


def write(
    spec: RunSpec, records: list[ResultRecord], started: float, json: Path | None, html: Path | None
) -> None:
    """Write the JSON document and the HTML report where they are wanted. Raises: StorageError."""
    from quantlab import pipeline
    from quantlab.results import document

    environment = pipeline.environment(spec)
    if json is not None:
        write_text(json, to_json(document(environment, records)))
    if html is not None:
        from quantlab.report import to_html
        from quantlab.store import Run

        write_text(
            html,
            to_html(
                Run(
                    id="command line",
                    kind="compare",
                    spec=spec,
                    status="finished",
                    error=None,
                    created=started,
                    started=started,
                    ended=time.time(),
                    environment=environment,
                    records=tuple(records),
                    parent=None,
                )
            ),
        )

"""What a run looks like in a terminal: progress on stderr, the table of results on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from quantlab.types import Event, Notice, Progress, VariantFinished, VariantStarted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from quantlab.results import ResultRecord


UNBOUNDED = 10_000
HEADINGS = {
    "bits": "bits/weight",
    "size": "MB",
    "kl": "KL (nats)",
    "top1": "top-1",
    "decode": "decode tok/s",
    "prefill": "prefill tok/s",
    "ttft": "first token",
    "quantized": "quantized in",
    "memory": "memory MB",
}
"""Short headings for the columns of `quantlab.plots.table`; the page has longer ones."""


class TerminalProgress:
    """An `Emit` that shows a run: a live bar in a terminal, else one line for each new stage.

    Counts what it saw: `finished` is the labels of the variants that finished.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.finished: list[str] = []
        self._stage = ("", "")
        self._bar: Any = None  # rich.progress.Progress, imported only where there is a terminal
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("· left"),
                TimeRemainingColumn(),
                console=Console(file=self.stream, markup=False, highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("preparing", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away, so that a stream of text has the terminal to itself."""
        if self._bar is not None and self._task is not None:
            self._bar.stop()
            self._task = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._advance(event)
        elif isinstance(event, VariantStarted):
            self._stage = (event.variant, "")
        elif isinstance(event, VariantFinished):
            status = event.record.get("status", "finished")
            if status == "finished":
                self.finished.append(event.variant)
            cached = " (from the cache)" if event.record.get("cached") else ""
            self._say(f"{event.variant} {status}{cached}{_because(event.record)}")
        elif isinstance(event, Notice):
            self._say(event.message)

    def _advance(self, event: Progress) -> None:
        head = f"{event.variant} · {event.stage}" if event.variant else event.stage
        if self._bar is not None:
            count = f" {event.done}/{event.total}" if event.total > 1 else ""
            if self._task is not None:
                self._bar.update(self._task, description=head + count, completed=event.fraction)
        elif (event.variant, event.stage) != self._stage:
            self._stage = (event.variant, event.stage)
            self._say(f"[{event.fraction:4.0%}] {head}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, file=self.stream, flush=True)


def _because(record: dict[str, Any]) -> str:
    """`: reason (hint)` of a record that did not finish."""
    reason, hint = record.get("error"), record.get("hint")
    if not reason:
        return ""
    return f": {_one_line(reason)}" + (f" ({_one_line(hint)})" if hint else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout, as wide as it needs: a narrow window breaks lines, but loses no digit.

    The first `left` columns are flush left, the others right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, title in enumerate(header):
        table.add_column(title, justify="left" if position < left else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=UNBOUNDED, markup=False, highlight=False, emoji=False)
    console.print(table, crop=False, soft_wrap=True)


def print_results(records: Sequence[ResultRecord]) -> None:
    """The table of a comparison (the page's columns), and why rows did not finish."""
    from quantlab.plots import table

    header = ["variant", *(HEADINGS.get(column.key, column.key) for column in table.COLUMNS), "how"]
    rows = [
        [
            record.variant,
            *(f"{cell.text} {cell.plus_minus}".strip() for cell in table.cells(record, {})),
            ", ".join(table.badges(record)),
        ]
        for record in records
    ]
    print_rows(header, rows)
    for record in records:
        if record.status != "finished":
            print(f"{record.variant} {record.status}{_because(record.to_json())}")
        for fallback in record.fallbacks:
            print(f"{record.variant} fallback: {_one_line(fallback)}")


def print_verdict(records: Sequence[ResultRecord]) -> None:
    """What the intervals allow to be said, one sentence a line; then of every pair."""
    from quantlab.plots import pairs, verdict
    from quantlab.plots.words import words

    for sentence in verdict.sentences(records):
        print(sentence)
    said = pairs.sentences(records)
    if said:
        print(f"\n{words()('pairs')}:")
    for sentence in said:
        print(f"  {sentence}")


def print_outputs(records: Sequence[ResultRecord], prompts: Sequence[str]) -> None:
    """Every prompt with the answers of all variants below one another."""
    for index, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for record in records:
            if index < len(record.outputs):
                answer = record.outputs[index]
                left = answer.first_divergence
                note = "" if left is None else f" (leaves the original at token {left + 1})"
                print(f"[{record.variant}]{note} {_one_line(answer.text)}")

"""`generate`: answers of one model, as they are generated."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantlab.cli import options as o
from quantlab.cli.terminal import TerminalProgress
from quantlab.errors import Cancelled, ConfigError
from quantlab.stops import check_stop_strings
from quantlab.types import Event, OutputDelta, RunSpec

D = o.DEFAULTS


def generate(
    prompt: o.Prompts,
    model: o.Model = D.model,
    max_new_tokens: o.MaxNewTokens = D.max_new_tokens,
    stop: o.StopStrings = [],  # noqa: B006 - typer reads the default and never changes it
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", min=0.0, max=1.0, help="Sample from this share of the probability."
        ),
    ] = 1.0,
    device: o.DeviceOption = "auto",
    threads: o.Threads = D.threads,
    seed: o.Seed = D.seed,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Continue one or more prompts, streaming the text to stdout."""
    if not all(text.strip() for text in prompt):
        raise ConfigError("--prompt: empty; give the text to continue")
    with o.blame("--stop", prefix="stop: "):
        check_stop_strings(stop)
    from quantlab import pipeline

    spec = RunSpec(
        model=model,
        prompts=tuple(prompt),
        max_new_tokens=max_new_tokens,
        device=device,
        threads=threads,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        stop_strings=tuple(stop),
    )
    printer = _Printer(prompt)
    try:
        with TerminalProgress() as progress:

            def emit(event: Event) -> None:
                if isinstance(event, OutputDelta):
                    progress.stop()
                    printer.add(event)
                else:
                    progress(event)

            answers = pipeline.generate(spec, temperature=temperature, top_p=top_p, emit=emit)
    except KeyboardInterrupt:
        print(flush=True)
        raise Cancelled("cancelled: the answer ends here") from None
    for index, answer in enumerate(answers):
        printer.finish(index, answer.text)


class _Printer:
    """Prints answers in the order of the prompts, each piece as soon as its turn has come."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.current = -1
        self.texts = [""] * len(prompts)

    def add(self, event: OutputDelta) -> None:
        self.texts[event.prompt] += event.text
        if event.prompt == self.current + 1:
            self._begin(event.prompt)
        if event.prompt == self.current:
            self._write(event.text)

    def finish(self, index: int, text: str) -> None:
        """Print whatever of the answer `index` was not streamed, and end its line."""
        if index > self.current:
            self._begin(index)
            self._write(text)
        elif index == self.current:
            self._write(text.removeprefix(self.texts[index]) if self.texts[index] else text)
        if index == len(self.prompts) - 1:
            print(flush=True)

    def _begin(self, index: int) -> None:
        if index > 0:
            print("\n")
        if len(self.prompts) > 1:
            print(f"> {self.prompts[index]}")
        self.current = index

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

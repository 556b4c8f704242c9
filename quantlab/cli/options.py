"""The options that several commands share: name, type, range and help, each in one place.

Defaults come from `RunSpec`, so that the command line and the page start from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from quantlab.errors import ConfigError
from quantlab.types import RunSpec

DEFAULTS = RunSpec()
DEFAULT_METHODS = "bf16,rtn:4,smoothquant:8,gptq:4,awq:4,gguf:q4_k_m"

Device = Literal["auto", "cpu", "cuda"]

Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="NAME", help="bundled, a Hub id, a local folder or a .gguf file."
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="LIST",
        help="Variants, separated by commas: METHOD, METHOD:BITS or gguf:TYPE, each with options "
        "as gptq:4:group_size=128:act_order=true; checkpoint:DIR is what others quantized. "
        "`methods` lists them.",
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(
        "--group-size",
        metavar="N",
        min=1,
        help="Weights that share a scale, where a method has groups.",
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="FILE|NAME",
        help="Calibration text: project, self, wikitext2, c4 or a text file.",
    ),
]
CalibrationTokens = Annotated[
    int,
    typer.Option("--calibration-tokens", metavar="N", min=1, help="Tokens of calibration text."),
]
CalibrationLength = Annotated[
    int,
    typer.Option(
        "--calibration-length", metavar="N", min=1, help="Tokens in one calibration sequence."
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--text",
        metavar="FILE|NAME",
        help="Evaluation text: project, wikitext2, c4 or a text file.",
    ),
]
EvalTokens = Annotated[
    int, typer.Option("--eval-tokens", metavar="N", min=1, help="Tokens of evaluation text.")
]
Window = Annotated[
    int,
    typer.Option(
        "--window", metavar="N", min=2, help="Tokens in one evaluation window, without overlap."
    ),
]
Prompts = Annotated[
    list[str],
    typer.Option("--prompt", metavar="TEXT...", help="A prompt to answer; several may be given."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Tokens of an answer, at most.")
]
StopStrings = Annotated[
    list[str],
    typer.Option(
        "--stop", metavar="TEXT...", help="End an answer before this text; several may be given."
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run.")]
Threads = Annotated[
    int,
    typer.Option(
        "--threads", metavar="N", min=0, help="CPU threads; 0 is one for each physical core."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of everything that is random."
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pickle checkpoints: they can run any code."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with a model."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="OUT.json", help="Write the results as JSON.")
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="OUT.html", help="Write a self-contained HTML report."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def blame(option: str, prefix: str = "") -> Iterator[None]:
    """Let a ConfigError begin with the `option` that was wrong, in place of `prefix`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{option}: {str(error).removeprefix(prefix)}", error.hint) from None

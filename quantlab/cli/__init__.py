"""The command line: `python -m quantlab COMMAND …`, one command a file of this folder.

Wrong input is one line on stderr that names the argument and what would be right, exit code 2, and
nothing written. A variant that fails is a row of the table, not an error. Exit codes: 0 finished,
1 nothing could be finished, 2 wrong input, 130 cancelled with Ctrl-C.

Nothing heavy is imported before a command needs it: `--help` answers without loading torch.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from quantlab.cli.bench import bench
from quantlab.cli.compare import compare
from quantlab.cli.evaluate import evaluate
from quantlab.cli.generate import generate
from quantlab.cli.listing import methods, models
from quantlab.cli.quantize import quantize
from quantlab.errors import Cancelled, QuantLabError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: the README quotes it, and it needs no import of rich
    pretty_exceptions_enable=False,
    help="What do I lose, and what do I gain, when I quantize this model this way on this machine?",
)
COMMANDS = {
    function.__name__: function
    for function in (models, methods, compare, quantize, evaluate, generate, bench)
}
for _name, _function in COMMANDS.items():
    app.command(_name)(_function)

SEVERAL = ("--prompt", "--set", "--stop")
"""Options that take one value or several: `--prompt A B` is `--prompt A --prompt B`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name) and return its exit code."""
    _quiet_libraries()
    arguments = spread(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="python -m quantlab", standalone_mode=False)
    except TyperException as error:
        return _refuse(_usage(error.format_message()))
    except Cancelled as error:
        _refuse(str(error), error.hint)
        return 130
    except QuantLabError as error:
        return _refuse(str(error), error.hint)
    except MemoryError:
        _refuse(
            "not enough memory", "try a smaller model, fewer tokens or --methods with fewer rows"
        )
        return 1
    return code if isinstance(code, int) else 0


def spread(arguments: Sequence[str]) -> list[str]:
    """Repeat the options of `SEVERAL` before each of their values."""
    result: list[str] = []
    current = ""
    taken = 0
    for argument in arguments:
        if argument in SEVERAL:
            current, taken = argument, 0
        elif current and argument.startswith("-") and taken:
            current = ""
        elif current:
            taken += 1
            if taken > 1:
                result.append(current)
        result.append(argument)
    return result


def _usage(message: str) -> str:
    """Typer's words, which name the argument, with what would be right where they lack it."""
    invalid = re.fullmatch(
        r"Invalid value for '([^']+)': (?:Value error, )?(.+)", message, re.DOTALL
    )
    if invalid:
        return f"{invalid[1]}: {invalid[2][0].lower()}{invalid[2][1:]}"
    message = message.rstrip(".")
    if message.startswith(("Missing command", "No such command")):
        return f"{message}: choose one of {', '.join(COMMANDS)} (--help explains them)"
    if message.startswith("Got unexpected extra"):
        return f"{message}: every value needs its option, and text with spaces needs quotes"
    return f"{message} (COMMAND --help lists the options)"


def _refuse(message: str, hint: str | None = None) -> int:
    """One line on stderr; returns the exit code of wrong input."""
    line = " ".join(f"{message} ({hint})".split() if hint else message.split())
    print(f"error: {line}", file=sys.stderr)
    return 2


def _quiet_libraries() -> None:
    """Keep other packages' notes and bars off the terminal, unless the person asked for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

"""Writes the generated parts of README.md: `python -m quantlab.cli.docs README.md` (`make docs`).

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. A test compares the README with
what this module would write, so the documentation cannot drift from the program.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from quantlab.cli.formats_table import format_table


def method_table() -> str:
    """Every registered method as a row of a Markdown table."""
    from quantlab.methods import METHODS, Quantizer

    lines = [
        "| `--methods` | method | bits | calibration | what it does | source |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS.values():
        bits = ", ".join(map(str, sorted(method.bits))) or "–"
        asked = type(method).needs_for is not Quantizer.needs_for
        needs = "yes" if method.needs else "if asked" if asked else "no"
        summary = method.summary.replace("|", "\\|")
        cells = (f"`{method.name}`", method.title, bits, needs, summary, method.paper or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def option_list() -> str:
    """The options of every method, as `methods` prints them."""
    from quantlab.cli.listing import option_lines, shared_lines
    from quantlab.methods import METHODS

    parts = []
    for method in METHODS.values():
        lines = [f"    {line}" for line in option_lines(method)]
        if lines:
            parts.append("\n".join([method.name, *lines]))
    parts += shared_lines()
    return "```text\n" + "\n".join(parts) + "\n```"


def command_help() -> str:
    """The help of the program and of each command, as a terminal shows it."""
    from quantlab.cli import COMMANDS

    pages = [_help([])]
    pages += [_help([name]) for name in COMMANDS]
    return "\n\n".join(f"```text\n{page}\n```" for page in pages)


def _help(arguments: list[str]) -> str:
    from quantlab.cli import main

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # the same text in every window
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            main([*arguments, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


PARTS: dict[str, Callable[[], str]] = {
    "methods": method_table,
    "formats": format_table,
    "options": option_list,
    "commands": command_help,
}


def render(readme: str) -> str:
    """The README with every generated part as it should be. Raises: ValueError without a mark."""
    for name, write in PARTS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"no marks {begin.strip()} and {end}")
        readme = f"{before}{begin}{write()}\n{end}{after}"
    return readme


if __name__ == "__main__":
    target = Path(sys.argv[1])
    current = target.read_text(encoding="utf-8")
    wanted = render(current)
    if wanted != current:
        target.write_text(wanted, encoding="utf-8")
        print(f"{target} updated")

"""Processes of their own that read a model for the page, one at a time each, with progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantlab.errors import QuantLabError
from quantlab.plots.templates import render
from quantlab.ui.client import Client

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.4


@dataclass
class Capture:
    """A process that reads `model`, and what it has told so far; `label` begins its messages."""

    label: str
    model: str
    arguments: tuple[str, ...]
    process: subprocess.Popen[str]
    stage: str = "starting"
    done: int = 0
    total: int = 1
    path: str = ""
    error: str = ""
    hint: str | None = None
    cancelled: bool = False

    def read(self) -> None:
        """Follow the process to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                continue
            for name in ("stage", "done", "total", "path", "error", "hint"):
                if name in told:
                    setattr(self, name, told[name])
        code = self.process.wait()
        if not self.path and not self.error and not self.cancelled:
            self.error = f"{self.label}: the process ended without an answer (code {code})"

    def cancel(self) -> None:
        """End it; nothing half done is left."""
        self.cancelled = True
        self.process.kill()

    @property
    def over(self) -> bool:
        return bool(self.path or self.error or self.cancelled)


class Captures:
    """One process at a time of `python -m MODULE` for this page."""

    def __init__(self, module: str) -> None:
        self._module, self._label = module, module.split(".")[1]
        self._lock = threading.Lock()
        self.current: Capture | None = None

    def start(self, model: str, arguments: Sequence[str] = ()) -> Capture:
        """Read `model`; the same process again while it is being worked on.

        Raises: QuantLabError while another one is."""
        with self._lock:
            now = self.current
            if now is not None and not now.over:
                if (now.model, now.arguments) == (model, tuple(arguments)):
                    return now
                label = self._label
                raise QuantLabError(f"{label}: {now.model} is being read; cancel it or wait")
            command = [sys.executable, "-m", self._module, f"--parent={os.getpid()}", *arguments]
            process = subprocess.Popen(
                [*command, "--", model],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self.current = Capture(self._label, model, tuple(arguments), process)
            threading.Thread(target=self.current.read, name="capture", daemon=True).start()
            return self.current


@cache
def captures(module: str) -> Captures:
    """The one `Captures` of this process for a module."""
    return Captures(module)


COUNTED = {"capture": "block_of", "survey": "block_of", "causal": "linear_of"}
"""Stages whose number of steps is worth saying, and the text that says it."""


def progress_html(client: Client, capture: Capture) -> str:
    """The stage, and how much of it is done."""
    say = client.say
    key = f"stage_{capture.stage}"
    line = say(key) if say.has(key) else say("stage_starting")
    if capture.stage in COUNTED:
        line += " · " + say(COUNTED[capture.stage], done=capture.done, total=capture.total)
    share = round(100 * capture.done / max(capture.total, 1))
    return render("lesson_capture.html", client.language, line=line, percent=share)

"""A peer at work, seen from outside: started, listened to, surely ended.

It runs in a session of its own, so that one signal ends it and whatever it started; it ends itself
(see `workers/run.py`) when the process that asked for it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quantlab.errors import MethodError
from quantlab.peers.environments import WORKERS, Peer

RUN = WORKERS / "run.py"
POLL_SECONDS = 0.2
END_SECONDS = 5.0
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Of this process's environment: a peer that found the checkout would take the folder `kernels` for
a package of another name."""
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a peer says of its work. Seconds of quantizing alone, of loading and of saving;
    `original_loss` as `workers/run.py` has it; `patch`: what had to be changed in the peer to make
    it work at all; `blocks`: (done, of) where it was told to do only the first few."""

    peer: str
    version: str
    settings: str
    seconds: float
    load_seconds: float
    save_seconds: float
    original_loss: float
    peak_rss_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    patch: str | None = None
    blocks: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """What a record keeps: who, in which version and how."""
        kept = ("peer", "version", "patch", "settings", "load_seconds", "save_seconds", "versions")
        return {name: getattr(self, name) for name in kept}


def run(
    peer: Peer,
    model: Path,
    ids: Sequence[Sequence[int]],
    out: Path,
    options: Mapping[str, Any],
    threads: int,
    step: Step,
    *,
    blocks: int = 0,
) -> Report:
    """Let `peer` quantize the folder `model` on the pieces of tokens `ids`, into `out`/checkpoint.

    `options` are the method's, by name; `step` is called with (stage, done, total); `blocks` limits
    the work to the first few, 0 is all. Whatever happens, nothing of the peer runs afterwards.
    Raises: MethodError with the peer's own reason.
    """
    reason = peer.absence()
    if reason is not None:
        raise MethodError(reason, peer.install)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tokens = out / "ids.json"
    tokens.write_text(json.dumps([list(piece) for piece in ids]), encoding="utf-8")
    command = [
        *(str(peer.python), "-P", str(RUN), str(peer.worker)),
        *("--model", str(model.resolve()), "--ids", str(tokens), "--out", str(out)),
        *("--options", json.dumps(dict(options)), "--threads", str(threads)),
        *("--blocks", str(blocks), "--parent", str(os.getpid())),
    ]
    inherited = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=out,
            env={**inherited, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            for event in _events(process):
                if "stage" in event:
                    step(str(event["stage"]), int(event["done"]), int(event["total"]))
                else:
                    last = event
        finally:
            _end(process)
        return _report(peer, last, process.returncode, log)


def _events(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON lines of the process until it ends; a child that outlives it, and still holds its
    standard output, is not waited for."""
    assert process.stdout is not None
    unread = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            piece = b""
            if selector.select(0 if ended else POLL_SECONDS):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    process.wait()
                    return
            elif ended:
                return
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        yield event


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    assert process.stdout is not None
    process.stdout.close()


def _report(peer: Peer, last: Mapping[str, Any], code: int | None, log: IO[bytes]) -> Report:
    """Raises: MethodError unless the last thing it said was that all went well."""
    if "report" in last and code == 0:
        facts = dict(last["report"])
        if facts.get("blocks") is not None:
            facts["blocks"] = tuple(facts["blocks"])
        try:
            return Report(**facts)
        except TypeError as error:
            raise MethodError(f"{peer.title} left no report that can be read ({error})") from None
    if "error" in last:
        hint = peer.install if last.get("missing") else None
        raise MethodError(f"{peer.title} failed: {last['error']}", hint)
    if code == -signal.SIGKILL:
        raise MethodError(
            f"{peer.title} was killed (signal 9), most likely out of memory",
            "close other programs, or choose a smaller model or fewer calibration tokens",
        )
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    words = f": {lines[-1].strip()[:200]}" if lines else ""
    raise MethodError(f"{peer.title} ended with {how}{words}")

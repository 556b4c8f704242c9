"""What watching a run costs: `python -m benchmarks.page_cost [--json OUT.json]`.

A comparison is told again from its precomputed records in half a minute (`benchmarks.replay`), so
that nothing but the page works. With the page open in Chromium, CPU seconds of the server and of
all of Chromium's processes (from /proc) for each minute of the run, and for each minute after it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.first_paint import ARGUMENTS, chromium, page

LAUNCH = """
import functools
from quantlab.ui import services
services.JobQueue = functools.partial(services.JobQueue, pipeline="benchmarks.replay")
import app
from quantlab.ui.server import launch
launch(app.demo)
"""
TICK = os.sysconf("SC_CLK_TCK")
REST = 20.0
"""Seconds watched after the run, when nothing changes."""


def cpu(process: int) -> float:
    """CPU seconds that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def family(process: int) -> list[int]:
    """The process and all that it has started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def browsers() -> list[int]:
    """Chromium's processes, among those that this one has started."""
    names = {one: Path(f"/proc/{one}/cmdline").read_bytes() for one in family(os.getpid())[1:]}
    return [one for one, name in names.items() if b"--headless" in name or b"--type=" in name]


def used(server: int) -> dict[str, float]:
    return {"server": cpu(server), "browser": sum(cpu(one) for one in browsers())}


def a_minute(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    return {name: 60 * (after[name] - before[name]) / seconds for name in before}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    told: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as home,
        page(Path(home), ("-c", LAUNCH)) as (url, _, server),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1440, "height": 1000}, locale="en-US")
        received: list[int] = []
        tab.on("requestfinished", lambda one: received.append(one.sizes()["responseBodySize"]))
        tab.goto(url)
        tab.wait_for_selector("#estimate .ql-estimate")
        tab.wait_for_timeout(4000)
        received.clear()
        begun, before = time.perf_counter(), used(server)
        tab.click("#run")
        tab.wait_for_selector("#progress .ql-progress-running", timeout=60_000)
        tab.wait_for_selector("#progress .ql-progress-finished", timeout=120_000)
        ended, after = time.perf_counter(), used(server)
        told["running"] = a_minute(before, after, ended - begun)
        told["seconds"] = ended - begun
        told["requests"], told["bytes"] = len(received), sum(received)
        tab.wait_for_timeout(3000)
        begun, before = time.perf_counter(), used(server)
        tab.wait_for_timeout(1000 * REST)
        told["resting"] = a_minute(before, used(server), time.perf_counter() - begun)
        browser.close()
    for state in ("running", "resting"):
        shares = ", ".join(f"{name} {value:.1f}" for name, value in told[state].items())
        print(f"{state}: CPU seconds a minute: {shares}")
    print("the run: {seconds:.0f} s, {requests} answers, {bytes:,} bytes".format(**told))
    if given.json:
        given.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

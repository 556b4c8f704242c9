"""How soon the page shows something: `python -m benchmarks.first_paint [--json OUT.json]`.

Starts the page on an empty home, and with a fresh Chromium that has nothing cached opens it:
milliseconds from the start of the navigation to the page's own header, to the table with results
(the precomputed ones) and to all of its figures, each once it was painted. The aim is 3 seconds to
the table. With `--home FOLDER` the page runs on that folder, for example one with a history.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
AIM = 3000.0
SIGNS = {
    "header": "#header .ql-header h1",
    "form": "#run",
    "table": '#results-table tbody[data-state="finished"]',
    "verdict": "#verdict .ql-verdict p",
    "figures": "#figure-size .js-plotly-plot .main-svg",
}
"""What is waited for, by CSS selector."""

WATCH = """(signs) => {
  window.seen = {};
  const look = () => {
    for (const [name, selector] of Object.entries(signs)) {
      if (name in window.seen) continue;
      if (!document.querySelector(selector)?.getClientRects().length) continue;
      window.seen[name] = null;  // Two frames on, it has been painted.
      const done = () => (window.seen[name] = performance.now());
      requestAnimationFrame(() => requestAnimationFrame(done));
    }
    if (Object.keys(window.seen).length < Object.keys(signs).length) requestAnimationFrame(look);
  };
  look();
}"""


def chromium() -> str:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    return path


@contextlib.contextmanager
def page(home: Path, program: tuple[str, ...] = ("app.py",)) -> Iterator[tuple[str, float, int]]:
    """The page on a free port: its address, seconds until it answered, its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}/"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *program, "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"QUANTLAB_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}gradio_api/startup-events", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the page did not start") from None
                time.sleep(0.05)
        yield url, time.perf_counter() - began, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def opened(browser: Browser, url: str, width: int = 1440) -> dict[str, Any]:
    """Milliseconds from navigation to every sign, in a profile that has nothing cached."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, locale="en-US")
    tab = context.new_page()
    sizes: list[int] = []
    tab.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    tab.add_init_script(f"({WATCH})({json.dumps(SIGNS)})")
    tab.goto(url)
    tab.wait_for_function(
        "n => Object.values(window.seen).filter(Boolean).length === n",
        arg=len(SIGNS),
        timeout=120_000,
    )
    times: dict[str, Any] = tab.evaluate("window.seen")
    times["load event"] = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    times["elements"] = tab.evaluate("document.querySelectorAll('*').length")
    context.close()
    return times | {"requests": len(sizes), "bytes": sum(sizes)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--home", type=Path, help="default: an empty one")
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as empty,
        page(given.home or Path(empty)) as (url, up, _),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        runs = [opened(browser, url) for _ in range(given.times)]
        browser.close()
    print(f"the server answered {up:.1f} s after its start")
    print(f"{'':12} {'median':>8} {'first':>8} {'worst':>8}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:12} {statistics.median(values):8.0f} {values[0]:8.0f} {max(values):8.0f}")
    worst = max(run["table"] for run in runs)
    print(f"slowest first paint with results: {worst:.0f} ms (aim: {AIM:.0f} ms)")
    if given.json:
        given.json.write_text(
            json.dumps({"up_seconds": up, "runs": runs}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()

"""The real app as a process of its own, a real Chromium, and a model that is small but real."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Locator, Page, expect, sync_playwright

from tests.tiny import saved

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
]
OPENED: list[Tab] = []
"""Every tab that a test of this process has opened."""
PATIENCE = 90_000
"""Milliseconds to wait for the page: another test may hold the other core."""

expect.set_options(timeout=PATIENCE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser test may be tried once more: three processes share two cores, and a step that is
    faster than any person can meet a page half drawn. The summary shows each that was with its
    traceback, and each is a question to answer: what a person could meet is a defect."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Where a step failed, the report tells what was in view: of a run on another machine, there
    is nothing else to look at."""
    report = yield
    if report.failed and report.when == "call":
        report.sections += [("a page then open", tab.told()) for tab in OPENED if tab.is_open()]
    return report


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class App:
    """A running app: its address, its home folder, its process and what it wrote."""

    url: str
    home: Path
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_app(home: Path, log: Path) -> App:
    """Start app.py on a free port and wait until it serves the page."""
    port = free_port()
    # Without native kernels the tiny model is slow enough for a person, and a test, to see it run.
    environment = os.environ | {
        "QUANTLAB_NATIVE": "off",
        "QUANTLAB_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    app = App(f"http://127.0.0.1:{port}/", home, process, log)
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(app.url, timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return app
    app.stop()
    raise AssertionError(f"the app did not start:\n{log.read_text(errors='replace')}")


def on_an_empty_home(folder: Path) -> Iterator[App]:
    """For fixtures: an app that runs while it is used and ends without an error in its log."""
    running = start_app(folder / "home", folder / "app.log")
    yield running
    running.stop()
    errors = running.log.read_text(errors="replace")
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """One app for all browser tests of a process, with a home of its own."""
    yield from on_an_empty_home(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An app that no other file's tests have used: it shows the precomputed comparison."""
    yield from on_an_empty_home(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with a real tokenizer, in a local folder."""
    return saved(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The system's Chromium; without one the tests fail, since nothing else looks at the page."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A browser tab on the page, with the gestures that the tests share."""

    def __init__(self, page: Page, app: App) -> None:
        self.page = page
        self.app = app
        self.problems: list[str] = []
        self.diary: list[str] = []
        """What the browser did by itself, for `told`."""
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._local(request.url))
        page.on("crash", lambda _: self._note("crashed"))
        page.on("load", lambda _: self._note("loaded"))
        page.on("console", lambda said: self._note(f"{said.type}: {said.text}"))
        page.on("requestfailed", lambda one: self._note(f"failed: {one.url}: {one.failure}"))
        OPENED.append(self)

    def _note(self, what: str) -> None:
        self.diary.append(f"{time.strftime('%X')} {what[:300]}")

    def is_open(self) -> bool:
        return not self.page.is_closed()

    def told(self) -> str:
        """What is in view, and what the browser noted last: for the report of a failed test."""
        try:
            chosen = self.page.locator('[role="tab"][aria-selected="true"]').all_inner_texts()
            shown = " ".join(self.page.evaluate("document.body.innerText").split())
        except Error as error:
            chosen, shown = [], str(error)
        lines = [self.page.url, f"chosen tabs: {chosen}", *self.diary[-40:], shown[:3000]]
        return "\n".join([*lines, *(f"problem: {one}" for one in self.problems)])

    def _local(self, url: str) -> None:
        if not url.startswith((self.app.url, "data:", "blob:")):
            self.problems.append(f"asked for {url}")

    def open(self, query: str = "") -> Tab:
        """Load the page and wait until the server has told it what to show."""
        self.page.goto(self.app.url + query)
        expect(self.page.locator("#estimate .ql-estimate")).to_be_visible()
        expect(self.page.locator("#header .ql-header")).to_be_visible()
        return self

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def show(self, name: str) -> None:
        """Choose a tab by its title."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    def section(self, elem_id: str) -> None:
        """Open an accordion of the form."""
        button = self.find(f"#{elem_id} > button, #{elem_id} button.label-wrap").first
        if "open" not in (button.get_attribute("class") or ""):
            button.click()

    def type(self, field: Locator, text: str) -> None:
        """Fill a field faster than a person could: while what holds it is being opened, Gradio may
        still paint it anew, so fill it until it keeps the text."""
        for _ in range(20):
            field.fill(text)
            self.page.wait_for_timeout(300)
            if field.input_value() == text:
                return
        expect(field).to_have_value(text)

    def cut_titles(self) -> list[str]:
        """Titles of figures in view that reach beyond their figure."""
        cut: list[str] = self.page.evaluate(
            """() => [...document.querySelectorAll(".gtitle, .gtitle-subtitle")].filter((one) => {
                const box = one.getBoundingClientRect();
                const around = one.closest(".js-plotly-plot").getBoundingClientRect();
                return box.width && (box.right > around.right + 1 || box.top < around.top - 1);
            }).map((one) => one.textContent)"""
        )
        return cut

    def number(self, elem_id: str, value: object) -> None:
        field = self.find(f"#{elem_id} input")
        field.fill(str(value))
        field.blur()

    def choose_model(self, name: str | Path) -> None:
        field = self.find("#model input")
        field.fill(str(name))
        field.press("Enter")
        field.blur()

    def only_variants(self, *keep: str) -> None:
        """Remove every chip but those with these names."""
        chips = self.find(".ql-chip")
        expect(chips.first).to_be_visible()
        for label in chips.locator(".ql-chip-name").all_inner_texts():
            name = label.rstrip("*").strip()
            if name not in keep:
                self.page.get_by_role("button", name=f"Remove {name}", exact=True).click()
                expect(chips.filter(has_text=name)).to_have_count(0)

    def small(self, model: Path, *, prompts: int = 1, seed: int = 0) -> None:
        """Settings of a comparison that takes seconds; with many prompts, one that lasts long
        enough to be interrupted."""
        tokens = 256
        self.choose_model(model)
        self.section("texts-section")
        for field, value in (
            ("calibration-tokens", tokens),
            ("calibration-length", 32),
            ("eval-tokens", tokens),
            ("window", 64),
        ):
            self.number(field, value)
        self.section("prompts-section")
        self.find("#prompts textarea").fill(
            "\n".join(f"River {index} is" for index in range(prompts))
        )
        self.number("max-new-tokens", 6 if prompts == 1 else 60)
        self.section("advanced-section")
        self.number("group-size", 32)
        self.number("threads", 1)
        self.number("seed", seed)

    def run(self) -> str:
        """Start the comparison and wait until it is in view; its run id."""
        before = self.page.url
        self.press_run()
        self.page.wait_for_url(lambda url: url != before and "run=" in url)
        return self.run_id()

    def press_run(self) -> None:
        """Press Run where no new run is to come into view; again where the page moved it away
        from under the pointer, as a person would who sees nothing happen."""
        self.page.evaluate(
            """() => {
                window.pressed = false;
                const run = document.getElementById("run");
                run.addEventListener("click", () => (window.pressed = true), { once: true });
            }"""
        )
        for _ in range(10):
            self.find("#run").click()
            self.page.wait_for_timeout(300)
            if self.page.evaluate("window.pressed"):
                return
        raise AssertionError("Run cannot be pressed")

    def remember_progress(self) -> None:
        """Keep every progress line that appears from now on, however briefly."""
        self.page.evaluate(
            """() => {
                window.seen = new Set();
                new MutationObserver(() => {
                    const line = document.querySelector("#progress .ql-progress-line");
                    if (line) window.seen.add(line.textContent.trim());
                }).observe(document.getElementById("progress"),
                    { childList: true, characterData: true, subtree: true });
            }"""
        )

    def remembered_progress(self) -> list[str]:
        seen: list[str] = self.page.evaluate("[...window.seen]")
        return seen

    def status(self, text: str) -> None:
        """Wait until the progress line says this."""
        expect(self.find("#progress .ql-progress-line")).to_contain_text(text)

    def run_id(self) -> str:
        """The run in view, from the address."""
        self.page.wait_for_url("**/?*run=*")
        return self.page.url.split("run=")[1].split("&")[0]


@pytest.fixture
def tab(chromium: Browser, app: App) -> Iterator[Tab]:
    """A fresh browser profile on the app; afterwards nothing went wrong and nothing was fetched
    from elsewhere, and no run is left behind."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 1000},
        locale="en-US",
        reduced_motion="reduce",
        accept_downloads=True,
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = Tab(context.new_page(), app)
    yield opened
    problems = opened.problems
    context.close()
    assert problems == []

"""A browser tab on the page, and the gestures that tests share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import pytest
from playwright.sync_api import Browser, Error, Locator, Page, expect

from tests.browser.app import App

PATIENCE = 90_000
"""Milliseconds to wait for the page: another test may hold the other core."""

expect.set_options(timeout=PATIENCE)

FAILED = pytest.StashKey[bool]()
OPENED: list[Tab] = []
"""Every tab that a test of this process has opened."""


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
        page.on("requestfailed", lambda one: self._failed(one.url, str(one.failure)))
        OPENED.append(self)

    def _note(self, what: str) -> None:
        self.diary.append(f"{time.strftime('%X')} {what[:300]}")

    def _failed(self, url: str, failure: str) -> None:
        if "/queue/data" not in url:  # Gradio ends each stream of answers by leaving it.
            self._note(f"failed: {url}: {failure}")

    def is_open(self) -> bool:
        return not self.page.is_closed()

    def told(self) -> str:
        """What is in view, and what the browser noted last: for the report of a failed test."""
        try:
            chosen = self.page.locator('[role="tab"][aria-selected="true"]').all_inner_texts()
            shown = " ".join(self.page.evaluate("document.body.innerText").split())
        except Error as error:
            chosen, shown = [], str(error)
        lines = [
            self.page.url,
            f"chosen tabs: {chosen}",
            *self.diary[-40:],
            shown[:3000],
            shown[3000:][-1500:],
        ]
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


T = TypeVar("T", bound=Tab)


class Kept(Generic[T]):
    """One browser tab for the tests of a file, since to open a page takes seconds. A test that
    fails does not hand its page on: neither to the next test nor to its own second attempt."""

    def __init__(self, chromium: Browser, app: App, kind: type[T], name: str) -> None:
        self._chromium, self._app, self._kind, self._name = chromium, app, kind, name
        self._tab: T | None = None

    def lend(self, request: pytest.FixtureRequest) -> Iterator[T]:
        """For a fixture of one test: the page, on the tab of this name."""
        if self._tab is None:
            context = self._chromium.new_context(
                viewport={"width": 1440, "height": 1000}, locale="en-US", reduced_motion="reduce"
            )
            self._tab = self._kind(context.new_page(), self._app)
            self._tab.open()
            self._tab.show(self._name)
        tab = self._tab
        yield tab
        if request.node.stash.get(FAILED, True):
            self.close()
        assert tab.problems == []

    def close(self) -> None:
        if self._tab is not None:
            self._tab.page.context.close()
            self._tab = None

"""The real app, a real Chromium, and a model that is small but real."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.app import App, start_app
from tests.browser.tab import FAILED, OPENED, Tab
from tests.tiny import saved

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
]


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
    if report.when == "call":
        item.stash[FAILED] = report.failed
        # Of what is tried again, the summary shows the traceback alone: this is part of it.
        tell = getattr(report.longrepr, "addsection", None)
        for tab in OPENED if report.failed and tell else ():
            if tab.is_open():
                tell("a page then open", tab.told())
    return report


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

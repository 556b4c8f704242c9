"""Pages of Gradio, built for tests that look at them without a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Built = TypeVar("Built")


def built(build: Callable[[], Built]) -> Built:
    """What `build` makes, inside of an event loop: outside of one Gradio makes one that nobody
    closes. In a thread of its own, since Playwright keeps a loop running in the first."""

    async def within() -> Built:
        return build()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, within()).result()

"""Of several answers that paint one place of the page, only the one that began last is shown.

Handlers run at the same time, and an answer that began early can be ready late: computed from what
the page was, it would paint over what it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()


@dataclass
class Latest:
    """The answer that began last, by place; one of these for each browser tab (a gr.State)."""

    begun: dict[str, int] = field(default_factory=dict)

    def begin(self, place: str) -> Callable[[], bool]:
        """An answer for this place begins. The function given back tells whether it is still the
        latest, so that it may be shown."""
        with _LOCK:
            number = self.begun[place] = next(_NUMBERS)
        return lambda: self.begun[place] == number

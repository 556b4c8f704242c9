"""Numbers as the page writes them: the same everywhere, and a dash where nothing was measured."""

from __future__ import annotations

import math

NOTHING = "–"


def perplexity(value: float | None) -> str:
    """Two decimals; a model that exploded in scientific notation."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def divergence(value: float | None) -> str:
    """Three significant digits, in nats a token."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "∞"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def plus_minus(interval: tuple[float, float] | None, like: str) -> str:
    """Half the width of an interval, with as many decimals as the text `like` has; '' if none."""
    if interval is None or not all(math.isfinite(end) for end in interval):
        return ""
    half = (interval[1] - interval[0]) / 2
    decimals = len(like.partition(".")[2]) if "e" not in like else None
    return f"± {half:.{decimals}f}" if decimals is not None else f"± {half:.2e}"


def difference(mean: float, low: float, high: float) -> str:
    """A difference and half its interval's width, to two digits of that width: `0.040 ± 0.010`.

    Seven decimals at most; a minus that is none (`-0.000`) is left out."""
    half = (high - low) / 2
    if not (math.isfinite(mean) and math.isfinite(half)):
        return NOTHING
    decimals = min(7, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    text = f"{mean:.{decimals}f}"
    if not float(text):
        text = text.removeprefix("-")
    return f"{text} ± {half:.{decimals}f}"


def megabytes(value: float | None) -> str:
    """Megabytes of 10^6 bytes, without decimals above 10."""
    if value is None:
        return NOTHING
    size = value / 1e6
    return f"{size:,.0f}" if size >= 10 else f"{size:.2f}"


def gigabytes(value: float | None) -> str:
    """A size with the unit that fits, for memory: `1.4 GB`, `310 MB`."""
    if value is None:
        return NOTHING
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{megabytes(value)} MB"


def bits(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def speed(value: float | None) -> str:
    """Tokens a second, without decimals above 10."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}%"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def duration(seconds: float | None) -> str:
    """How long something took: `4.2 s` below ten seconds, then m:ss."""
    if seconds is not None and seconds < 10:
        return f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float | None) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    if seconds is None:
        return NOTHING
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

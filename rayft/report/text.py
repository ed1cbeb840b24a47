"""Numbers and texts as the report and the terminal write them; `–` stands for what was not measured."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from rayft.report.record import Score

__all__ = [
    "ago_text",
    "difference_text",
    "human_bytes",
    "human_count",
    "human_seconds",
    "loss_text",
    "printable",
    "score_text",
    "signed_text",
]


def score_text(score: Score | None, digits: int = 2) -> str:
    """Format a score with its interval: 0.61 [0.55, 0.67]; `–` for None."""
    if score is None:
        return "–"
    return f"{score.value:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def difference_text(difference: Score) -> str:
    """Format a difference with its interval and signs: +0.39 [+0.32, +0.46]."""
    return signed_text(difference.value, difference.low, difference.high)


def signed_text(value: float, low: float, high: float, digits: int = 2) -> str:
    """Format a number with its interval and signs: +0.39 [+0.32, +0.46].

    NaN becomes `–`; a number whose interval is NaN stands alone.
    """
    if math.isnan(value):
        return "–"
    # Adding 0 makes −0 a 0.
    one, *ends = (f"{round(number, digits) + 0.0:+.{digits}f}" for number in (value, low, high))
    text = f"{one} [{', '.join(ends)}]" if math.isfinite(low) else one
    return text.replace("-", "−")


def loss_text(loss: float | None) -> str:
    """Format a loss: 1.234; `–` for None, `diverged` for NaN and infinity."""
    if loss is None:
        return "–"
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def human_bytes(count: float | None) -> str:
    """Format a size in decimal units: 1.2 MB; `–` for None."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), " ")


def human_count(count: float | None) -> str:
    """Format a count: 1.2M; `–` for None."""
    return _scaled(count, ("", "k", "M", "B", "T"), "")


def human_seconds(seconds: float | None) -> str:
    """Format a duration: 53 ms, 4.2 s, 3m 05s, 2h 10m; `–` for None."""
    if seconds is None:
        return "–"
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def ago_text(seconds: float) -> str:
    """Format the time that has passed since something: 5 min ago, 3 h ago, 12 d ago."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def printable(text: str) -> str:
    """Return a text with control characters as escapes: in a terminal, a model's answer could change it."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) != "Cc" else f"\\x{ord(one):02x}" for one in text
    )


def _scaled(value: float | None, units: Sequence[str], gap: str) -> str:
    if value is None:
        return "–"
    for unit in units[:-1]:
        # 999.6 would be written as 1000 of this unit.
        if abs(value) < 999.5:
            return (f"{value:.3g}" if value % 1 else f"{value:.0f}") + (gap if unit else "") + unit
        value /= 1000
    return f"{value:.3g}{gap}{units[-1]}"

"""Numbers as people read them."""

from __future__ import annotations


def million(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.{2 if count < 1e9 else 0}f} M"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def digits(number: float) -> str:
    """Three digits that count, and never an exponent."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

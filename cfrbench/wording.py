"""Small things as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def storage(mib: float) -> str:
    """``0.3 MiB``, ``45 MiB``, ``3.5 GiB``."""
    if mib < 1024:
        return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"
    return f"{mib / 1024:.1f} GiB"


def log_line(event: Mapping[str, object]) -> str:
    """One event of a stage's log for a person: ``step 12, loss 0.532``."""
    words = [str(event["event"])]
    for name, value in event.items():
        if name not in ("event", "time"):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            words.append(shown if name == "step" and len(words) == 1 else f"{name} {shown}")
    return f"{words[0]} {', '.join(words[1:])}".strip()

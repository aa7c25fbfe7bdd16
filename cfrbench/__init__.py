"""Benchmark semi-supervised 3D medical segmentation with and without a foundation model's pseudo-labels.

Importing this package imports neither torch nor a plug-in; each public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ablate": "cfrbench.ablation",
    "run": "cfrbench.sweep",
    "RunConfig": "cfrbench.config",
    "Settings": "cfrbench.config",
    "hookimpl": "cfrbench.hookspecs",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cfrbench' has no attribute {name!r}")

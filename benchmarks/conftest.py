"""Benchmarks find real volumes as the tests do, and reuse freed memory as the command line does: all sides alike."""

from __future__ import annotations

from cfrbench.machine import keep_freed_memory
from tests.conftest import data_folder

__all__ = ["data_folder"]

keep_freed_memory()

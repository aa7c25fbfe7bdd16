"""Benchmarks find the real volumes as the tests do."""

from __future__ import annotations

from tests.conftest import data_folder

__all__ = ["data_folder"]

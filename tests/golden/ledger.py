"""Counts which arrays of a golden file were asserted.

`take(key)` returns an array and counts it as used, so call it only for what an assertion consumes (inputs included).
`allow(prefix, reason)` sets aside keys that wait for a later issue. `test_zz_coverage.py` fails on every other key.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
FAMILIES = ("cfr_core", "finetuners", "ssl_consistency", "ssl_mixing")


class Ledger:
    """One golden family."""

    def __init__(self, family: str) -> None:
        self.family = family
        folder = Path(os.environ.get("CFRBENCH_GOLDEN", HERE))
        # A missing file fails the tests that need it; golden tests never skip.
        with np.load(folder / f"{family}.npz", allow_pickle=False) as arrays:
            self.arrays: dict[str, NDArray[Any]] = {key: arrays[key] for key in arrays.files}
        self.used: set[str] = set()
        self.allowed: dict[str, str] = {}

    def take(self, key: str) -> NDArray[Any]:
        """Return one array and count it as used; KeyError if the file lacks it."""
        value = self.arrays[key]
        self.used.add(key)
        return value

    def has(self, key: str) -> bool:
        """Whether the file holds ``key``; does not count as use."""
        return key in self.arrays

    def keys(self, prefix: str = "") -> list[str]:
        """Keys that start with ``prefix``, in file order; does not count as use. KeyError if there is none.

        A group that is not there must fail: tests parametrised over nothing would be skipped.
        """
        found = [key for key in self.arrays if key.startswith(prefix)]
        if not found:
            raise KeyError(f"{self.family} holds no array under '{prefix}'")
        return found

    def allow(self, prefix: str, reason: str) -> None:
        """Set aside the keys under ``prefix``: they wait for what ``reason`` names."""
        self.allowed[prefix] = reason

    def excused(self, key: str) -> bool:
        """Whether an allow-list entry covers ``key``."""
        return any(key.startswith(prefix) for prefix in self.allowed)

    def forgotten(self) -> list[str]:
        """Keys neither used nor set aside."""
        return [key for key in self.arrays if key not in self.used and not self.excused(key)]


@cache
def ledger(family: str) -> Ledger:
    """The one ledger of a family in this test run."""
    return Ledger(family)


def closing_lines() -> list[str]:
    """``golden: FAMILY used/total`` for each family, and why keys were set aside; nothing if none was used here."""
    books = [ledger(family) for family in FAMILIES] if ledger.cache_info().currsize else []  # collecting opens them
    if not any(book.used for book in books):
        return []
    lines = []
    for book in books:
        lines.append(f"golden: {book.family} {len(book.used)}/{len(book.arrays)}")
        for prefix, reason in sorted(book.allowed.items()):
            count = sum(key.startswith(prefix) and key not in book.used for key in book.arrays)
            lines.append(f"golden:   {book.family} {prefix}* set aside ({count}): {reason}")
    return lines

"""Shared by all tests: the closing lines of the golden ledgers, the real data folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.golden import ledger as golden


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print ``golden: FAMILY used/total`` and the reasons of what was set aside."""
    if golden.ledger.cache_info().currsize == 0:
        return
    for family in golden.FAMILIES:
        book = golden.ledger(family)
        terminalreporter.write_line(f"golden: {family} {len(book.used)}/{len(book.arrays)}")
        for prefix, reason in sorted(book.allowed.items()):
            count = sum(key.startswith(prefix) and key not in book.used for key in book.arrays)
            terminalreporter.write_line(f"golden:   {family} {prefix}* set aside ({count}): {reason}")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real volumes (CFRBENCH_DATA, default ../shared/data); skips with a reason where it is absent."""
    folder = Path(os.environ.get("CFRBENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CFRBENCH_DATA")
    return folder

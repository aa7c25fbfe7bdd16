"""Benchmarks find real volumes as the tests do, and reuse freed memory as the command line does: all sides alike.

``--measured FILE`` keeps what they measured, for `benchmarks.table`: the properties that a test records, and the extra
information of its `benchmark` fixture.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from cfrbench.heap import keep_freed_memory
from tests.conftest import data_folder

__all__ = ["data_folder"]

keep_freed_memory()

_rows = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to keep what was measured."""
    parser.addoption("--measured", metavar="FILE", type=Path, help="keep what benchmarks measured in this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the figures of a test that has run, and whether it met its bounds."""
    report = yield
    if report.when == "call" and not report.skipped:
        extra = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", {})
        figures = {str(what): str(value) for what, value in [*report.user_properties, *extra.items()]}
        if figures:
            name = f"{item.path.name}::{item.name}"
            item.config.stash[_rows][name] = {"passed": report.passed, "figures": figures}
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add the rows of this run to those of earlier ones."""
    file: Path | None = session.config.getoption("--measured")
    rows = session.config.stash[_rows]
    if file is None or not rows:
        return
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(earlier | rows, indent=1), encoding="utf-8")

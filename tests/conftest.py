"""Shared by all tests: who runs what, the closing lines of the golden ledgers, the real data folder.

Tests run in two processes (pytest-xdist), a file in one of them, all golden tests in one, for they count together what
they used. ``-n 0`` runs everything in this process, ``-n 8`` in eight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.golden import ledger as golden

#: under this name a worker hands over its ledgers' lines
_LINES = "golden"
_lines_of_workers: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each worker; torch, which is not loaded yet, takes it from here."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to workers whole, and those of golden tests as one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "golden" if nodeid.startswith("tests/golden/") else super()._split_scope(nodeid)

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the lines of a worker to the process that prints."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_LINES] = golden.closing_lines()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the lines of a worker that has ended."""
    _lines_of_workers.extend(getattr(node, "workeroutput", {}).get(_LINES, []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print ``golden: FAMILY used/total`` and the reasons of what was set aside."""
    for line in _lines_of_workers or golden.closing_lines():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real volumes (CFRBENCH_DATA, default ../shared/data); skips with a reason where it is absent."""
    folder = Path(os.environ.get("CFRBENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CFRBENCH_DATA")
    return folder

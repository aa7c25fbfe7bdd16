"""How long a person waits before anything is computed: help, the list of plug-ins, a finished sweep printed again.

The sweep is 2 methods x 4 budgets on the smoke preset, trained once, then asked for again by the same command.
Bounds are on processor seconds: all of it runs in one thread, so they are the wall-clock seconds of an idle machine,
and other processes hardly lengthen them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.test_sweep_speed import SWEEP

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(1800)]
ROUNDS = 5


@dataclass(frozen=True)
class Wait:
    """Least wall-clock and least processor seconds of a few calls; what the last one printed."""

    seconds: float
    cpu_seconds: float
    output: str


def wait(arguments: Sequence[str], rounds: int = ROUNDS) -> Wait:
    """Run ``cfrbench ARGUMENTS`` in processes of their own."""
    walls, processor, output = [], [], ""
    for _ in range(rounds):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        code = "from cfrbench.cli import main; main()"
        output = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                                check=True).stdout  # fmt: skip
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return Wait(min(walls), min(processor), output)


@pytest.mark.parametrize(("arguments", "bound"), [(["--help"], 0.5), (["plugins"], 1.0)])
def test_what_needs_no_torch_answers_at_once(
    arguments: list[str], bound: float, record_property: Callable[[str, object], None]
) -> None:
    found = wait(arguments)
    record_property(f"cfrbench {arguments[0]}",
                    f"{found.seconds:.2f} s, {found.cpu_seconds:.2f} CPU s, bound {bound}")  # fmt: skip
    assert found.cpu_seconds < bound


def test_a_finished_sweep_is_printed_again(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    arguments = [*SWEEP, "--json", "--store", str(tmp_path / "store")]
    first = wait(arguments, rounds=1)
    again = wait(arguments)
    assert json.loads(again.output)["rows"] == json.loads(first.output)["rows"]
    assert json.loads(again.output)["stages"]["trained"] == 0
    record_property("a finished sweep of 2 methods x 4 budgets printed again",
                    f"{again.seconds:.2f} s, {again.cpu_seconds:.2f} CPU s, bound 2")  # fmt: skip
    assert again.cpu_seconds < 2.0

"""Measures a variant in a process of its own: memory has a fresh high-water mark, and settings are made before torch.

A module that is measured so prints one JSON object: ``python -m benchmarks.MODULE VARIANT ARGUMENTS``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, float]
#: of the command line (`cfrbench.cli.main`); the other half of it is `cfrbench.heap.keep_freed_memory`
SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1"}


def measured(module: str, variant: str, arguments: Iterable[object] = (), *, settings: bool) -> Row:
    """What ``benchmarks.MODULE`` prints of a variant, under the command line's memory settings or the system's own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", variant, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root,
                          env=environment | (SETTINGS if settings else {}))  # fmt: skip
    assert done.returncode == 0, done.stderr
    row: Row = json.loads(done.stdout)
    figures = ", ".join(f"{name} {value:.5g}" for name, value in row.items())
    print(f"{variant:18} {figures}", flush=True)
    return row


def beside(plain: Row, fast: Row, what: str = "") -> str:
    """Both times and their ratio, on the wall and of the processor, whose ratio other processes disturb least.

    what: the prefix of the names of those times, if a row has several.
    """
    wall, processor = (f"{plain[name]:.1f} / {fast[name]:.1f} {unit} = {plain[name] / fast[name]:.2f}x"
                       for name, unit in ((f"{what}seconds", "s"), (f"{what}cpu_seconds", "CPU s")))  # fmt: skip
    return f"{wall}; {processor}"

"""What a sweep takes beside the work in it: 2 methods x 4 budgets on the smoke preset, and a method added to them.

The work is the seconds that the manifests of the distinct stages state, and for each process the start of Python, torch
and the pipeline, which `START` measures: stages of a fraction of a second would otherwise vanish behind it. Stages side
by side are compared with one stage on two threads by the time of the whole sweep.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cfrbench.artifact import MANIFEST
from cfrbench.files import read_json

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(1800)]

SMALL = ["data.phantom.train=16", "data.phantom.test=2", "data.phantom.shape=[32,32,16]"]
OPTIONS = ["--preset", "smoke", "--labels", "1,2,4,8", *(part for pair in SMALL for part in ("--set", pair))]
SWEEP = ["run", "--ssl", "mt,acmt", *OPTIONS]
ADDED = ["run", "--ssl", "mt,acmt,cps", *OPTIONS]
#: what a process loads before its first stage
START = "import torch, pandas, scipy.ndimage, peft, segment_anything; import cfrbench.stages, cfrbench.sweep"
#: the share of the work that a sweep may take
BOUND = 1.1


def timed(arguments: Sequence[str], store: Path) -> float:
    code = "from cfrbench.cli import main; main()"
    return seconds_of(["-c", code, *arguments, "--jobs", "1", "--json", "--store", str(store)])


def seconds_of(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - began


def stages(store: Path) -> dict[str, float]:
    """Seconds of every finished stage, by ``stage/key``."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}": float(read_json(path)["seconds"])
        for path in store.glob(f"*/*/{MANIFEST}")
    }


def test_a_sweep_costs_its_stages(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    store = tmp_path / "store"
    start = min(seconds_of(["-c", START]) for _ in range(3))
    wall = timed(SWEEP, store)
    before = stages(store)
    work = sum(before.values()) + start
    added_wall = timed(ADDED, store)
    new = {name: seconds for name, seconds in stages(store).items() if name not in before}
    added_work = sum(new.values()) + start
    record_property("sweep of 2 methods x 4 budgets, smoke, one at a time",
                    f"{wall:.1f} s for {len(before)} stages of {work:.1f} s (start {start:.1f} s) = "
                    f"{wall / work:.2f}, bound {BOUND}")  # fmt: skip
    record_property("a third method added to it", f"{added_wall:.1f} s for {len(new)} stages of {added_work:.1f} s "
                                                  f"= {added_wall / added_work:.2f}, bound {BOUND}")  # fmt: skip
    # Four budgets with and without guidance; nothing of the other methods, and no fine-tuning or labelling, again.
    kinds = [name.partition("/")[0] for name in new]
    assert sorted(kinds) == sorted(["train", "predict", "score"] * 8)
    assert wall <= BOUND * work
    assert added_wall <= BOUND * added_work


def test_two_jobs_of_one_thread_against_one_of_two(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """On V-Nets of 8 filters, whose stages outlast the start of a process; which is faster depends on the machine."""
    request = ["-c", "from cfrbench.cli import main; main()", "run", "--ssl", "mt", "--labels", "1,4", "--no-bounds",
               "--set", "training.steps=60", "--set", "tuning.steps=8"]  # fmt: skip
    side = seconds_of([*request, "--jobs", "2", "--threads", "1", "--store", str(tmp_path / "side")])
    alone = seconds_of([*request, "--jobs", "1", "--threads", "2", "--store", str(tmp_path / "alone")])
    record_property("two jobs of one thread against one of two, quick preset cut to 60 steps",
                    f"{side:.1f} s against {alone:.1f} s = {alone / side:.2f}x")  # fmt: skip
    assert side < alone

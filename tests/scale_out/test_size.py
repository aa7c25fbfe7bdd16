"""Sizes and overheads: 10,000 cells planned, a store of 100,000 artifacts looked at, 200 short stages run.

``pytest -m slow -n 0 -s tests/scale_out/test_size.py`` prints the figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cfrbench.config import validate
from cfrbench.contracts import Executor, StageTask
from cfrbench_executor.local import Local
from cfrbench_executor.ray import Ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

#: seconds of CPU (2 cores are shared with whatever else runs), peak memory in MiB
MEASURED = """
import json, sys, time
from cfrbench.machine import peak_mib
started = time.process_time()
{work}
print(json.dumps({{"seconds": time.process_time() - started, "mib": peak_mib(), "found": found}}))
"""


def measured(work: str, *arguments: str) -> dict[str, Any]:
    """CPU seconds, peak memory and ``found`` of a script in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(work=work), *arguments], capture_output=True,
                          text=True, check=False, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


PLAN = """
from pathlib import Path
from cfrbench.config import RunConfig
from cfrbench.sweep import plan
started = time.process_time()
request = RunConfig(preset="smoke", ssl=("mt", "ua-mt", "cps", "ict", "cct"), labels=(1, 2, 3, 4),
                    seeds=tuple(range(int(sys.argv[2]))),
                    set={"data.phantom.train": 8, "data.phantom.shape": [24, 24, 16]})
planned = plan(request, Path(sys.argv[1]))
found = [len(planned.chains), len(planned.todo), len({task.key for task in planned.todo})]
"""


def test_ten_thousand_cells_are_planned_in_five_seconds(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    small = measured(PLAN, store, "1")  # it also reads the images once, to look for copies
    large = measured(PLAN, store, "206")
    print(small, large)
    cells, stages, different = large["found"]
    assert cells >= 10_000
    assert stages == different, "a stage is planned twice"
    assert large["seconds"] < 5
    assert large["mib"] - small["mib"] < 100, "importing torch takes about 500 MiB, planning should add little"


def crowded(root: Path, artifacts: int) -> None:
    """A store with a run of 10,000 cells and ``artifacts`` finished stages, as directories and manifests alone."""
    from cfrbench.store import Store

    home = Store(root)
    cells = []
    for number in range(artifacts // 10):
        keys = [f"{number:08x}{stage}" for stage in range(5)]
        cells.append({"ssl": "mt", "title": "MT", "variant": "cfr", "labels": 1, "unlabelled": 4, "seed": number,
                      "score": keys[-1], "keys": keys})  # fmt: skip
    home.write_run("large", {"cells": cells, "seconds": None, "config": {}})
    for stage in ("tune", "pseudo", "train", "predict", "score"):
        (root / stage).mkdir()
        for number in range(artifacts // 5):
            folder = root / stage / f"{number:08x}{('tune', 'pseudo', 'train', 'predict', 'score').index(stage)}"
            folder.mkdir()
            (folder / "manifest.json").write_text("{}")
    for number in range(3):
        folder = root / "partial" / f"train-{number:08x}2"
        folder.mkdir()
        (folder / "log.jsonl").write_text('{"event": "begin", "time": 1.0}\n' * 10)


STATUS = """
import os
from typer.testing import CliRunner
sys.argv = ["cfrbench"]
from cfrbench.cli import app, status
answer = CliRunner().invoke(app, ["status", "large", "--json", "--store", os.environ["STORE"]])
found = [json.loads(answer.output)["counts"]["done"], "torch" in sys.modules]
"""


def test_status_of_a_store_of_100_000_artifacts_answers_in_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    crowded(store, 100_000)
    monkeypatch.setenv("STORE", str(store))
    answer = measured(STATUS)
    print(answer)
    assert answer["found"] == [10_000, False]
    assert answer["seconds"] < 2, answer
    assert answer["mib"] < 500, answer


# ---------------------------------------------------------------------------------------------------------------------
# overhead

STAGES, SECONDS = 200, 0.1


class Nap:
    """A stage that does nothing for a while; it leaves the moment of its beginning and its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, task: StageTask) -> None:
        began = time.time()
        time.sleep(SECONDS)
        (self.folder / task.key).write_text(f"{began} {time.time()}")


def efficiency(executor: Executor, folder: Path) -> float:
    """Ideal time of two at a time over the time from the moment when two processes are at work."""
    tasks = [StageTask("train", f"k{number}", f"nap {number}") for number in range(STAGES)]
    assert executor.run(tasks, Nap(folder)) == {}
    spans = sorted(tuple(map(float, path.read_text().split())) for path in folder.iterdir())
    assert len(spans) == STAGES
    both = next(b[0] for a, b in pairwise(spans) if b[0] < a[1])  # two overlap: start-up is over
    left = sum(began >= both for began, _ in spans)
    return (left * SECONDS / 2) / (max(end for _, end in spans) - both)


def test_local_workers_waste_little_time(tmp_path: Path) -> None:
    found = efficiency(Local(validate(Local.Config, {"jobs": 2}, "test")), tmp_path)
    print(f"local --jobs 2: {found:.1%} of the ideal")
    assert found >= 0.85, found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_wastes_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found = efficiency(Ray(validate(Ray.Config, {"jobs": 2}, "test")), tmp_path)
    print(f"ray, two at a time: {found:.1%} of the ideal")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert found >= 0.85, found

"""Whatever is killed and when, the same command gives the same rows: kill -9 inside every kind of stage, then rerun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cfrbench.files import read_log

# Small, but long enough that a kill has something to hit; a checkpoint after every step.
SETTINGS = (
    "tuning.steps=12", "training.steps=12", "training.checkpoint_seconds=0.001",
    "data.phantom.train=8", "data.phantom.test=6", "data.phantom.shape=[32,32,16]",
)  # fmt: skip
ARGUMENTS = ["run", "--preset", "smoke", "--ssl", "mt", "--labels", "1", "--no-bounds", "--json"]
ARGUMENTS += [part for setting in SETTINGS for part in ("--set", setting)]
# How many log lines of the stage a kill waits for: spread over its length.
MOMENTS = {"tune": (2, 12, 30), "pseudo": (2, 4, 7), "train": (2, 12, 30), "score": (2, 3, 4)}


def command(store: Path) -> list[str]:
    return [sys.executable, "-c", "from cfrbench.cli import main; main()", *ARGUMENTS, "--store", str(store)]


def rows(store: Path) -> Any:
    done = subprocess.run(command(store), capture_output=True, text=True, check=True, timeout=240)
    return json.loads(done.stdout)["rows"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rows(tmp_path_factory.mktemp("undisturbed"))


def logs(store: Path, stage: str) -> Iterator[Path]:
    yield from (store / "partial").glob(f"{stage}-*/log.jsonl")


def kill_when(store: Path, reached: Callable[[], bool]) -> None:
    """Start the command and kill -9 it at the first moment ``reached`` says so; fails if the run ends before."""
    process = subprocess.Popen(command(store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if reached():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    pytest.fail("the run ended before the moment of the kill")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "lines"), [(s, n) for s, moments in MOMENTS.items() for n in moments])
def test_a_kill_inside_any_stage_changes_nothing(tmp_path: Path, undisturbed: Any, stage: str, lines: int) -> None:
    store = tmp_path / "store"
    kill_when(store, lambda: any(len(read_log(log)) >= lines for log in logs(store, stage)))
    inside = list(logs(store, stage))
    assert inside, f"the kill did not land inside a {stage} stage"
    events = [e["event"] for e in read_log(inside[0])]
    assert "stage_finished" not in events
    assert rows(store) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tune", "train"])
def test_a_kill_inside_a_checkpoint_write_changes_nothing(tmp_path: Path, undisturbed: Any, stage: str) -> None:
    def writing(store: Path) -> bool:
        found = [e["event"] for log in logs(store, stage) for e in read_log(log)]
        return found.count("checkpoint_begin") >= 3 and found[-1:] == ["checkpoint_begin"]

    for attempt in range(20):  # the window is a few milliseconds wide: proven by the log, tried until hit
        store = tmp_path / f"store-{attempt}"
        kill_when(store, lambda store=store: writing(store))  # type: ignore[misc]
        if writing(store):
            break
    assert writing(store), "no kill landed inside a checkpoint write"
    assert rows(store) == undisturbed


@pytest.mark.slow
def test_two_processes_on_one_store_share_the_work(tmp_path: Path, undisturbed: Any) -> None:
    first, second = (
        subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    )
    outputs = [json.loads(process.communicate(timeout=240)[0]) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert [output["rows"] for output in outputs] == [undisturbed, undisturbed]
    for log in tmp_path.glob("*/*/log.jsonl"):
        events = [e["event"] for e in read_log(log)]
        assert events.count("stage_started") == 1, f"{log.parent} was begun twice"
    assert list((tmp_path / "damaged").iterdir()) == []

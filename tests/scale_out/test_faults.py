"""What clusters do to jobs: each fault is proven to have happened, and the sweep ends with the undisturbed scores."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cfrbench import leases
from cfrbench.errors import StoreError
from cfrbench.files import read_log
from cfrbench.store import Store
from tests.children import flip
from tests.scale_out.sweeps import scores, sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = 30
FILES = {"tune": "weights.safetensors", "train": "weights.safetensors", "score": "scores.parquet"}
STAGES = ("tune", "pseudo", "train", "predict", "score")
#: enough that a stage killed again and again is tried again each time
RETRIES = 50


@contextmanager
def beside(action: Any) -> Iterator[list[Any]]:
    """Run ``action`` until the block ends; what it returned each time."""
    over, seen = threading.Event(), []

    def repeat() -> None:
        while not over.is_set():
            seen.append(action())

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_workers_killed_at_random_moments(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    chance = random.Random(0)
    killed: list[int] = []

    def kill_one() -> None:
        time.sleep(chance.uniform(0.0, 0.2))
        holders = [leases.read(lease) or {} for lease in tmp_path.glob("store-*/locks/*.lease")]
        busy = sorted({holder["pid"] for holder in holders if "pid" in holder} - set(killed))
        if busy and len(killed) < KILLS:
            victim = chance.choice(busy)
            with suppress(ProcessLookupError):  # it had just ended by itself
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    rounds = 0
    with beside(kill_one):
        while len(killed) < KILLS:  # a sweep this small is over before so many kills: begin another one
            rounds += 1
            store = tmp_path / f"store-{rounds}"
            assert scores(sweep(store, jobs=2, retries=RETRIES)) == reference
    begun = [[event["event"] for event in read_log(log)].count("begin") for log in tmp_path.glob("*/*/*/log.jsonl")]
    assert sum(begun) - len(begun) >= KILLS / 2, "hardly a kill landed inside a stage"


COMMAND = "import sys; sys.path.insert(0, {root!r}); from pathlib import Path; from tests.scale_out.sweeps import *; "


def launch(store: Path, jobs: int = 1) -> subprocess.Popen[str]:
    """The sweep as a process of its own, as a person starts it."""
    script = (
        COMMAND.format(root=str(Path(__file__).parents[2]))
        + f"""
if __name__ == "__main__":
    result = sweep(Path({str(store)!r}), jobs={jobs}); sys.exit(bool(result.failures))"""
    )
    file = store.with_suffix(f".{time.time_ns()}.py")  # spawned workers import the main module: it needs a file
    file.write_text(script.strip())
    return subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(reached: Any) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(store: Path) -> list[Path]:
    return list((store / "locks").glob("*.lease"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_launcher_is_ended_and_issued_again(
    tmp_path: Path, reference: list[dict[str, Any]], number: signal.Signals
) -> None:
    store = tmp_path / "store"
    launcher = launch(store)
    wait_for(lambda: held(store))
    launcher.send_signal(number)
    words = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0, f"the launcher had ended before the signal: {words}"
    assert len(list((store / "score").glob("*"))) < 12, "everything was done before the signal"
    if number == signal.SIGKILL:
        assert held(store), "the dead launcher left no lease behind"
    assert scores(sweep(store)) == reference
    assert held(store) == []


def test_two_launchers_at_once_share_the_work(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    store = tmp_path / "store"
    launchers = [launch(store), launch(store)]
    for launcher in launchers:
        words = launcher.communicate(timeout=400)[0]
        assert launcher.returncode == 0, words
    found = [read_log(log) for log in store.glob("*/*/log.jsonl")]
    assert len(found) == 36
    assert all([event["event"] for event in log].count("begin") == 1 for log in found), "a stage was computed twice"
    assert scores(sweep(store)) == reference


def test_the_holder_of_a_lock_died_on_another_machine(
    tmp_path: Path, reference: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    store = Store(tmp_path / "store")
    key = _first_key(tmp_path)
    lease = leases.Lease(store.lease(key))
    lease._about |= {"kernel": "of a machine that lost its power"}
    store.lease(key).write_bytes(lease.line())
    assert scores(sweep(store.root)) == reference
    assert "its holder is taken for dead" in caplog.text


def _first_key(tmp_path: Path) -> str:
    """The key of a stage that the sweep begins with."""
    from cfrbench.config import RunConfig
    from cfrbench.sweep import plan
    from tests.scale_out.sweeps import REQUEST

    return plan(RunConfig.model_validate(REQUEST), tmp_path / "elsewhere").todo[0].key


def test_a_flipped_byte_is_found_and_its_stage_computed_again(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    store = tmp_path / "store"
    sweep(store)
    for number, (stage, name) in enumerate(FILES.items(), 1):
        flip(min((store / stage).glob(f"*/{name}")))
        later = STAGES[STAGES.index(stage) + 1 :]  # only what something missing stands on is looked at
        for folder in [folder for above in later for folder in store.glob(f"{above}/*")]:
            Store(store).discard(folder)
        assert scores(sweep(store)) == reference
        assert len(list((store / "damaged").iterdir())) == number


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a small file system")
def test_a_full_store_stops_with_a_message_and_goes_on_when_there_is_room(
    tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    store = tmp_path / "small"
    store.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(store)], capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        filler = store / "filler"
        filler.write_bytes(b"\0" * 900_000)
        try:
            failed = sweep(store).failures
        except StoreError as error:  # even the record of the run had no room
            failed = {"the run": str(error)}
        assert failed
        assert all("the disk is full" in words for words in failed.values()), failed
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(store)], check=True)
        assert scores(sweep(store)) == reference
    finally:
        subprocess.run(["umount", str(store)], check=True)

"""`status`, `logs` and `cancel` from files alone: every state a cell can be in, made as stages make it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cfrbench import leases, standing
from cfrbench.agenda import Died
from cfrbench.artifact import FAILED, LENGTH, Draft
from cfrbench.cells import Cell
from cfrbench.checkpoint import graceful_stop
from cfrbench.cli import app, status  # noqa: F401
from cfrbench.contracts import StageTask
from cfrbench.errors import Interrupted, UsageError
from cfrbench.following import Follower
from cfrbench.hookspecs import hookimpl
from cfrbench.registry import WATCHERS
from cfrbench.stages import STAGES, Run, StageWork
from cfrbench.store import Store

TITLES = ("Done", "Running", "Failed", "Stopped", "Waiting")


def call(store: Path, *arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--store", str(store)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def task(title: str, stage: str = "train") -> StageTask:
    return StageTask(stage, f"{stage}{title.lower()}", f"{stage} {title}")


def leave_unfinished(store: Store, task: StageTask, **reason: str) -> None:
    """An attempt of three steps of nine that ends without an artifact, and says why if there is a reason."""

    def make(draft: Draft) -> None:
        draft.log.write(LENGTH, total=9)
        for step in (1, 2, 3):
            draft.log.write("step", step=step, loss=0.5)
        if reason:
            draft.log.write(FAILED, **reason)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.ensure(task, make)


def silence(lease: Path) -> None:
    """Let a lease of this process look as if its holder had died a while ago; it is not renewed any more."""
    for held in [held for held in leases._HEART._leases if held.path == lease]:
        leases._HEART.forget(held)
    old = time.time() - standing.SILENCE_SECONDS - 1
    os.utime(lease, (old, old))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Store]:
    """A store with a run of five cells, one in each state; the running one's lock is held by this process."""
    store = Store(tmp_path / "store")
    with store.writing(task("Done", "score")) as draft:
        draft.path("x").write_bytes(b"x")
    for title in ("Failed", "Stopped"):
        reason = {"error": "The loss is not finite.", "kind": "ValueError"} if title == "Failed" else {}
        leave_unfinished(store, task(title), **reason)
    cells = [
        asdict(Cell("mt", title, "cfr", 1, 4, 0)) | {"score": f"score{title.lower()}",
        "keys": [f"train{title.lower()}", f"score{title.lower()}"]} for title in TITLES
    ]  # fmt: skip
    store.write_run("five", {"cells": cells, "seconds": None, "config": {}})
    with store.lock("trainrunning"):
        scratch = store.root / "partial" / "train-trainrunning"
        scratch.mkdir()
        steps = [{"event": "step", "time": 101.0 + 2 * n, "step": n, "loss": 1 / n} for n in range(1, 11)]
        events = [{"event": "begin", "time": 100.0}, {"event": LENGTH, "time": 100.5, "total": 900}, *steps]
        (scratch / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        yield store


def test_every_state_is_told_from_files(home: Store) -> None:
    found = standing.standing(home, home.run("five"))
    assert [cell.state for cell in found.cells] == [title.lower() for title in TITLES]
    running, failed = found.cells[1].stage, found.cells[2].stage
    assert running
    assert failed
    assert (running.stage, running.host, running.since) == ("train", os.uname().nodename, 100.0)
    assert (running.step, running.total, running.left_seconds) == (10, 900, pytest.approx(2 * 890))
    assert (failed.reason, failed.step, failed.total) == ("The loss is not finite.", 3, 9)


def test_a_holder_that_is_silent_is_called_gone_whatever_the_clocks_say(home: Store) -> None:
    silence(home.lease("trainrunning"))
    assert standing.standing(home, home.run("five")).cells[1].state == "stopped"


def test_status_prints_and_writes_json(home: Store) -> None:
    shown = call(home.root, "status", "--all").output
    assert "five: 1 of 5 cells done, 1 running, 1 failed, 1 stopped, 1 waiting" in shown
    assert "cell 3: The loss is not finite." in shown
    answer = json.loads(call(home.root, "status", "--json").output)
    assert answer["counts"] == {"running": 1, "failed": 1, "stopped": 1, "waiting": 1, "done": 1}
    assert answer["cells"][1]["stage"]["step"] == 10


def test_watching_ends_when_a_cancelled_run_has_stopped(home: Store) -> None:
    home.cancel_mark("five").touch()
    silence(home.lease("trainrunning"))
    shown = call(home.root, "status", "five", "--watch", "--every", "0.2").output
    assert "2 stopped" in shown
    assert "cancelled" in shown


def test_status_works_where_nothing_can_be_written(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", refuse)
    assert standing.standing(home, home.run("five")).cells[1].state == "running"


@pytest.mark.parametrize("reference", ["3", "failed", "trainfai"])
def test_logs_of_a_cell_by_number_name_or_key(home: Store, reference: str) -> None:
    shown = call(home.root, "logs", reference, "--lines", "2").output
    assert "Failed + CFR · 1 label · seed 0" in shown
    assert "step 3, loss 0.5" in shown
    assert "The loss is not finite." in shown
    assert "step 2" not in shown


def test_logs_of_a_cell_that_waits_say_so(home: Store) -> None:
    assert "No stage of this cell has begun." in call(home.root, "logs", "5").output


def test_logs_name_what_fits_when_the_reference_is_not_one_cell(home: Store) -> None:
    with pytest.raises(UsageError, match="5 cells of five"):
        call(home.root, "logs", "CFR")
    with pytest.raises(UsageError, match="no cells of five"):
        call(home.root, "logs", "nothing like it")


def test_cancel_stops_a_stage_of_that_run_and_it_saves_first(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def train(run: Run) -> dict[str, Any]:
        run.started(10_000)
        with graceful_stop() as stop:
            for step in range(1, 10_000):
                run.on_step(step, {})
                time.sleep(0.01)
                if step == 5:
                    assert "asked to stop" in call(home.root, "cancel", "five").output
                if stop.requested:
                    saved.append(step)
                    raise stop.interrupted(f"after step {step}")
        return {}

    monkeypatch.setitem(STAGES, "train", train)
    monkeypatch.setattr("cfrbench.stages.CANCEL_SECONDS", 0.05)
    with pytest.raises(Interrupted, match="same command"):
        StageWork(home.root, None, run="five")(task("Waiting"))
    assert len(saved) == 1
    assert "cancelled" in call(home.root, "status").output
    with pytest.raises(Interrupted, match="five was cancelled"):
        StageWork(home.root, None, run="five")(task("Waiting"))
    assert len(saved) == 1, "a stage began although its run was cancelled"


def test_a_failing_stage_says_why_in_its_log(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(run: Run) -> dict[str, Any]:
        raise ValueError("a bad number")

    monkeypatch.setitem(STAGES, "train", explode)
    with pytest.raises(ValueError, match="a bad number"):
        StageWork(home.root, None)(task("Waiting"))
    cell = standing.standing(home, home.run("five")).cells[4]
    assert cell.state == "failed"
    assert cell.stage
    assert cell.stage.reason == "a bad number"


class Heard:
    """Notes what observers hear."""

    def __init__(self) -> None:
        self.words: list[Any] = []

    @hookimpl
    def stage_started(self, task: StageTask, folder: str, total_steps: int) -> None:
        self.words.append(("started", total_steps))

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: dict[str, float]) -> None:
        self.words.append((step, values))

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: dict[str, Any]) -> None:
        self.words.append(("finished", values))


def test_a_follower_tells_what_others_do_and_how_it_ended(home: Store) -> None:
    new, failed, gone = task("New"), task("Failed"), task("Gone")
    follower, heard = Follower(home.root, [new, failed, gone]), Heard()
    WATCHERS.register(heard)
    try:
        with home.writing(new) as draft:
            draft.summary["dice"] = 7.0
            draft.log.write(LENGTH, total=3)
            draft.log.write("step", step=1, loss=0.5)
            draft.log.write("step", step=2, loss=0.25)
            follower.poll()
            draft.log.write("step", step=3, loss=0.125)
        assert follower.ended(new, "ended") is None
    finally:
        WATCHERS.unregister(heard)
    assert heard.words == [("started", 3), (2, {"loss": 0.25}), (3, {"loss": 0.125}), ("finished", {"dice": 7.0})]
    # What a log said before this launch is not this launch's failure.
    assert isinstance(follower.ended(failed, "was killed"), Died)
    leave_unfinished(home, failed, error="No luck.", kind="KeyError")
    assert str(follower.ended(failed, "ended")).startswith("train Failed failed with KeyError: No luck. Its log is")
    died = follower.ended(gone, "was killed by SIGKILL")
    assert isinstance(died, Died)
    assert "SIGKILL" in str(died)

"""Stages run in an order in which needs come first; one that fails takes only its dependents along."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cfrbench import compute, registry
from cfrbench.agenda import Agenda
from cfrbench.checkpoint import graceful_stop
from cfrbench.config import Frozen, validate
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError, ConfigError, Interrupted, OutOfMemory, StoreError
from cfrbench.hookspecs import hookimpl
from cfrbench_executor.local import Local
from tests.children import start


def task(key: str, *needs: str) -> StageTask:
    return StageTask("train", key, f"Training {key}", needs)


def local(jobs: int, **options: int) -> Local:
    return Local(validate(Local.Config, {"jobs": jobs, **options}, "the options of executor.local"))


class Unpicklable(CfrbenchError):
    """A guest's exception that cannot be sent to another process as it is."""

    def __init__(self, message: str, where: object) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True)
class Work:
    """Leaves a file for each task, and fails as the task's key says."""

    folder: Path

    def __call__(self, task: StageTask) -> None:
        (self.folder / f"{task.key}.begun").write_text(str(os.getpid()))
        name = task.key.rstrip("0123456789")
        if name == "value":
            raise ValueError("loss is not finite")
        if name == "disk":
            raise StoreError("Cannot write x: the disk is full. Free some space.")
        if name == "guest":
            raise Unpicklable("The guest says no.", threading.Lock())
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "once" and not (self.folder / "killed-already").exists():
            (self.folder / "killed-already").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "together":
            self.meet(int(task.key[-1]))
        if name == "long":
            self.train()
        (self.folder / f"{task.key}.done").write_text(str(os.getpid()))

    def meet(self, number: int) -> None:
        """Wait until the other one of two tasks is running as well."""
        other = self.folder / f"together{1 - number}.begun"
        for _ in range(12_000):  # starting a process takes long where others compute
            if other.exists():
                return
            time.sleep(0.01)
        raise TimeoutError("the other task never ran at the same time")

    def train(self) -> None:
        """Count until asked to stop; say so in a file."""
        with graceful_stop() as stop:
            (self.folder / f"{os.getpid()}.training").touch()
            for step in range(6000):
                time.sleep(0.01)
                if stop.requested:
                    (self.folder / f"{os.getpid()}.saved").touch()
                    raise stop.interrupted(f"after step {step}")

    def done(self) -> set[str]:
        """Keys of the tasks that ended well."""
        return {path.stem for path in self.folder.glob("*.done")}


TASKS = [task("a"), task("value", "a"), task("b", "value", "a"), task("c", "b"), task("disk", "elsewhere"),
         task("guest"), task("d", "a"), task("e", "d", "a")]  # fmt: skip


def check_failures(failures: dict[str, CfrbenchError]) -> None:
    assert str(failures["value"]).startswith("Training value failed with ValueError: loss is not finite. Its log is ")
    assert "partial/train-value/log.jsonl" in str(failures["value"])
    assert "--debug" in str(failures["value"])
    assert "raise ValueError" in str(failures["value"].__cause__)
    assert "raise StoreError" in str(failures["disk"].__cause__)
    assert isinstance(failures["disk"], StoreError)
    assert str(failures["guest"]) == "The guest says no."
    for key in ("b", "c"):
        assert str(failures[key]) == f"Training {key} was skipped: it needs Training value, which failed."


def test_failures_are_kept_and_everything_else_goes_on(tmp_path: Path) -> None:
    work = Work(tmp_path)
    failures = local(1).run(TASKS, work)
    assert set(failures) == {"value", "b", "c", "disk", "guest"}
    check_failures(failures)
    assert work.done() == {"a", "d", "e"}
    assert not (tmp_path / "b.begun").exists()
    assert (tmp_path / "a.done").read_text() == str(os.getpid())


def test_workers_give_the_same_answer_and_one_death_is_one_failure(tmp_path: Path) -> None:
    work = Work(tmp_path)
    tasks = [*TASKS, task("together0"), task("together1"), task("killed"), task("f", "killed"), task("g", "e")]
    failures = local(2, retries=0).run(tasks, work)
    assert set(failures) == {"value", "b", "c", "disk", "guest", "killed", "f"}
    check_failures(failures)
    assert "Training killed failed: its process was killed by SIGKILL" in str(failures["killed"])
    assert work.done() == {"a", "d", "e", "together0", "together1", "g"}
    workers = {int(path.read_text()) for path in tmp_path.glob("*.begun")}
    assert os.getpid() not in workers
    assert 2 <= len(workers) <= 3, "workers are kept; only the killed one is replaced"
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_a_stage_whose_worker_was_killed_is_tried_again_and_only_so_often(tmp_path: Path) -> None:
    work = Work(tmp_path)
    failures = local(2, retries=1).run([task("once"), task("a", "once"), task("killed"), task("value")], work)
    assert (tmp_path / "killed-already").exists(), "the worker of 'once' was never killed"
    assert set(failures) == {"killed", "value"}
    assert work.done() == {"once", "a"}


def test_stopping_the_parent_lets_every_worker_save_first(tmp_path: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def stop_when_both_train() -> None:
        while len(list(tmp_path.glob("*.training"))) < 2:
            time.sleep(0.02)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=stop_when_both_train)
    thread.start()
    with pytest.raises(Interrupted, match=r"SIGINT.*same command"):
        local(2).run([task("long0"), task("long1"), task("never", "long0")], Work(tmp_path))
    thread.join()
    assert len(list(tmp_path.glob("*.saved"))) == 2
    assert not (tmp_path / "never.begun").exists()
    assert not any(psutil.pid_exists(int(path.stem)) for path in tmp_path.glob("*.training"))


def run_long_task(folder: Path) -> None:
    local(2).run([task("long0")], Work(folder))


def test_workers_of_a_killed_parent_save_and_end(tmp_path: Path) -> None:
    parent = start(run_long_task, tmp_path, daemon=False)
    while not (pids := [int(path.stem) for path in tmp_path.glob("*.training")]):
        time.sleep(0.02)
    parent.kill()
    parent.join()
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert (tmp_path / f"{pids[0]}.saved").exists()
    assert not psutil.pid_exists(pids[0])


@dataclass(frozen=True)
class Crowd:
    """``beside`` runs until ``cramped``, which has no room beside others, has failed once; ``never`` has none at all.

    Each attempt notes who else runs, and which GPU its process was given.
    """

    folder: Path

    def __call__(self, task: StageTask) -> None:
        mine = self.folder / f"{task.key}.running"
        mine.touch()
        try:
            self._attempt(task.key)
        finally:
            mine.unlink()

    def _attempt(self, key: str) -> None:
        while key == "cramped" and not (self.folder / "beside").exists():
            time.sleep(0.02)
        others = sorted(path.stem for path in self.folder.glob("*.running") if path.stem != key)
        with (self.folder / key).open("a") as file:
            file.write(f"{compute._gpu} {others}\n")
        if key == "never" or (key == "cramped" and others):
            raise OutOfMemory("Memory ran out.")
        while key == "beside" and not (self.folder / "cramped").exists():
            time.sleep(0.02)


def test_memory_that_was_short_beside_others_is_tried_alone_and_workers_go_round_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "gpus", lambda: [0, 2])
    tasks = [task("cramped"), task("beside"), task("above", "cramped"), task("never")]
    failures = local(2).run(tasks, Crowd(tmp_path))
    assert {key: str(failure) for key, failure in failures.items()} == {"never": "Memory ran out."}
    attempts = {key: (tmp_path / key).read_text().splitlines() for key in ("cramped", "beside", "above", "never")}
    assert [attempt.partition(" ")[2] for attempt in attempts["cramped"]] == ["['beside']", "[]"]
    assert len(attempts["never"]) == 2
    assert attempts["never"][1].endswith("[]")
    assert len(attempts["above"]) == 1
    assert {attempt.split()[0] for lines in attempts.values() for attempt in lines} == {"0", "2"}


@pytest.mark.parametrize("error", [Interrupted("Stopped by SIGTERM."), KeyboardInterrupt()])
def test_the_wish_to_stop_passes_through_at_once(error: BaseException) -> None:
    seen = []

    def work(task: StageTask) -> None:
        seen.append(task.key)
        raise error

    with pytest.raises(type(error)):
        local(1).run([task("a"), task("b")], work)
    assert seen == ["a"]


def test_a_failure_holds_none_of_the_stages_memory() -> None:
    class Tensor:
        pass

    held: list[weakref.ref[Tensor]] = []

    def work(task: StageTask) -> None:
        big = Tensor()
        held.append(weakref.ref(big))
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise StoreError("outer") from error

    failures = local(1).run([task("a")], work)
    gc.collect()
    assert held[0]() is None
    assert "KeyError: 'inner'" in str(failures["a"].__cause__)


def test_a_diamond_is_skipped_once_and_an_impossible_order_is_refused() -> None:
    started: list[str] = []

    def work(task: StageTask) -> None:
        started.append(task.key)
        raise ZeroDivisionError

    diamond = [task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c")]
    assert set(local(1).run(diamond, work)) == {"a", "b", "c", "d"}
    assert started == ["a"]
    with pytest.raises(ValueError, match=r"Training a .* stands before what it needs: b"):
        local(1).run([task("a", "b"), task("b")], work)


def test_it_is_the_registered_executor_and_checks_its_options() -> None:
    assert registry.load("executor", "local") is Local
    assert isinstance(Local().config, Frozen)
    assert Local().config.jobs == 1
    with pytest.raises(ConfigError, match=r"executor\.local"):
        local(0)


def _talk(task: StageTask) -> None:
    hook = registry.WATCHERS.hook
    hook.stage_started(task=task, folder="nowhere", total_steps=2)
    for step in (1, 2):
        hook.step_done(task=task, step=step, values={"loss": 0.5})
    hook.stage_finished(task=task, seconds=0.0, values={})


class Listener:
    """Notes what observers hear."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    @hookimpl
    def stage_started(self, task: StageTask, folder: str, total_steps: int) -> None:
        self.heard.append((task.key, f"started {total_steps}"))

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        self.heard.append((task.key, f"step {step} {values['loss']}"))

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        self.heard.append((task.key, "finished"))


def test_observers_hear_what_happens_in_workers() -> None:
    listener = Listener()
    registry.WATCHERS.register(listener)
    try:
        tasks = [StageTask("train", name, f"train {name}") for name in ("one", "two")]
        assert local(2).run(tasks, _talk) == {}
    finally:
        registry.WATCHERS.unregister(listener)
    for key in ("one", "two"):  # the second step comes too soon after the first to be passed on
        assert [words for who, words in listener.heard if who == key] == ["started 2", "step 1 0.5", "finished"]


def test_the_longest_chain_begins_first() -> None:
    short, first = StageTask("train", "a", "short"), StageTask("tune", "b", "first")
    second, last = StageTask("pseudo", "c", "second", ("b",)), StageTask("train", "d", "last", ("c",))
    agenda = Agenda([short, first, second, last])
    taken = []
    while task := agenda.take():
        taken.append(task.title)
        agenda.finish(task, None)
    assert taken == ["first", "second", "short", "last"]

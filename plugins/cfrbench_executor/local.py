"""Runs stages on this machine: one after the other in this process, or several at a time in worker processes.

Worker processes are kept for many stages, for importing torch takes seconds. There is no `ProcessPoolExecutor` here
because one worker killed for memory would break all of it; here it costs the stage it was computing.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from pydantic import Field

from cfrbench import registry
from cfrbench.artifact import LOG
from cfrbench.checkpoint import graceful_stop
from cfrbench.config import Frozen
from cfrbench.contracts import Executor, StageTask
from cfrbench.errors import CfrbenchError, Interrupted, Skipped
from cfrbench.hookspecs import hookimpl
from cfrbench.machine import keep_freed_memory
from cfrbench.store import scratch_folder

Work = Callable[[StageTask], None]
#: how a task ended, as it travels: None, or a failure and its cause
_Parcel = tuple[CfrbenchError, BaseException | None] | None

#: how long a worker may take to save its state when it is asked to stop
PATIENCE_SECONDS = 60.0
#: least time between two steps that a worker reports
PACE_SECONDS = 0.5


class Local(Executor):
    """Stages in this process, or up to ``jobs`` at a time in worker processes; results do not depend on ``jobs``."""

    name = "local"

    class Config(Frozen):
        """Options of the local executor."""

        jobs: int = Field(1, ge=1, description="stages computed at the same time, each with its own compute.threads")

    config: Config

    def run(self, tasks: Sequence[StageTask], work: Work) -> dict[str, CfrbenchError]:
        """Run every task whose needs succeed; return failures by key. Interrupted passes through."""
        agenda = _Agenda(tasks)
        if self.config.jobs == 1:
            while (task := agenda.take()) is not None:
                agenda.finish(task, _attempt(task, work))
        else:
            _run_in_workers(agenda, work, self.config.jobs)
        return agenda.failures


@hookimpl
def executors() -> list[type[Executor]]:
    """The local executor."""
    return [Local]


# ---------------------------------------------------------------------------------------------------------------------
# order and failures


class _Agenda:
    """Which tasks wait, which can start, which failed."""

    def __init__(self, tasks: Sequence[StageTask]) -> None:
        self.failures: dict[str, CfrbenchError] = {}
        self._waiting = {task.key: task for task in tasks}
        self._above = _stages_above(tasks)
        # A need that is nobody's task is in the store already.
        self._unfinished = set(self._waiting)
        place = {key: index for index, key in enumerate(self._waiting)}
        for task in tasks:
            late = [key for key in task.needs if place.get(key, -1) >= place[task.key]]
            if late:
                raise ValueError(f"{task.title} ({task.key}) stands before what it needs: {', '.join(late)}")

    def take(self) -> StageTask | None:
        """The next task that can start, of the longest chain; None if each waits for a running one, or none is left.

        Fine-tuning begins first, then: four stages wait for it, while trainings without guidance fit in anywhere.
        """
        ready = [task for task in self._waiting.values() if self._unfinished.isdisjoint(task.needs)]
        if not ready:
            return None
        return self._waiting.pop(max(ready, key=lambda task: self._above[task.key]).key)

    def finish(self, task: StageTask, failure: CfrbenchError | None) -> None:
        """Note the end of a task; a failure takes along all that need it."""
        self._unfinished.discard(task.key)
        if failure is not None:
            self.failures[task.key] = failure
            self._skip(task.key, task)

    def _skip(self, key: str, culprit: StageTask) -> None:
        for task in [waiting for waiting in self._waiting.values() if key in waiting.needs]:
            if self._waiting.pop(task.key, None) is not None:
                self.failures[task.key] = Skipped(f"{task.title} was skipped: it needs {culprit.title}, which "
                                                        "failed.")  # fmt: skip
                self._skip(task.key, culprit)


def _stages_above(tasks: Sequence[StageTask]) -> dict[str, int]:
    """By key, the number of stages in the longest chain that stands on a task; needs come before what needs them."""
    above = dict.fromkeys((task.key for task in tasks), 0)
    for task in reversed(tasks):
        for key in above.keys() & task.needs:
            above[key] = max(above[key], above[task.key] + 1)
    return above


class StageTraceback(Exception):
    """The traceback of a failed stage as text, chained to its error.

    Text, because live frames would keep the failed stage's tensors in memory, and cannot leave a worker.
    """

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _attempt(task: StageTask, work: Work) -> CfrbenchError | None:
    """Do one task; its failure is the answer. Only the wish to stop passes through."""
    try:
        work(task)
    except Interrupted:
        raise
    except Exception as error:
        failure = _explained(task, error)
        failure.__cause__ = StageTraceback("".join(traceback.format_exception(error)))
        failure.__traceback__ = failure.__context__ = None
        return failure
    return None


def _explained(task: StageTask, error: Exception) -> CfrbenchError:
    if isinstance(error, CfrbenchError):
        return error
    log = scratch_folder(task.stage, task.key) / LOG
    return CfrbenchError(f"{task.title} failed with {type(error).__name__}: {error}. Its log is {log} in the store; "
                         "give the same command with --debug for the traceback.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# workers


def _run_in_workers(agenda: _Agenda, work: Work, jobs: int) -> None:
    # Workers first: they are gone before a stop that was asked for becomes an exception.
    with graceful_stop() as stop, _Crew(work, jobs) as crew:
        while True:
            while crew.has_room() and (task := agenda.take()) is not None:
                crew.start(task)
            if not crew.busy:
                return
            for task, failure in crew.finished():
                agenda.finish(task, failure)
            if stop.requested:
                raise stop.interrupted("between two stages")


class _Crew:
    """Up to ``jobs`` worker processes; leaving the block asks those still busy to save their state and ends them."""

    def __init__(self, work: Work, jobs: int) -> None:
        self._work, self._jobs = work, jobs
        self._idle: list[_Worker] = []
        self.busy: list[_Worker] = []

    def has_room(self) -> bool:
        """Whether another task can start now."""
        return len(self.busy) < self._jobs

    def start(self, task: StageTask) -> None:
        """Give a task to an idle worker, or to a new one."""
        # An idle worker may have died since: the system takes memory where it finds it.
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        worker = self._idle.pop() if self._idle else _Worker(self._work)
        worker.give(task)
        self.busy.append(worker)

    def finished(self) -> list[tuple[StageTask, CfrbenchError | None]]:
        """What ended in the next moment, as (task, failure); Interrupted if a worker was asked to stop."""
        ready = wait([worker.connection for worker in self.busy], timeout=0.2)
        answers = []
        for worker in [worker for worker in self.busy if worker.connection in ready]:
            message = worker.heard()
            if isinstance(message, _News):
                getattr(registry.WATCHERS.hook, message.hook)(task=worker.task, **message.values)
                continue
            self.busy.remove(worker)
            answers.append((worker.task, worker.answer(message)))
            self._idle.append(worker)
        return answers

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        patience = 0.0 if kind is KeyboardInterrupt else PATIENCE_SECONDS
        crew = self._idle + self.busy
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join(patience)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


class _Worker:
    """A process that does one task after the other."""

    task: StageTask

    def __init__(self, work: Work) -> None:
        # Spawned, not forked: torch's threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: StageTask) -> None:
        """Begin a task."""
        self.task = task
        self.connection.send(task)

    def heard(self) -> _News | _Parcel:
        """The worker's next message; should it have died, a parcel that says how."""
        try:
            message: _News | _Parcel = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._death(), None
        return message

    def answer(self, parcel: _Parcel) -> CfrbenchError | None:
        """How the task ended: None or its failure; raises Interrupted if it was asked to stop."""
        if parcel is None:
            return None
        failure, cause = parcel
        failure.__cause__ = cause
        if isinstance(failure, Interrupted):
            raise failure
        return failure

    def _death(self) -> CfrbenchError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return CfrbenchError(f"{self.task.title} failed: its process {how}. If memory ran out, use fewer jobs or a "
                             "smaller preset; the same command goes on from its last checkpoint.")  # fmt: skip


class _News(NamedTuple):
    """What an observer of the worker's task is told: a hook and its values."""

    hook: str
    values: dict[str, Any]


class _Relay:
    """An observer in a worker that passes on to the parent what it hears, steps at most twice a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    @hookimpl
    def stage_waiting(self, task: StageTask) -> None:
        """Pass it on."""
        self._tell("stage_waiting")

    @hookimpl
    def stage_started(self, task: StageTask, folder: str, total_steps: int) -> None:
        """Pass it on."""
        self._tell("stage_started", folder=folder, total_steps=total_steps)

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        """Pass it on, unless it comes too soon after the last."""
        now = time.monotonic()
        if now - self._last >= PACE_SECONDS:
            self._last = now
            self._tell("step_done", step=step, values=dict(values))

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._tell("stage_finished", seconds=seconds, values=dict(values))

    def _tell(self, hook: str, **values: Any) -> None:
        with suppress(ConnectionError):  # the parent may be the one that was killed
            self._connection.send(_News(hook, values))


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker."""
    keep_freed_memory()
    registry.WATCHERS.register(_Relay(connection))
    # Ctrl-C in a terminal reaches every process of the group: out of it, for the parent asks each worker once.
    os.setsid()
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_parcel(_attempt(task, work)))
        except Interrupted as stop:
            with suppress(ConnectionError):  # the parent may be the one that was killed
                connection.send((stop, None))
            return


def _follow_parent() -> None:
    """Should the parent be killed, stop as if asked to: nobody is left to use the results, or to stop this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)


def _parcel(failure: CfrbenchError | None) -> _Parcel:
    """A failure and its cause side by side, because pickling an exception drops its cause."""
    if failure is None:
        return None
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:  # a guest's exception may not survive the journey; its words do
        return CfrbenchError(str(failure)), failure.__cause__
    return failure, failure.__cause__

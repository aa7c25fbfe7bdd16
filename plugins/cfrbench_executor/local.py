"""Runs stages on this machine: one after the other in this process, or several at a time in worker processes.

Worker processes are kept for many stages, for importing torch takes seconds. There is no `ProcessPoolExecutor` here
because one worker killed for memory would break all of it; here it costs the stage it was computing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from cfrbench import registry
from cfrbench.agenda import Agenda, Died, Parcel, Work, attempt, death, devices_of, parcel, unpacked
from cfrbench.checkpoint import graceful_stop
from cfrbench.config import Frozen
from cfrbench.contracts import Executor, StageTask
from cfrbench.errors import CfrbenchError, Interrupted, OutOfMemory
from cfrbench.heap import keep_freed_memory
from cfrbench.hookspecs import hookimpl
from cfrbench.machine import give_memory_back

#: how long a worker may take to save its state when it is asked to stop
PATIENCE_SECONDS = 60.0
#: how long a worker waits for its next task before it gives back what it has freed
REST_SECONDS = 1.0
#: least time between two steps that a worker reports
PACE_SECONDS = 0.5


class Local(Executor):
    """Stages in this process, or up to ``jobs`` at a time in worker processes; results do not depend on ``jobs``."""

    name = "local"

    class Config(Frozen):
        """Options of the local executor."""

        jobs: int = Field(1, ge=1, description="stages computed at the same time, each with its own compute.threads")
        retries: int = Field(2, ge=0, description="further attempts of a stage whose worker process was killed")

    config: Config

    def run(self, tasks: Sequence[StageTask], work: Work) -> dict[str, CfrbenchError]:
        """Run every task whose needs succeed; return failures by key. Interrupted passes through."""
        agenda = Agenda(tasks)
        if self.config.jobs == 1:
            while (task := agenda.take()) is not None:
                agenda.finish(task, attempt(task, work))
        else:
            crew = _Crew(work, self.config.jobs, self.store, _gpus(tasks))
            _run_in_workers(agenda, crew, self.config.retries)
        return agenda.failures


@hookimpl
def executors() -> list[type[Executor]]:
    """The local executor."""
    return [Local]


# ---------------------------------------------------------------------------------------------------------------------
# workers


def _gpus(tasks: Sequence[StageTask]) -> list[int]:
    """The GPUs to spread workers over: those that compute alike, if there are several and a stage may use one."""
    if devices_of(tasks) == {"cpu"}:
        return []
    from cfrbench.compute import gpus

    found = gpus()
    return found if len(found) > 1 else []


def _run_in_workers(agenda: Agenda, crew: _Crew, retries: int) -> None:
    attempts: Counter[str] = Counter()
    cramped: list[StageTask] = []  # memory ran out beside others: each is tried once more when nothing else runs
    alone: set[str] = set()
    with graceful_stop() as stop, crew:  # inside: workers are gone before a stop becomes an exception
        while True:
            while crew.has_room() and (task := agenda.take()) is not None:
                attempts[task.key] += 1
                crew.start(task)
            if not crew.busy and cramped:
                alone.add(cramped[0].key)
                crew.start(cramped.pop(0))
            if not crew.busy:
                return
            for task, failure in crew.finished():
                if isinstance(failure, Died) and attempts[task.key] <= retries and not stop.requested:
                    agenda.again(task)
                elif isinstance(failure, OutOfMemory) and task.key not in alone:
                    cramped.append(task)
                else:
                    agenda.finish(task, failure)
            if stop.requested:
                raise stop.interrupted("between two stages")


class _Crew:
    """Up to ``jobs`` worker processes; leaving the block asks those still busy to save their state and ends them."""

    def __init__(self, work: Work, jobs: int, store: Path | None, gpus: Sequence[int] = ()) -> None:
        self._work, self._jobs, self._store, self._gpus = work, jobs, store, gpus
        self._idle: list[_Worker] = []
        self.busy: list[_Worker] = []

    def has_room(self) -> bool:
        """Whether another task can start now."""
        return len(self.busy) < self._jobs

    def start(self, task: StageTask) -> None:
        """Give a task to an idle worker, or to a new one."""
        # An idle worker may have died since: the system takes memory where it finds it.
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        if self._idle:
            worker = min(self._idle, key=lambda idle: sum(other.gpu == idle.gpu for other in self.busy))
            self._idle.remove(worker)
        else:
            worker = _Worker(self._work, self._store, self._next_gpu())
        worker.give(task)
        self.busy.append(worker)

    def _next_gpu(self) -> int | None:
        """The GPU with the fewest workers, so that they go round; None if there is nothing to choose."""
        taken = Counter(worker.gpu for worker in self.busy)
        return min(self._gpus, key=lambda gpu: taken[gpu], default=None)

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
            answers.append((worker.task, unpacked(message)))
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

    def __init__(self, work: Work, store: Path | None, gpu: int | None) -> None:
        self._store, self.gpu = store, gpu
        # Spawned, not forked: torch's threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, gpu), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: StageTask) -> None:
        """Begin a task."""
        self.task = task
        self.connection.send(task)

    def heard(self) -> _News | Parcel:
        """The worker's next message; should it have died, a parcel that says how."""
        try:
            message: _News | Parcel = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._death(), None
        return message

    def _death(self) -> Died:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return death(self.task, how, self._store)


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


def _serve(connection: Connection, work: Work, gpu: int | None) -> None:
    """The life of a worker; ``gpu`` is the one it computes on if stages name none by number."""
    keep_freed_memory()
    if gpu is not None:
        from cfrbench.compute import prefer_gpu

        prefer_gpu(gpu)
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
            connection.send(parcel(attempt(task, work)))
        except Interrupted as stop:
            with suppress(ConnectionError):  # the parent may be the one that was killed
                connection.send((stop, None))
            return
        if not connection.poll(REST_SECONDS):
            give_memory_back()  # a worker at rest takes nothing from those at work


def _follow_parent() -> None:
    """Should the parent be killed, stop as if asked to: nobody is left to use the results, or to stop this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)

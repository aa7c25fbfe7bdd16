"""What every executor needs: in which order stages can start, how a failure travels, and what it takes along."""

from __future__ import annotations

import heapq
import pickle
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cfrbench.artifact import LOG
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError, Interrupted, Skipped
from cfrbench.files import read_log
from cfrbench.store import scratch_folder
from cfrbench.wording import log_line

Work = Callable[[StageTask], None]
#: how a task ended, as it travels: None, or a failure and its cause
Parcel = tuple[CfrbenchError, BaseException | None] | None

#: of a dead stage's log, what its message repeats
TAIL_LINES = 3


class Died(CfrbenchError):
    """The process of a stage was killed, so another attempt may end better; what raises would only raise again."""


# ---------------------------------------------------------------------------------------------------------------------
# order


class Agenda:
    """Which tasks wait, which can start, which failed."""

    def __init__(self, tasks: Sequence[StageTask]) -> None:
        self.failures: dict[str, CfrbenchError] = {}
        self._waiting = {task.key: task for task in tasks}
        self._above = stages_above(tasks)
        # A need that is nobody's task is in the store already.
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[StageTask]] = {}
        for task in tasks:
            late = [key for key in task.needs if key in self._waiting and key not in self._missing]
            if late:
                raise ValueError(f"{task.title} ({task.key}) stands before what it needs: {', '.join(late)}")
            self._missing[task.key] = self._waiting.keys() & task.needs
            for key in self._missing[task.key]:
                self._dependents.setdefault(key, []).append(task)
        self._place = {task.key: place for place, task in enumerate(tasks)}
        self._ready: list[tuple[int, int, StageTask]] = []  # a heap: those of the longest chains first, then as given
        for task in tasks:
            if not self._missing[task.key]:
                self._make_ready(task)

    def take(self) -> StageTask | None:
        """The next task that can start, of the longest chain; None if each waits for a running one, or none is left.

        Fine-tuning begins first, then: four stages wait for it, while trainings without guidance fit in anywhere.
        """
        return self._waiting.pop(heapq.heappop(self._ready)[2].key) if self._ready else None

    def again(self, task: StageTask) -> None:
        """Put a task that was taken back: it is to be tried once more."""
        self._waiting[task.key] = task
        self._make_ready(task)

    def finish(self, task: StageTask, failure: CfrbenchError | None) -> None:
        """Note the end of a task; a failure takes along all that need it."""
        if failure is not None:
            self.failures[task.key] = failure
            self._skip(task.key, task)
            return
        for above in self._dependents.get(task.key, ()):
            self._missing[above.key].discard(task.key)
            if not self._missing[above.key] and above.key in self._waiting:
                self._make_ready(above)

    def _make_ready(self, task: StageTask) -> None:
        heapq.heappush(self._ready, (-self._above[task.key], self._place[task.key], task))

    def _skip(self, key: str, culprit: StageTask) -> None:
        for task in self._dependents.get(key, ()):
            if self._waiting.pop(task.key, None) is not None:
                self.failures[task.key] = skipped(task, culprit)
                self._skip(task.key, culprit)


def skipped(task: StageTask, culprit: StageTask) -> Skipped:
    """The failure of a task that was not begun."""
    return Skipped(f"{task.title} was skipped: it needs {culprit.title}, which failed.")


def with_skipped(tasks: Iterable[StageTask], failures: Mapping[str, CfrbenchError]) -> dict[str, CfrbenchError]:
    """``failures`` and, in place of whatever they say of it, a Skipped for each task that needs a failed one."""
    found = dict(failures)
    culprits: dict[str, StageTask] = {}
    for task in tasks:
        failed = [culprits[key] for key in task.needs if key in culprits]
        if failed:
            found[task.key] = skipped(task, failed[0])
        if task.key in found:
            culprits[task.key] = failed[0] if failed else task
    return found


def stages_above(tasks: Sequence[StageTask]) -> dict[str, int]:
    """By key, the number of stages in the longest chain that stands on a task; needs come before what needs them."""
    above = dict.fromkeys((task.key for task in tasks), 0)
    for task in reversed(tasks):
        for key in above.keys() & task.needs:
            above[key] = max(above[key], above[task.key] + 1)
    return above


def threads_of(tasks: Iterable[StageTask]) -> int:
    """The most CPU threads that a stage computes with, as its recipe says."""
    return max((int(t.recipe.get("settings", {}).get("compute", {}).get("threads", 1)) for t in tasks), default=1)


def devices_of(tasks: Iterable[StageTask]) -> set[str]:
    """The devices that recipes name; stages that do not say compute where those do that they stand on."""
    settings = (task.recipe.get("settings", {}) for task in tasks)
    return {str(each["compute"]["device"]) for each in settings if "compute" in each}


# ---------------------------------------------------------------------------------------------------------------------
# failures


class StageTraceback(Exception):
    """The traceback of a failed stage as text, chained to its error.

    Text, because live frames would keep the failed stage's tensors in memory, and cannot leave a worker.
    """

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def attempt(task: StageTask, work: Work) -> CfrbenchError | None:
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


def parcel(failure: CfrbenchError | None) -> Parcel:
    """A failure and its cause side by side, because pickling an exception drops its cause."""
    if failure is None:
        return None
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:  # a guest's exception may not survive the journey; its words do
        return CfrbenchError(str(failure)), failure.__cause__
    return failure, failure.__cause__


def unpacked(parcel: Parcel) -> CfrbenchError | None:
    """The failure in a parcel, its cause chained again; raises Interrupted if it is the wish to stop."""
    if parcel is None:
        return None
    failure, cause = parcel
    failure.__cause__ = cause
    if isinstance(failure, Interrupted):
        raise failure
    return failure


def death(task: StageTask, how: str, store: Path | None) -> Died:
    """The failure of a task whose process is gone, with the last lines of its log if the ``store`` has one."""
    log = store and store / scratch_folder(task.stage, task.key) / LOG
    tail = "; ".join(map(log_line, read_log(log)[-TAIL_LINES:])) if log else ""
    return Died(f"{task.title} failed: its process {how}. If memory ran out, use fewer jobs or a smaller preset; the "
                f"same command goes on from its last checkpoint.{f' Its log ends: {tail}.' * bool(tail)}")  # fmt: skip

"""What other processes do with stages, read from their logs in the store and told to this process's observers.

Executors whose workers run on other machines have no line to them but the store: a `Follower` reads what is new in the
logs of unfinished stages, and says how a stage ended once its executor knows that it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfrbench import registry
from cfrbench.agenda import death
from cfrbench.artifact import FAILED, LENGTH, LOG
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError
from cfrbench.store import Store, scratch_folder


class Follower:
    """Follows ``tasks`` in the store at ``root``; what their logs said before is not repeated."""

    def __init__(self, root: Path, tasks: Iterable[StageTask]) -> None:
        self.home = Store(root)
        self._tasks = {scratch_folder(task.stage, task.key).name: task for task in tasks}
        self._read = {name: _size(root / "partial" / name / LOG) for name in self._unfinished()}
        self._last: dict[str, Mapping[str, Any]] = {}  # by key, the latest event
        self._started: set[str] = set()

    def poll(self) -> None:
        """Tell observers which stages have begun and how far they are; of many new steps the last one."""
        for name in self._unfinished():
            self._tell(self._tasks[name], self.home.root / "partial" / name / LOG)

    def ended(self, task: StageTask, how: str) -> CfrbenchError | None:
        """How a stage ended of which nobody will write more: None if it is finished, else its failure.

        Its own words if it had any; else it Died, and ``how`` says what its executor knows, like "ended".
        """
        artifact = self.home.find(task.stage, task.key)
        if artifact is not None:
            self._tell(task, artifact.folder / LOG)
            registry.WATCHERS.hook.stage_finished(
                task=task, seconds=artifact.manifest["seconds"], values=artifact.manifest["summary"]
            )
            return None
        self._tell(task, self.home.root / scratch_folder(task.stage, task.key) / LOG)
        last = self._last.get(task.key, {})
        if last.get("event") == FAILED:
            return CfrbenchError(f"{task.title} failed with {last['kind']}: {last['error']} Its log is "
                                 f"{scratch_folder(task.stage, task.key) / LOG} in the store.")  # fmt: skip
        return death(task, how, self.home.root)

    def _unfinished(self) -> list[str]:
        return [name for name in os.listdir(self.home.root / "partial") if name in self._tasks]

    def _tell(self, task: StageTask, log: Path) -> None:
        hook, step = registry.WATCHERS.hook, None
        for event in self._news(task, log):
            self._last[task.key] = event
            if event["event"] == LENGTH and task.key not in self._started:
                self._started.add(task.key)
                hook.stage_started(task=task, folder=str(log.parent), total_steps=event["total"])
            elif event["event"] == "step":
                step = event
        if step is not None and task.key in self._started:
            values = {name: value for name, value in step.items() if name not in ("event", "time", "step")}
            hook.step_done(task=task, step=step["step"], values=values)

    def _news(self, task: StageTask, log: Path) -> list[dict[str, Any]]:
        """Whole lines of a log that have not been read."""
        name = scratch_folder(task.stage, task.key).name
        try:
            with log.open("rb") as file:
                file.seek(self._read.get(name, 0))
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:  # not begun, or finished since it was listed
            return []
        self._read[name] = self._read.get(name, 0) + len(whole) + (1 if whole else 0)
        events = [_event(line) for line in whole.splitlines()]
        return [event for event in events if event]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _event(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}  # torn by a kill
    return found if isinstance(found, dict) and "event" in found else {}

"""Runs stages as tasks of a Ray cluster: one that is there (``address``), or one of our own on this machine.

The whole graph is handed over at once, each task with the answers of those it needs as its arguments; Ray schedules.
Needs the extra: pip install 'cfrbench[ray]'. Importing this file imports no Ray; its usage statistics are switched off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cfrbench.agenda import Parcel, Work, attempt, death, parcel, stages_above, threads_of, unpacked, with_skipped
from cfrbench.checkpoint import Stop, graceful_stop
from cfrbench.config import Frozen
from cfrbench.contracts import Executor, StageTask
from cfrbench.errors import CfrbenchError, Interrupted, PluginError, Skipped
from cfrbench.following import Follower
from cfrbench.heap import keep_freed_memory
from cfrbench.hookspecs import hookimpl

#: how long running stages may take to save their state when the run is stopped
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.5


class Ray(Executor):
    """Tasks of a Ray cluster; every node must see the store under the same path."""

    name = "ray"

    class Config(Frozen):
        """Options of the Ray executor."""

        address: str | None = Field(None, description="of a running cluster, host:port or auto; None = one of our own")
        cpus: int | None = Field(None, ge=1, description="CPUs of a stage; None = compute.threads")
        gpus: float = Field(0.0, ge=0, description="GPUs of a stage; 0.5 lets two share one")
        memory_gb: float | None = Field(None, gt=0, description="memory that Ray sets aside for a stage")
        jobs: int | None = Field(None, ge=1, description="stages at a time in a cluster of our own; None = what fits")
        retries: int = Field(2, ge=0, description="further attempts of a stage whose worker or node was lost")

        @model_validator(mode="after")
        def _jobs_are_ours(self) -> Ray.Config:
            if self.address is not None and self.jobs is not None:
                raise ValueError("jobs limits a cluster of our own; on another one set cpus, gpus or memory_gb")
            return self

    config: Config

    def __init__(self, config: Any = None, store: Path | None = None) -> None:
        super().__init__(config, store)
        if find_spec("ray") is None:
            raise PluginError("The executor 'ray' needs Ray: pip install 'cfrbench[ray]'.")

    def run(self, tasks: Sequence[StageTask], work: Work) -> dict[str, CfrbenchError]:
        """Run every task; Interrupted passes through once running stages have saved their state."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A stage that asks for no GPU still sees those there are.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        cpus = self.config.cpus or threads_of(tasks)
        ours = not ray.is_initialized()
        if ours:
            self._start(self.config.jobs * cpus if self.config.jobs else None)
        try:
            with graceful_stop() as stop:
                return self._follow(tasks, self._hand_over(tasks, work, cpus), stop)
        finally:
            if ours:
                ray.shutdown()

    def _start(self, cpus: int | None) -> None:
        """Connect to the cluster, or start our own with so many CPUs; CfrbenchError with Ray's reason."""
        import ray

        try:
            ray.init(self.config.address, num_cpus=cpus, include_dashboard=False, log_to_driver=False,
                     logging_level=logging.ERROR)  # fmt: skip
        except Exception as error:  # Ray has no class of its own for these
            ray.shutdown()
            where = f"at {self.config.address} " if self.config.address else ""
            remedy = ("Start one with `ray start --head`, correct executor.ray.address, or leave it away" if where else
                      "Give the command again when this machine is less busy, or choose --executor local")  # fmt: skip
            reason = str(error).partition("\n")[0].rstrip(".")
            raise CfrbenchError(f"The Ray cluster {where}does not answer: {reason}. {remedy}.") from error

    def _hand_over(self, tasks: Sequence[StageTask], work: Work, cpus: int) -> dict[Any, StageTask]:
        """Give Ray every task, those of the longest chains first; tasks by what stands for their answers."""
        import ray

        config = self.config
        memory = None if config.memory_gb is None else int(config.memory_gb * 2**30)
        needed = {"num_cpus": cpus, "num_gpus": config.gpus, "memory": memory, "max_retries": config.retries}
        remote = ray.remote(_do)
        shared = ray.put(work)
        above = stages_above(tasks)
        refs: dict[str, Any] = {}
        for task in sorted(tasks, key=lambda task: -above[task.key]):
            needs = [refs[key] for key in task.needs if key in refs]
            refs[task.key] = remote.options(name=task.title, **needed).remote(shared, task, *needs)
        return {refs[task.key]: task for task in tasks}

    def _follow(
        self, tasks: Sequence[StageTask], waiting: dict[Any, StageTask], stop: Stop
    ) -> dict[str, CfrbenchError]:
        import ray

        follower = Follower(self.store, tasks) if self.store else None
        failures: dict[str, CfrbenchError] = {}
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=POLL_SECONDS)
                if follower:
                    follower.poll()
                for ref in ready:
                    task = waiting.pop(ref)
                    failure = self._answer(task, ref)
                    if failure is not None:
                        failures[task.key] = failure
                    elif follower:
                        follower.ended(task, "ended")
                if stop.requested:
                    raise stop.interrupted("between two stages")
        except Interrupted:
            for ref in waiting:
                ray.cancel(ref)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE_SECONDS)
            raise
        return with_skipped(tasks, failures)

    def _answer(self, task: StageTask, ref: Any) -> CfrbenchError | None:
        """How a task ended; raises Interrupted if it was asked to stop."""
        import ray

        try:
            return unpacked(ray.get(ref))
        except ray.exceptions.RayError as error:  # its worker or node was lost once too often, or one it needs was
            return death(task, f"was lost ({type(error).__name__})", self.store)


@hookimpl
def executors() -> list[type[Executor]]:
    """The Ray executor."""
    return [Ray]


def _do(work: Work, task: StageTask, *needs: Parcel) -> Parcel:
    """One stage, in a worker; ``needs`` are the answers of those it stands on."""
    if any(need is not None for need in needs):
        return Skipped(f"{task.title} was skipped."), None  # the driver says because of which
    keep_freed_memory()
    try:
        return parcel(attempt(task, work))
    except Interrupted as stop:
        return stop, None

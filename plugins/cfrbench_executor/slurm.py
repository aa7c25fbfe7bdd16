"""Runs stages as jobs of a SLURM cluster, through submitit (MIT).

The whole graph is queued at once and SLURM does the scheduling. A job is a run of stages that stand on each other alone
(train, predict, score), so that a node loads its data once; jobs that wait for the same others are one array. Jobs
outlive the process that queued them: given again, the command finds them in the queue and waits for the same ones.

Needs the extra: pip install 'cfrbench[slurm]'.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from cfrbench.agenda import Died, Work, attempt, threads_of, with_skipped
from cfrbench.checkpoint import Stop, graceful_stop
from cfrbench.config import Frozen
from cfrbench.contracts import Executor, StageTask
from cfrbench.errors import CfrbenchError, Interrupted, PluginError
from cfrbench.files import JsonLog, read_log
from cfrbench.following import Follower
from cfrbench.heap import keep_freed_memory
from cfrbench.hookspecs import hookimpl

#: SLURM's MaxArraySize is 1001 unless a cluster sets another
ARRAY_SIZE = 1000

Segment = tuple[StageTask, ...]


class Slurm(Executor):
    """Jobs of a SLURM cluster; every node must see the store under the same path."""

    name = "slurm"

    class Config(Frozen):
        """Options of the SLURM executor; those that are not set are left to the cluster's defaults."""

        partition: str | None = None
        account: str | None = None
        qos: str | None = None
        constraint: str | None = None
        minutes: int = Field(1440, ge=1, description="time limit of a job; it saves, and queues itself again before it")
        memory_gb: float | None = Field(None, gt=0, description="memory of a job")
        cpus: int | None = Field(None, ge=1, description="CPUs of a job; None = compute.threads")
        gpus: int = Field(0, ge=0, description="GPUs of a job")
        jobs: int = Field(256, ge=1, description="jobs of one array that run at the same time")
        retries: int = Field(2, ge=0, description="further attempts of a stage whose job was killed")
        grace_seconds: int = Field(90, ge=1, description="how long before its time limit a job is asked to save")
        poll_seconds: float = Field(5.0, gt=0, description="how often the queue is looked at")
        setup: tuple[str, ...] = Field((), description="shell lines before Python starts, e.g. 'module load cuda'")
        extra: dict[str, Any] = Field({}, description="more options of sbatch, e.g. {nice = 100}")

    config: Config

    def __init__(self, config: Any = None, store: Path | None = None) -> None:
        super().__init__(config, store)
        if find_spec("submitit") is None:
            raise PluginError("The executor 'slurm' needs submitit: pip install 'cfrbench[slurm]'.")
        if shutil.which("sbatch") is None:
            raise PluginError("The executor 'slurm' needs SLURM's commands (sbatch, squeue, srun) on PATH. Log in to a "
                              "node from which jobs are submitted, or choose --executor local.")  # fmt: skip
        self.folder = (store or Path.cwd()) / "jobs" / self.name
        self._book = self.folder / "jobs.jsonl"  # which job was queued for which stages, by whomever

    def run(self, tasks: Sequence[StageTask], work: Work) -> dict[str, CfrbenchError]:
        """Queue every task, wait for all; a stop leaves the jobs in the queue."""
        self.folder.mkdir(parents=True, exist_ok=True)
        follower = Follower(self.folder.parents[1], tasks)
        failures: dict[str, CfrbenchError] = {}
        remaining = list(tasks)
        with graceful_stop() as stop:
            for _ in range(1 + self.config.retries):
                found = self._round(remaining, work, follower, stop)
                died = {key for key, failure in found.items() if isinstance(failure, Died)}
                failures = {key: f for key, f in failures.items() if key not in {t.key for t in remaining}} | found
                beyond_help = with_skipped(tasks, {k: f for k, f in failures.items() if k not in died})
                remaining = [task for task in remaining if task.key in died and task.key not in beyond_help]
                if not remaining:
                    break
        return with_skipped(tasks, failures)

    def cancel(self, keys: Collection[str]) -> str:
        """Take jobs that were queued for these stages out of the queue; running ones save first."""
        if shutil.which("scancel") is None:
            return ""
        jobs = {event["job"] for event in read_log(self._book) if not set(event["keys"]).isdisjoint(keys)}
        alive = sorted(jobs & _queued(jobs))
        for start in range(0, len(alive), ARRAY_SIZE):
            subprocess.run(["scancel", *alive[start : start + ARRAY_SIZE]], check=True, capture_output=True)
        return f"{len(alive)} SLURM jobs were taken out of the queue" if alive else ""

    # -- one round ----------------------------------------------------------------------------------------------------

    def _round(
        self, tasks: Sequence[StageTask], work: Work, follower: Follower, stop: Stop
    ) -> dict[str, CfrbenchError]:
        """Queue what is not queued, wait until nothing is; failures by key, Died where a job ended without a word."""
        queued = self._queue(segments(tasks), work)
        failures: dict[str, CfrbenchError] = {}
        waiting = dict(queued)
        while waiting:
            self._pause(stop)
            follower.poll()
            alive = _queued(set(waiting))
            for job in [job for job in waiting if job not in alive]:
                for task in waiting.pop(job):
                    failure = follower.ended(task, f"ended with SLURM job {job}, see {self._stderr(job)}")
                    if failure is not None:
                        failures[task.key] = failure
        return failures

    def _pause(self, stop: Stop) -> None:
        until = time.monotonic() + self.config.poll_seconds
        while time.monotonic() < until and not stop.requested:
            time.sleep(0.1)
        if stop.requested:
            raise Interrupted(f"Stopped by {stop.signal_name}. What is queued goes on without this command: look with "
                              "`cfrbench status`, end it with `cfrbench cancel`, or give the command again to wait for "
                              "it.")  # fmt: skip

    def _stderr(self, job: str) -> Path:
        return self.folder / "logs" / f"{job}_0_log.err"

    # -- the queue ----------------------------------------------------------------------------------------------------

    def _queue(self, chains: Sequence[Segment], work: Work) -> dict[str, Segment]:
        """Queue each segment behind those it needs, arrays of those that need the same; segments by job."""
        known = {key: event["job"] for event in read_log(self._book) for key in event["keys"]}
        alive = _queued(set(known.values()))
        job_of = {key: job for key, job in known.items() if job in alive}
        found: dict[str, list[StageTask]] = {}
        groups: dict[tuple[str, ...], list[Segment]] = {}
        ours = {task.key for chain in chains for task in chain}
        for chain in chains:
            if chain[-1].key in job_of:
                found.setdefault(job_of[chain[-1].key], []).extend(chain)
            else:
                groups.setdefault(tuple(sorted(ours.intersection(chain[0].needs))), []).append(chain)
        for needs, members in groups.items():
            for start in range(0, len(members), ARRAY_SIZE):
                part = members[start : start + ARRAY_SIZE]
                for job, chain in zip(self._submit(part, work, {job_of[key] for key in needs}), part, strict=True):
                    found[job] = list(chain)
                    job_of |= {task.key: job for task in chain}
        return {job: tuple(chain) for job, chain in found.items()}

    def _submit(self, chains: Sequence[Segment], work: Work, behind: Iterable[str]) -> list[str]:
        """Queue these segments as one array; the numbers of their jobs, written down at once."""
        import submitit

        executor = submitit.SlurmExecutor(folder=self.folder / "logs")
        executor.update_parameters(**self._parameters(chains, behind))
        try:
            jobs = [job.job_id for job in executor.map_array(_Job(work), chains)]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise CfrbenchError(f"SLURM refused a job: {str(error).strip()} Correct executor.slurm.* and give the same "
                                "command again: what is queued or finished is kept.") from error  # fmt: skip
        log = JsonLog(self._book)
        for job, chain in zip(jobs, chains, strict=True):
            log.write("job", job=job, keys=[task.key for task in chain])
        log.close()
        return jobs

    def _parameters(self, chains: Sequence[Segment], behind: Iterable[str]) -> dict[str, Any]:
        """What sbatch is told, in submitit's names."""
        config = self.config
        names = {stage: None for chain in chains for stage in (task.stage for task in chain)}
        asked = {
            "job_name": f"cfrbench-{'-'.join(names)}",
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "time": config.minutes,
            "mem": None if config.memory_gb is None else f"{int(config.memory_gb * 1024)}M",
            "cpus_per_task": config.cpus or threads_of(task for chain in chains for task in chain),
            "gpus_per_node": config.gpus or None,
            "array_parallelism": config.jobs,
            "signal_delay_s": config.grace_seconds,
            "setup": list(config.setup) or None,
            "dependency": ":".join(["afterok", *sorted(behind)]) if behind else None,
            # A job whose needs failed leaves the queue; one whose node is taken away comes back.
            "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True, **config.extra},
        }
        return {name: value for name, value in asked.items() if value is not None}


@hookimpl
def executors() -> list[type[Executor]]:
    """The SLURM executor."""
    return [Slurm]


def segments(tasks: Sequence[StageTask]) -> list[Segment]:
    """The tasks, needs first, as runs in which each stands on the one before it alone, and nothing else does."""
    ours = {task.key for task in tasks}
    above: dict[str, int] = {}
    for task in tasks:
        for key in ours.intersection(task.needs):
            above[key] = above.get(key, 0) + 1
    found: list[list[StageTask]] = []
    ends: dict[str, list[StageTask]] = {}  # by key of a segment's last task
    for task in tasks:
        needs = ours.intersection(task.needs)
        only = next(iter(needs)) if len(needs) == 1 else ""
        segment = ends.pop(only, None) if above.get(only) == 1 else None
        if segment is None:
            segment = []
            found.append(segment)
        segment.append(task)
        ends[task.key] = segment
    return [tuple(segment) for segment in found]


def _queued(jobs: Collection[str]) -> set[str]:
    """Which of these jobs wait or run; all of them if the controller does not answer, for it may be restarting."""
    done = subprocess.run(["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return set(jobs) if done.returncode else set(jobs) & set(done.stdout.split())


@dataclass(frozen=True)
class _Job:
    """What a node runs: one segment, stage by stage."""

    work: Work

    def __call__(self, chain: Segment) -> None:
        """Do each stage; a failure is the job's, so that SLURM drops the jobs behind it.

        SIGTERM (preemption, scancel) and SIGUSR2 (`grace_seconds` before the time limit) let the stage save its state;
        then the job queues itself again, unless it was cancelled.
        """
        keep_freed_memory()
        stop: Stop | None = None
        try:
            with graceful_stop() as stop:
                signal.signal(signal.SIGUSR2, stop)
                for task in chain:
                    failure = attempt(task, self.work)
                    if failure is not None:
                        raise failure
        except Interrupted:
            # `cfrbench cancel` asks without a signal, and what scancel ends runs no more in the eyes of the controller.
            if stop is not None and stop.signal_name in ("SIGTERM", "SIGUSR2"):
                _requeue_running()
            raise

    def checkpoint(self, chain: Segment) -> Any:
        """For submitit, should a signal come before the first stage begins: the same job once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, chain)


def _requeue_running() -> None:
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{number}" if array else os.environ["SLURM_JOB_ID"]
    state = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], capture_output=True, text=True,
                           check=False).stdout.strip()  # fmt: skip
    if state == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)

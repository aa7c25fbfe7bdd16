"""What the executors of clusters decide by themselves, without a cluster: jobs, dependencies, missing packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cfrbench import registry
from cfrbench.agenda import with_skipped
from cfrbench.config import validate
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError, ConfigError, PluginError
from cfrbench_executor import ray as ray_executor
from cfrbench_executor import slurm as slurm_executor
from cfrbench_executor.ray import Ray
from cfrbench_executor.slurm import Slurm, segments


def task(key: str, *needs: str, stage: str = "train", **recipe: Any) -> StageTask:
    return StageTask(stage, key, f"{stage} {key}", needs, recipe)


GRAPH = [
    task("tune"), task("pseudo", "tune"), task("base"), task("predict", "base"), task("score", "predict"),
    task("twin", "pseudo"), task("twin2", "twin"), task("labels", "pseudo"), task("late", "elsewhere"),
]  # fmt: skip


def test_a_job_is_a_run_of_stages_that_nobody_else_waits_for() -> None:
    found = [[task.key for task in segment] for segment in segments(GRAPH)]
    assert found == [["tune", "pseudo"], ["base", "predict", "score"], ["twin", "twin2"], ["labels"], ["late"]]


def test_segments_hold_every_task_once_and_needs_come_first() -> None:
    both = [task("a"), task("b"), task("c", "a", "b"), task("d", "c"), task("e", "d"), task("f", "d")]
    found = segments(both)
    assert sorted(t.key for segment in found for t in segment) == list("abcdef")
    assert [[t.key for t in segment] for segment in found] == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Slurm executor whose queue is a list; nothing is submitted."""
    monkeypatch.setattr(slurm_executor.shutil, "which", lambda name: f"/usr/bin/{name}")

    def make(**options: Any) -> Slurm:
        return Slurm(validate(Slurm.Config, options, "the options of executor.slurm"), tmp_path)

    return make


def test_jobs_that_wait_for_the_same_are_one_array_behind_it(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[tuple[list[list[str]], set[str]]] = []

    def submit(self: Slurm, chains: Any, work: Any, behind: set[str]) -> list[str]:
        submitted.append(([[t.key for t in chain] for chain in chains], set(behind)))
        return [f"{len(submitted)}_{number}" for number in range(len(chains))]

    monkeypatch.setattr(Slurm, "_submit", submit)
    monkeypatch.setattr(slurm_executor, "_queued", lambda jobs: set(jobs))
    jobs = slurm()._queue(segments(GRAPH), print)
    assert submitted == [
        ([["tune", "pseudo"], ["base", "predict", "score"], ["late"]], set()),
        ([["twin", "twin2"], ["labels"]], {"1_0"}),
    ]
    assert {job: [t.key for t in chain] for job, chain in jobs.items()}["2_0"] == ["twin", "twin2"]


def test_what_an_earlier_command_queued_is_waited_for_and_not_queued_again(
    slurm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = slurm()
    executor.folder.mkdir(parents=True)
    log = slurm_executor.JsonLog(executor._book)
    log.write("job", job="7_0", keys=["tune", "pseudo"])
    log.write("job", job="7_1", keys=["base", "predict", "score"])
    log.close()
    behind: list[set[str]] = []
    monkeypatch.setattr(Slurm, "_submit", lambda self, chains, work, needs: behind.append(set(needs)) or
                        [f"{len(behind)}0_{n}" for n in range(len(chains))])  # fmt: skip
    monkeypatch.setattr(slurm_executor, "_queued", lambda jobs: {"7_0"} & set(jobs))  # the other one is over
    jobs = executor._queue(segments(GRAPH), print)
    assert [t.key for t in jobs["7_0"]] == ["tune", "pseudo"]
    assert behind == [set(), {"7_0"}]


def test_options_reach_sbatch(slurm: Any) -> None:
    import submitit.slurm.slurm as theirs

    executor = slurm(partition="gpu", minutes=90, memory_gb=1.5, gpus=1, grace_seconds=30, extra={"nice": 100})
    chains = segments([task("a", settings={"compute": {"threads": 4}}), task("b", "a", stage="predict")])
    script = theirs._make_sbatch_string("run", executor.folder, **executor._parameters(chains, {"8_1", "5"}))
    for line in ("--partition=gpu", "--time=90", "--mem=1536M", "--gpus-per-node=1", "--signal=USR2@30", "--nice=100",
                 "--cpus-per-task=4", "--dependency=afterok:5:8_1", "--kill-on-invalid-dep=yes", "--requeue",
                 "--job-name=cfrbench-train-predict"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, script


@pytest.mark.parametrize(("cls", "module", "extra"), [(Ray, ray_executor, "ray"), (Slurm, slurm_executor, "slurm")])
def test_a_missing_extra_gives_the_line_that_installs_it(
    cls: Any, module: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=rf"pip install 'cfrbench\[{extra}\]'"):
        cls()


def test_slurm_without_its_commands_says_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_executor.shutil, "which", lambda name: None)
    with pytest.raises(PluginError, match="sbatch"):
        Slurm()


def test_jobs_at_a_time_belong_to_a_ray_cluster_of_our_own() -> None:
    with pytest.raises(ConfigError, match="cluster of our own"):
        validate(Ray.Config, {"address": "auto", "jobs": 3}, "the options of executor.ray")


@pytest.mark.parametrize(
    ("address", "words"),
    [("auto", r"at auto does not answer: none found\. Start one"), (None, "choose --executor local")],
)
def test_a_ray_cluster_that_does_not_answer_is_one_paragraph(
    address: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[bool] = []

    def init(*_: Any, **__: Any) -> None:
        raise ConnectionError("none found.\nlong story")

    module = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: stopped.append(True))
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setattr(ray_executor, "find_spec", lambda name: object())
    with pytest.raises(CfrbenchError, match=words):
        Ray(validate(Ray.Config, {"address": address}, "test")).run(GRAPH, print)
    assert stopped == [True]


def test_importing_the_executors_imports_no_scheduler_and_runs_nothing() -> None:
    script = ("import sys, threading\nfrom cfrbench import registry\n"
              "for name in ('local', 'ray', 'slurm'): registry.load('executor', name)\n"
              "print({'ray', 'submitit', 'cloudpickle'} & set(sys.modules), threading.active_count())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set() 1\n"


def test_they_are_registered() -> None:
    assert registry.load("executor", "ray") is Ray
    assert registry.load("executor", "slurm") is Slurm


def test_a_failure_names_the_one_that_began_it_all_along_the_chain() -> None:
    failures = with_skipped(GRAPH, {"tune": CfrbenchError("no memory"), "twin2": CfrbenchError("gone")})
    assert set(failures) == {"tune", "pseudo", "twin", "twin2", "labels"}
    assert str(failures["tune"]) == "no memory"
    assert str(failures["twin2"]) == "train twin2 was skipped: it needs train tune, which failed."

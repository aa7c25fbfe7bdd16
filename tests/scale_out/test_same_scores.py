"""The same sweep through local workers, a Ray cluster of two nodes and a real SLURM: scores equal bit for bit."""

from __future__ import annotations

import importlib.util
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfrbench.files import read_log
from tests.scale_out import slurm_cluster
from tests.scale_out.sweeps import scores, sweep

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each on this machine, the driver connected."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # they share this machine with nobody who should come first
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_on_two_nodes_one_of_which_is_taken_away(
    tmp_path: Path, reference: list[dict[str, Any]], ray_cluster: Any
) -> None:
    second = ray_cluster.add_node(num_cpus=1)
    store = tmp_path / "store"
    removed: list[str] = []

    def remove_once_it_works() -> None:
        while len(running(store)) < 2:  # one stage on each node
            time.sleep(0.02)
        removed.extend(running(store))
        ray_cluster.remove_node(second, allow_graceful=False)

    saboteur = threading.Thread(target=remove_once_it_works)
    saboteur.start()
    result = sweep(store, "ray", address=ray_cluster.address)
    saboteur.join()
    assert scores(result) == reference
    begun = {log.parent.name: [e["event"] for e in read_log(log)].count("begin") for log in store.glob("*/*/log.jsonl")}
    assert sorted(begun[key] for key in removed) == [1, 2], "the lost node's stage was to be begun twice, no other"


def running(store: Path) -> list[str]:
    """Keys of stages that somebody holds a lease of and has begun."""
    return [
        lease.stem
        for lease in (store / "locks").glob("*.lease")
        if any(len(read_log(log)) > 1 for log in (store / "partial").glob(f"*-{lease.stem}/log.jsonl"))
    ]


@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed (extra slurm)")
def test_slurm_with_a_preempted_job(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    store, folder = tmp_path / "store", tmp_path / "cluster"
    folder.mkdir()
    preempted: list[str] = []

    def preempt() -> None:
        while not running(store):
            time.sleep(0.1)
        preempted.append(subprocess.run(
            ["srun", "--partition=urgent", "--ntasks=2", "--overcommit", "--exclusive", "sleep", "1"],
            capture_output=True, text=True, check=False,
        ).stderr)  # fmt: skip

    with slurm_cluster.cluster(folder):
        rival = threading.Thread(target=preempt)
        rival.start()
        result = sweep(store, "slurm", poll_seconds=0.5, partition="work")
        rival.join()
    assert scores(result) == reference
    ctld = (folder / "slurmctld.log").read_text()
    assert "preempted" in ctld, ctld[-2000:]
    book = read_log(store / "jobs" / "slurm" / "jobs.jsonl")
    assert len({event["job"].split("_")[0] for event in book}) < len(book), "no job array was queued"

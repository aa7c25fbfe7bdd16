"""A SLURM cluster of one node with two CPUs, its daemons started by hand (Debian's slurm-wlm, munge)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scancel", "scontrol")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ctld}
SlurmdPort={slurmd}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=10
MinJobAge=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=work Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20 OverSubscribe=NO
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9 OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"SLURM is not installed (apt-get install slurm-wlm munge): no {', '.join(absent)}"
    return "SLURM's daemons need root here" if os.getuid() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _daemon(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster with everything it writes in ``folder``; the environment that its commands need."""
    folder.chmod(0o755)  # munged wants no folder above its socket to be open to others
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, ctld=_free_port(), slurmd=_free_port()))
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    with ExitStack() as stack:
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                 f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
                 f"--log-file={folder}/munged.log"]  # fmt: skip
        before = os.environ.copy()
        os.environ.update(environment)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        stack.enter_context(_daemon(munge, folder / "munged.out"))
        _until(lambda: (folder / "munge.socket").exists(), "munged makes no socket", folder)
        stack.enter_context(_daemon(["slurmctld", "-D", "-c", "-f", str(conf)], folder / "slurmctld.out"))
        stack.enter_context(_daemon(["slurmd", "-D", "-c", "-f", str(conf), "-N", host], folder / "slurmd.out"))
        _until(lambda: "idle" in _sinfo(), "the node does not come up", folder)
        yield environment


def _sinfo() -> str:
    done = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, check=False)
    return done.stdout


def _until(reached: object, complaint: str, folder: Path) -> None:
    assert callable(reached)
    for _ in range(600):
        if reached():
            return
        time.sleep(0.1)
    logs = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in folder.glob("*.log"))
    raise AssertionError(f"{complaint}\n{logs}")

"""What computed a result: versions, processor, memory. Reads metadata only, so it imports nothing heavy."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

from cfrbench import __version__
from cfrbench.heap import give_freed_memory_back

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def environment() -> dict[str, Any]:
    """Versions and hardware as they stand in every manifest; equality of numbers is promised within one of these."""
    from importlib import metadata  # it brings a parser of e-mail, which help should not pay

    return {
        "cfrbench": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "accelerator": _accelerator(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def room_for_jobs(threads: int, gib_each: float = 0.0) -> int:
    """How many processes of ``threads`` threads and ``gib_each`` of memory this machine takes at once; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = cores // threads
    return max(1, min(jobs, int(available_mib() / (gib_each * 1024))) if gib_each else jobs)


def available_mib() -> float:
    """Memory that new processes can have without swapping."""
    import psutil

    free: float = psutil.virtual_memory().available / 2**20
    return free


def computes_bf16() -> bool:
    """Whether this CPU multiplies in bf16 by itself; False where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _cuda() -> Any:
    # Asked only where a stage has used it: neither torch nor a CUDA context is worth loading for a manifest.
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _accelerator() -> str | None:
    cuda = _cuda()
    return None if cuda is None else str(cuda.get_device_name())


def give_memory_back() -> None:
    """Give what this process has freed back to the system and to the GPU, for others may need it."""
    give_freed_memory_back()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start new high-water marks of resident memory, where the system has such a reset (Linux), and of GPU memory.

    What was freed is given back first, so that the marks do not depend on what this process did before.
    """
    give_memory_back()
    if (cuda := _cuda()) is not None:
        for index in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(index)
    try:
        _RESET.write_text("5")
    except OSError:
        return  # elsewhere the mark belongs to the whole process; `peak_mib` is then an upper bound


def peak_gpu_mib() -> float | None:
    """Most memory that this process has reserved on one GPU since `reset_peak_memory`; None if it has used none.

    CUDA's context comes on top. Reserved, not allocated: that is what others cannot have.
    """
    cuda = _cuda()
    if cuda is None:
        return None
    most: int = max(cuda.max_memory_reserved(index) for index in range(cuda.device_count()))
    return round(most / 2**20, 1)


def peak_mib() -> float:
    """Highest resident memory in MiB since `reset_peak_memory`, or since the process began."""
    try:
        # The name of a process is cut off at 15 bytes, wherever that is in a character.
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return round(int(fields["VmHWM"].split()[0]) / 1024, 1)
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)

"""What computed a result: versions, processor, memory. Reads metadata only, so it imports nothing heavy."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cfrbench import __version__

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def environment() -> dict[str, Any]:
    """Versions and hardware as they stand in every manifest; equality of numbers is promised within one of these."""
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


def _accelerator() -> str | None:
    # Asked only where a stage has used one: neither torch nor a CUDA context is worth loading for a manifest.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    name: str = torch.cuda.get_device_name()
    return name


def reset_peak_memory() -> None:
    """Start a new high-water mark of resident memory, where the system has such a reset (Linux)."""
    try:
        _RESET.write_text("5")
    except OSError:
        return  # elsewhere the mark belongs to the whole process; `peak_mib` is then an upper bound


def peak_mib() -> float:
    """Highest resident memory in MiB since `reset_peak_memory`, or since the process began."""
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
        return round(int(fields["VmHWM"].split()[0]) / 1024, 1)
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)

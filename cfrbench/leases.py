"""Who works on a stage: a small file beside its lock that its holder renews, readable from every machine.

The system's lock (``flock``) is enough among processes of one kernel: it goes with its holder. Between machines it may
mean nothing (a network file system without lock service), or outlive its holder. So the holder of a lock also keeps a
lease, ``{"host", "pid", "kernel", "token", "since", "beat"}``, and counts ``beat`` up every `BEAT_SECONDS`. Whoever
finds the lease of another kernel waits as long as the count moves, and takes it over when it has stood still for
`LEASE_SECONDS` of the finder's own clock: times of two machines are never compared.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

BEAT_SECONDS = 3.0
LEASE_SECONDS = 30.0
POLL_SECONDS = 0.2

_logger = logging.getLogger(__name__)


@cache
def kernel() -> str:
    """What all processes of this machine share, those in containers too, until it is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


class Lease:
    """A lease that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beat = 0
        self._about = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel(),
                       "token": secrets.token_hex(8), "since": round(time.time(), 3)}  # fmt: skip

    def line(self) -> bytes:
        """The file's content; its length never changes, so that it can be written over."""
        return (json.dumps(self._about | {"beat": f"{self._beat:012d}"}) + "\n").encode()

    def mine(self) -> bool:
        """Whether the file is still this holder's."""
        found = read(self.path)
        return found is not None and found.get("token") == self._about["token"]

    def beat(self) -> bool:
        """Renew it; False if it belongs to another by now, as after a long sleep of this machine."""
        if not self.mine():
            return False
        self._beat += 1
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, self.line(), 0)
        finally:
            os.close(descriptor)
        return True

    def drop(self) -> None:
        """Give it back."""
        _HEART.forget(self)
        if self.mine():
            self.path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """What a lease says; None if there is none, an empty dict if it is being written."""
    content = _content(path)
    return None if content is None else _said(content)


def _content(path: Path) -> bytes | None:
    """The bytes of a lease; None if there is none, for its holder may drop it at any moment."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _said(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def take(path: Path, waiting: Callable[[], None]) -> Lease:
    """Hold the lease at ``path``; the caller holds the system's lock of the same thing.

    ``waiting`` is called again and again while the holder on another machine may be alive; it may raise.
    """
    while True:
        lease = _create(path)
        if lease is not None:
            return lease
        dead = _dead(path, waiting)
        if dead is not None:
            _bury(path, dead)


def take_if_free(path: Path) -> Lease | None:
    """`take` without waiting: None if a process of another machine holds it, or died a moment ago."""
    lease = _create(path)
    content = _content(path) if lease is None else None
    if content is not None and _said(content).get("kernel") == kernel():
        _bury(path, content)
        lease = _create(path)
    return lease


def _create(path: Path) -> Lease | None:
    lease = Lease(path)
    try:
        with path.open("xb") as file:  # exclusive on network file systems too
            file.write(lease.line())
    except FileExistsError:
        return None
    _HEART.remember(lease)
    return lease


def _dead(path: Path, waiting: Callable[[], None]) -> bytes | None:
    """Watch a lease until its holder is known to be dead (its last content), or it has gone (None)."""
    try:
        seen = path.read_bytes()
        # On this kernel a living holder would have kept us from the system's lock.
        if _said(seen).get("kernel") == kernel():
            return seen
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until:
            waiting()
            time.sleep(POLL_SECONDS)
            now = path.read_bytes()
            if now != seen:
                seen, until = now, time.monotonic() + LEASE_SECONDS
    except FileNotFoundError:
        return None
    _logger.warning("%s stood still for %.0f s: its holder is taken for dead", path, LEASE_SECONDS)
    return seen


def _bury(path: Path, dead: bytes) -> None:
    """Take a dead lease away. One finder at a time looks and removes, so none takes the lease of a faster one."""
    spade = path.with_name(f"{path.name}.bury")
    try:
        spade.open("xb").close()
    except FileExistsError:
        _wait_for(spade)
        return
    try:
        with suppress(FileNotFoundError):
            if path.read_bytes() == dead:
                path.unlink()
    finally:
        spade.unlink(missing_ok=True)


def _wait_for(spade: Path) -> None:
    """Wait until another finder is done; a spade that lies there for `LEASE_SECONDS` is that of one who was killed."""
    until = time.monotonic() + LEASE_SECONDS
    while spade.exists():
        if time.monotonic() > until:
            spade.unlink(missing_ok=True)
        time.sleep(POLL_SECONDS / 10)


class _Heart:
    """One thread per process that renews all its leases."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def remember(self, lease: Lease) -> None:
        """Renew this lease from now on."""
        with self._guard:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()

    def forget(self, lease: Lease) -> None:
        """Renew it no more."""
        with self._guard:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with self._guard:
                leases = list(self._leases)
            for lease in leases:
                try:
                    held = lease.beat()
                except OSError as error:  # a disk that is away for a moment: a lease bears some of that
                    _logger.warning("%s could not be renewed: %s", lease.path, error)
                    continue
                if not held and lease in self._leases:
                    _logger.warning("%s was taken over by another process", lease.path)
                    self.forget(lease)


_HEART = _Heart()

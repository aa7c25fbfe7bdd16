"""A finished stage on disk, and one that is being computed. `cfrbench.store` says where they lie and who may write."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench.config import digest
from cfrbench.errors import StoreError, UsageError
from cfrbench.files import JsonLog, plain, read_json, read_log, sha256_file, storage_errors, sync, write_json
from cfrbench.machine import environment, peak_gpu_mib, peak_mib

if TYPE_CHECKING:
    from cfrbench.contracts import StageTask

MANIFEST, LOG = "manifest.json", "log.jsonl"
#: the file of a finished scoring
SCORES = "scores.parquet"
#: events of a log that others look for: an attempt begins, says how many steps it has, fails
BEGIN, LENGTH, FAILED = "begin", "length", "failed"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_KEY = re.compile(r"[A-Za-z0-9_]+")
_REMEDY = "It is set aside in the store's folder 'damaged'; give the same command again to compute it anew."


class Damaged(StoreError):
    """An artifact does not match its manifest; it can be computed again."""


def component(name: str) -> str:
    """Return ``name`` if it is one harmless path component: no separator, no leading dot, nothing that escapes."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"'{name}' cannot name something in a store. Use letters, digits, '-', '_', '+' and '.', "
                         "beginning with a letter or a digit.")  # fmt: skip
    return name


def checked_key(key: str) -> str:
    """Return ``key`` if it looks like a hash: letters, digits and '_', so that STAGE-KEY can be taken apart again."""
    if not _KEY.fullmatch(key):
        raise UsageError(f"'{key}' cannot be the key of a stage. A key is a hash: letters and digits.")
    return key


# ---------------------------------------------------------------------------------------------------------------------
# finished


@dataclass(frozen=True)
class Artifact:
    """A finished stage, read-only. ``manifest``: what it is, what it was made from, on what, and how long it took."""

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False, compare=False)
    inode: int = field(repr=False, compare=False)
    set_aside: Callable[[Path, int, str], None] = field(repr=False, compare=False)

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return str(self.manifest["stage"])

    @property
    def key(self) -> str:
        """Hash of everything it depends on."""
        return str(self.manifest["key"])

    @property
    def files(self) -> list[str]:
        """Names of its files, sorted."""
        return sorted(self.manifest["files"])

    def path(self, name: str) -> Path:
        """The file ``name``, its checksum verified once per process; Damaged if it does not fit."""
        if name not in self.manifest["files"]:
            raise StoreError(f"The artifact {self.folder} holds no file '{name}', only {', '.join(self.files)}. It may "
                             "come from another version: remove it and give the same command again.")  # fmt: skip
        path = self.folder / name
        try:
            _verify(path, self.manifest["files"][name]["sha256"])
        except Damaged as damage:
            self.set_aside(self.folder, self.inode, str(damage))
            raise
        return path

    def verify(self) -> None:
        """Check every file; Damaged if one does not fit."""
        for name in self.files:
            self.path(name)


def open_artifact(folder: Path, set_aside: Callable[[Path, int, str], None]) -> Artifact | None:
    """The artifact in ``folder``, None if there is no such folder; Damaged if manifest or sizes do not fit."""
    with storage_errors("read", folder):
        if not folder.is_dir():
            return None
        inode = folder.stat().st_ino
        try:
            manifest = read_json(folder / MANIFEST)
            reason = _mismatch(folder, manifest)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            reason = f"its manifest is missing or unreadable ({type(error).__name__}: {error})"
    if reason is not None:
        message = f"The artifact {folder} is damaged: {reason}. {_REMEDY}"
        set_aside(folder, inode, message)
        raise Damaged(message)
    return Artifact(folder, manifest, inode, set_aside)


def _mismatch(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why a manifest does not fit the folder it lies in, or None."""
    if manifest["seal"] != _seal(manifest):
        return "its manifest was changed after it was written"
    if (manifest["stage"], manifest["key"]) != (folder.parent.name, folder.name):
        return f"its manifest belongs to {manifest['stage']}/{manifest['key']}"
    for name, entry in manifest["files"].items():
        path = folder / component(name)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def _seal(manifest: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in manifest.items() if name != "seal"})


_verified: set[tuple[str, int, int, str]] = set()


def _verify(path: Path, expected: str) -> None:
    try:
        stat = path.stat()
        # Inode and time tell a file that was checked from one that took its place.
        token = (str(path), stat.st_ino, stat.st_mtime_ns, expected)
        if token in _verified:
            return
        found = sha256_file(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from error
    if found != expected:
        raise Damaged(f"{path} was changed after it was written: its SHA-256 begins with {found[:12]}, the manifest "
                      f"says {expected[:12]}. {_REMEDY}")  # fmt: skip
    _verified.add(token)


# ---------------------------------------------------------------------------------------------------------------------
# being computed


class Draft:
    """A stage being computed: ``folder`` outlives kills, `path` names files of the artifact, ``log`` is its log.

    summary: a few values worth seeing without opening the files; they go into the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.summary: dict[str, Any] = {}
        with storage_errors("begin a stage in", folder):
            # What a killed attempt left of its output is of unknown length; its log and checkpoints are not.
            if self.output.exists():
                shutil.rmtree(self.output)
            self.output.mkdir(parents=True)
        self.log = JsonLog(folder / LOG)
        try:
            self.log.write(BEGIN)
        except BaseException:
            self.log.close()
            raise

    def path(self, name: str) -> Path:
        """Where to write the artifact's file ``name``."""
        if name in (MANIFEST, LOG):
            raise UsageError(f"'{name}' is written by the store itself. Choose another name for this file.")
        return self.output / component(name)

    def seal(self, task: StageTask) -> None:
        """Bring the output into its final form: the log, everything synced, the manifest last."""
        # Copied, not moved: should this attempt die here, the next one still has its log.
        shutil.copyfile(self.folder / LOG, self.output / LOG)
        events = read_log(self.folder / LOG)
        manifest = plain({
            "stage": task.stage,
            "key": task.key,
            "title": task.title,
            "needs": task.needs,
            "recipe": task.recipe,
            "summary": self.summary,
            "environment": environment(),
            "attempts": sum(event["event"] == BEGIN for event in events),
            "seconds": _busy_seconds(events),
            "peak_mib": peak_mib(),
            "peak_gpu_mib": peak_gpu_mib(),
            "created": datetime.now(UTC).isoformat(),
            "files": {path.name: _sealed(path) for path in sorted(self.output.iterdir())},
        })  # fmt: skip
        write_json(self.output / MANIFEST, {**manifest, "seal": _seal(manifest)})


def _sealed(path: Path) -> dict[str, Any]:
    component(path.name)
    sync(path)
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _busy_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds spent over all attempts; what a killed attempt did after its last line is lost, and so not counted."""
    moments = [*events, {"event": "end", "time": time.time()}]
    return round(sum(float(b["time"] - a["time"]) for a, b in pairwise(moments) if b["event"] != BEGIN), 3)

"""The content-addressed store: a folder of finished stages, each under the hash of everything it depends on.

    ROOT/<stage>/<key>/            a finished stage: manifest.json, its files, log.jsonl
    ROOT/partial/<stage>-<key>/    an unfinished one: log, checkpoints; it outlives kills, the next attempt goes on
    ROOT/damaged/                  artifacts whose checksums did not fit, set aside with the reason
    ROOT/runs/<name>.json          what was asked, and which keys answer it
    ROOT/runs/<name>.cancel        a wish that whoever works for this run may stop
    ROOT/locks/<key>.lock          held while a stage is computed; the system releases it when its holder dies
    ROOT/locks/<key>.lease         who holds it; renewed every few seconds (`cfrbench.leases`)
    ROOT/jobs/<executor>/          what an executor keeps: scripts, logs and numbers of queued jobs

Law: a folder ROOT/<stage>/<key> is whole or absent, whatever is killed and when: an artifact is built in ``partial``,
synced, and renamed as the last step. Importing this module does not import torch.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cfrbench import leases
from cfrbench.artifact import Artifact, Damaged, Draft, checked_key, component, open_artifact
from cfrbench.config import digest
from cfrbench.errors import StoreError, UsageError
from cfrbench.files import DISK_ERRORS, plain, read_json, storage_errors, sync, write_json
from cfrbench.machine import reset_peak_memory

if TYPE_CHECKING:
    from cfrbench.contracts import StageTask

SERVICE_FOLDERS = ("partial", "damaged", "runs", "locks", "jobs", "trash")

_logger = logging.getLogger(__name__)


def scratch_folder(stage: str, key: str) -> PurePosixPath:
    """Where, inside a store, an unfinished stage keeps its log and checkpoints."""
    return PurePosixPath("partial", f"{component(stage)}-{checked_key(key)}")


@dataclass(frozen=True)
class Store:
    """A store at ``root``, made if it does not exist; StoreError if that is no folder one can write to."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())
        with storage_errors("use the store", self.root):
            for name in SERVICE_FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            # Touching an empty file finds a read-only store, yet lets `clean` make room on a full disk.
            (self.root / "locks" / "probe").touch()

    def folder(self, stage: str, key: str) -> Path:
        """Where the finished stage lies or will lie."""
        if stage in SERVICE_FOLDERS:
            raise UsageError(f"'{stage}' is a folder of the store itself. Name the stage differently.")
        return self.root / component(stage) / checked_key(key)

    # -- finished stages ----------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished stage, or None. Cheap: manifest and sizes are checked, checksums when a file is first used.

        A damaged one is set aside with a logged warning, and is then as good as absent.
        """
        try:
            return open_artifact(self.folder(stage, key), self._set_aside)
        except Damaged as damage:
            _logger.warning("%s", damage)
            return None

    def find_any(self, stage: str, keys: Iterable[str]) -> Artifact | None:
        """The first finished stage of this name among ``keys``, those of a cell for example; None without one."""
        here = (key for key in keys if self.folder(stage, key).is_dir())
        return next((artifact for artifact in (self.find(stage, key) for key in here) if artifact), None)

    def find_verified(self, stage: str, key: str) -> Artifact | None:
        """`find` with every checksum verified: for plans, where a damaged artifact is to be computed again at once."""
        artifact = self.find(stage, key)
        try:
            if artifact is not None:
                artifact.verify()
        except Damaged as damage:
            _logger.warning("%s", damage)
            return None
        return artifact

    def _set_aside(self, folder: Path, inode: int, reason: str) -> None:
        """Move a damaged artifact to ROOT/damaged, unless somebody is already replacing it."""
        place = self.root / "damaged" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        with self.lock_if_free(folder.name) as mine, storage_errors("set aside", folder):
            # The folder that was judged may have been replaced by a sound one before the lock was ours.
            if mine and folder.is_dir() and folder.stat().st_ino == inode:
                folder.rename(place)
                (place / "reason.txt").write_text(reason + "\n", encoding="utf-8")

    # -- locks --------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock of ``key``, re-entrant within a thread.

        ``waiting`` is called again and again while somebody else holds it; it may raise, to wait no longer.
        """
        lock = self._file_lock(key)
        lease = None
        with storage_errors("lock", Path(lock.lock_file)):
            while not _acquired(lock):
                waiting()
                time.sleep(leases.POLL_SECONDS)
            try:
                lease = leases.take(self.lease(key), waiting) if lock.lock_counter == 1 else None
            except BaseException:
                lock.release()
                raise
        try:
            yield
        finally:
            if lease is not None:
                lease.drop()
            lock.release()

    @contextmanager
    def lock_if_free(self, key: str) -> Iterator[bool]:
        """Hold the lock of ``key`` and give True, or give False at once if somebody else holds it."""
        lock = self._file_lock(key)
        lease = None
        with storage_errors("lock", Path(lock.lock_file)):
            mine = _acquired(lock)
            if mine and lock.lock_counter == 1:
                lease = leases.take_if_free(self.lease(key))
                if lease is None:
                    lock.release()
                    mine = False
        try:
            yield mine
        finally:
            if lease is not None:
                lease.drop()
            if mine:
                lock.release()

    def lease(self, key: str) -> Path:
        """The file that says who holds the lock of ``key``."""
        return self.root / "locks" / f"{checked_key(key)}.lease"

    def _file_lock(self, key: str) -> Any:
        # One object per path and process is what makes nested use re-entrant.
        return FileLock(self.root / "locks" / f"{checked_key(key)}.lock", is_singleton=True)

    # -- writing ------------------------------------------------------------------------------------------------------

    def ensure(
        self, task: StageTask, make: Callable[[Draft], None], waiting: Callable[[], None] = lambda: None
    ) -> Artifact:
        """The artifact of ``task``; ``make`` computes it if no process has done so yet."""
        with self.lock(task.key, waiting):
            artifact = self.find(task.stage, task.key)
            if artifact is None:
                with self.writing(task) as draft:
                    make(draft)
                artifact = self.find(task.stage, task.key)
        if artifact is None:
            raise StoreError(f"{self.folder(task.stage, task.key)} vanished or changed right after it was written. "
                             "Check the disk, then give the same command again.")  # fmt: skip
        return artifact

    @contextmanager
    def writing(self, task: StageTask) -> Iterator[Draft]:
        """Compute a stage: a clean exit completes its artifact, an exception leaves its scratch folder for resuming."""
        with self.lock(task.key):
            target = self.folder(task.stage, task.key)
            reset_peak_memory()
            draft = Draft(self.root / scratch_folder(task.stage, task.key))
            try:
                with storage_errors("write", draft.folder, only=DISK_ERRORS):
                    yield draft
            finally:
                draft.log.close()
            with storage_errors("complete", target):
                draft.seal(task)
                target.parent.mkdir(exist_ok=True)
                sync(self.root)
                # Whoever comes second after all finds equal content in place: the key says so.
                if self.find(task.stage, task.key) is None:
                    draft.output.rename(target)
                    sync(target.parent)
            self.discard(draft.folder)

    def discard(self, folder: Path) -> None:
        """Delete a folder of the store; it leaves its place whole, so that no reader ever sees a part of it."""
        place = self.root / "trash" / f"{folder.name}-{time.time_ns()}"
        with storage_errors("remove", folder):
            folder.rename(place)
            shutil.rmtree(place)

    # -- runs ---------------------------------------------------------------------------------------------------------

    def write_run(self, name: str, record: Mapping[str, Any]) -> None:
        """Store what a run asked and which keys answer it; ``name``, ``hash`` and ``written`` (UTC) are added.

        The hash is the record's own if it brings one, else that of its content.
        """
        content = plain(record)
        head = {"name": name, "hash": content.get("hash") or digest(content), "written": datetime.now(UTC).isoformat()}
        write_json(self.root / "runs" / f"{component(name)}.json", {**content, **head})

    def cancel_mark(self, name: str) -> Path:
        """The file whose presence asks everybody who works for the run ``name`` to stop."""
        return self.root / "runs" / f"{component(name)}.cancel"

    def runs(self) -> list[dict[str, Any]]:
        """All run records, the latest last."""
        return sorted(map(_read_run, (self.root / "runs").glob("[!.]*.json")), key=lambda run: run["written"])

    def run(self, ref: str) -> dict[str, Any]:
        """The run called ``ref``: a name, the beginning of one name or hash, or ``latest``; UsageError otherwise."""
        runs = self.runs()
        known = ", ".join(run["name"] for run in runs) or "none yet"
        if ref == "latest" and runs:
            return runs[-1]
        exact = [run for run in runs if run["name"] == ref]
        hits = exact or [run for run in runs if ref and (run["name"].startswith(ref) or run["hash"].startswith(ref))]
        if not hits:
            raise UsageError(f"The store {self.root} has no run '{ref}'. Known: {known}. Give a name, the beginning of "
                             "a name or hash, or 'latest'.")  # fmt: skip
        if len(hits) > 1:
            both = ", ".join(f"{run['name']} ({run['hash'][:12]})" for run in hits)
            raise UsageError(f"'{ref}' fits several runs of the store {self.root}: {both}. Write more of the name.")
        return hits[0]


def _acquired(lock: Any) -> bool:
    """Whether a file lock could be had at once."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _read_run(path: Path) -> dict[str, Any]:
    try:
        with storage_errors("read", path):
            record: dict[str, Any] = read_json(path)
        return {"name": record["name"], "hash": record["hash"], "written": record["written"], **record}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The run record {path} is damaged ({error}). Remove it and give the run's command again: its "
                         "finished stages are kept.") from error  # fmt: skip

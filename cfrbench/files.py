"""Files that are whole or absent: atomic writes, strict JSON, append-only logs, checksums.

Whatever the operating system refuses (full disk, read-only folder) becomes one StoreError with a remedy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfrbench.errors import StoreError

#: what a disk answers when nothing more can be written; everything else may be the fault of the caller's own paths
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@contextmanager
def storage_errors(action: str, path: Path, only: frozenset[int] | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError, "Cannot ``action`` ``path``: ..."; ``only`` some errnos."""
    try:
        yield
    except OSError as error:
        # Without a number it is not the system's, but a library's (a lock's time-out).
        if error.errno is None or (only is not None and error.errno not in only):
            raise
        raise StoreError(f"Cannot {action} {path}: {_explain(error)}") from error


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ("the disk is full. Free some space (`cfrbench clean` lists what no run needs) and give the same "
                "command again: what is finished is kept.")  # fmt: skip
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "writing there is not allowed. Change its permissions, or choose another folder with --store DIR."
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file stands where a folder is needed, or the reverse. Move it, or choose another --store DIR."
    return f"{error.strerror or error}. Check the disk, then give the same command again: what is finished is kept."


# ---------------------------------------------------------------------------------------------------------------------
# whole files


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, now or after a crash, sees the old content or the new, never a part."""
    # Not `tempfile`: its files are readable by their owner alone, and a store may be shared by a group.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors("write", path):
        try:
            temporary.write_bytes(data)
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so with EINVAL; their renames are synchronous.
        if not (error.errno == errno.EINVAL and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def plain(value: Any) -> Any:
    """The JSON form of a value: models and mappings as objects, array scalars as numbers, non-finite as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return value.as_posix()
    for unwrap in ("model_dump", "tolist"):  # pydantic models; numpy and torch values
        if hasattr(value, unwrap):
            return plain(getattr(value, unwrap)())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_json(path: Path, value: Any) -> None:
    """Write ``plain(value)`` as JSON for people, atomically."""
    write_atomic(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; FileNotFoundError if it is absent, ValueError if it is damaged."""
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# logs


class JsonLog:
    """Append-only JSON lines; each line reaches the system in one write, so a kill tears at most the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors("open the log", path):
            self._file = path.open("ab", buffering=0)
            # A line torn by a kill must not swallow the first line of this attempt.
            try:
                if not _ends_with_newline(path):
                    self._file.write(b"\n")
            except BaseException:
                self._file.close()
                raise

    def write(self, event: str, **values: Any) -> None:
        """Append ``{"event": event, "time": seconds since 1970, **values}``; non-finite numbers become null."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with storage_errors("append to the log", self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JsonLog; torn ones are left out, a missing file is an empty log."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill, as announced
        if isinstance(record, dict):
            records.append(record)
    return records

"""Opening an archive from a stranger: what it announces is judged before a byte of it is unpacked."""

from __future__ import annotations

import json
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from cfrbench.archive.form import FORMAT, MANIFEST, Manifest, prediction_file, truth_file
from cfrbench.errors import DataError
from cfrbench.prepared.form import checked_case

#: what an archive may hold unpacked, the command line offers another limit; and its table of contents alone
LIMIT_GIB, _MANIFEST_BYTES = 4.0, 2**26
_MOST_FILES = 100_000
#: no deflate stream grows by more than this
_LARGEST_RATIO = 1032
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)
_AGAIN = "Get it again from where it came from."


@dataclass(frozen=True)
class Archive:
    """An open archive whose member names and sizes are harmless, and its table of contents."""

    path: Path
    manifest: Manifest
    _zip: zipfile.ZipFile

    @property
    def names(self) -> list[str]:
        """Every file in it but the table of contents."""
        return [name for name in self._zip.namelist() if name != MANIFEST]

    def read(self, name: str) -> bytes:
        """The bytes of a file in it; DataError if they are damaged."""
        try:
            return self._zip.read(name)
        except _DAMAGE as error:
            raise DataError(f"{self.path}: {name} is damaged ({error}). {_AGAIN}") from error


@contextmanager
def open_archive(path: Path, limit_gib: float = LIMIT_GIB) -> Iterator[Archive]:
    """Open an archive that `cfrbench export` wrote; DataError if it is damaged, too large, or leads out of itself."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file. Give an archive that `cfrbench export` wrote.")
    try:
        opened = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise DataError(
            f"{path} is no readable archive ({error}): cut short, damaged or no ZIP file. {_AGAIN}"
        ) from error
    with opened:
        _judge(path, opened.infolist(), limit_gib)
        yield Archive(path, _manifest(path, opened), opened)


def _judge(path: Path, members: list[zipfile.ZipInfo], limit_gib: float) -> None:
    if len(members) > _MOST_FILES:
        raise DataError(f"{path} holds {len(members)} files; {_MOST_FILES} are allowed. No run makes so many: {_AGAIN}")
    names: set[str] = set()
    for member in members:
        name = member.filename
        if not _harmless(name) or member.is_dir() or stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{path} holds an entry {name!r}, which is no plain file inside the archive. Nothing was "
                            "unpacked. `cfrbench export` writes no such entry: do not trust this file.")  # fmt: skip
        if name in names:
            raise DataError(f"{path} holds {name} twice, so that readers could disagree on it. Do not trust this file.")
        if member.flag_bits & 1:
            raise DataError(f"{path}: {name} is encrypted. `cfrbench export` encrypts nothing. {_AGAIN}")
        if member.file_size > _LARGEST_RATIO * (member.compress_size + 1):
            raise DataError(f"{path}: {name} announces {member.file_size} bytes out of {member.compress_size}, more "
                            "than compression can give. Nothing was unpacked.")  # fmt: skip
        names.add(name)
    total = sum(member.file_size for member in members)
    if total > limit_gib * 2**30:
        raise DataError(f"{path} announces {total / 2**30:.1f} GiB unpacked, above the limit of {limit_gib:g} GiB. If "
                        "that is right, allow it with --max-gib.")  # fmt: skip


def _harmless(name: str) -> bool:
    """Whether a member's name stays inside the archive on every system."""
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not any(part in (".", "..") for part in parts)
    return plain and name.isprintable() and not set(name) & set('\\:*?"<>|') and not name.startswith("/")


def _manifest(path: Path, opened: zipfile.ZipFile) -> Manifest:
    try:
        if opened.getinfo(MANIFEST).file_size > _MANIFEST_BYTES:
            raise ValueError("it is larger than any table of contents")
        values: Any = json.loads(opened.read(MANIFEST))
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}; this version of cfrbench reads {FORMAT}. Verify it "
                            f"with {values.get('made_by', 'the version that wrote it')}.")  # fmt: skip
        manifest = Manifest.model_validate(values)
        _check_names(manifest)
    except (*_DAMAGE, KeyError, TypeError, RecursionError, pydantic.ValidationError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: {MANIFEST} is missing or damaged ({cause}), so this is no archive of `cfrbench "
                        f"export`, or a broken one. {_AGAIN}") from error  # fmt: skip
    return manifest


def _check_names(manifest: Manifest) -> None:
    """ValueError unless every file that the table of contents leads to has a harmless name."""
    for case in manifest.cases:
        checked_case(case)
    for cell in manifest.cells:
        unknown = [case for case in cell.cases if case not in manifest.cases]
        if unknown:
            raise ValueError(f"the cell {cell.name} scores {unknown[0]!r}, which is not among its cases")
        if not all(_harmless(prediction_file(cell.name, case)) and _harmless(truth_file(case)) for case in cell.cases):
            raise ValueError(f"{cell.name!r} is no name of a cell")

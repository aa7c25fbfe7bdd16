"""What a store can do without: listing it is one thing, removing it another."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cfrbench.artifact import MANIFEST
from cfrbench.store import SERVICE_FOLDERS, Store

#: an unfinished stage nobody touched for so long is not going to be resumed
STALE_DAYS = 7.0


@dataclass(frozen=True)
class Leftover:
    """A folder that can go, why, and what that frees; ``key`` names the lock that guards it, if one does."""

    path: Path
    reason: str
    bytes: int
    key: str | None = None


def unused(store: Store, keep: Collection[str], stale_days: float = STALE_DAYS) -> list[Leftover]:
    """Everything that can be removed: stages whose key is not in ``keep``, damaged ones, stale unfinished ones.

    ``keep`` holds the keys that runs refer to. Nothing is changed, so this is the dry run of `remove`.
    """
    found = [*_unreferenced(store, keep), *_unfinished(store, stale_days)]
    for folder, reason in (("damaged", "damaged and set aside"), ("trash", "left by a clean that was stopped")):
        found += [Leftover(path, reason, _size(path)) for path in sorted((store.root / folder).iterdir())]
    return found


def remove(store: Store, leftovers: Iterable[Leftover]) -> int:
    """Remove what `unused` listed and return the bytes freed; what a process is working on right now is left alone."""
    freed = 0
    for item in leftovers:
        if item.key is None:
            freed += _discard(store, item)
            continue
        with store.lock_if_free(item.key) as mine:
            freed += _discard(store, item) if mine else 0
    return freed


def _discard(store: Store, item: Leftover) -> int:
    if not item.path.exists():  # another `clean` was faster
        return 0
    store.discard(item.path)
    return item.bytes


def _unreferenced(store: Store, keep: Collection[str]) -> Iterator[Leftover]:
    # Only what carries a manifest is ours: a store that was put into a folder with other things removes none of those.
    for manifest in sorted(store.root.glob(f"*/*/{MANIFEST}")):
        folder = manifest.parent
        if folder.parent.name not in SERVICE_FOLDERS and folder.name not in keep:
            yield Leftover(folder, "no run refers to it", _size(folder), folder.name)


def _unfinished(store: Store, stale_days: float) -> Iterator[Leftover]:
    for folder in sorted((store.root / "partial").iterdir()):
        stage, _, key = folder.name.rpartition("-")  # a key holds no hyphen
        days = (time.time() - _touched(folder)) / 86400
        if store.folder(stage, key).exists():
            yield Leftover(folder, "its stage is finished", _size(folder), key)
        elif days >= stale_days:
            yield Leftover(folder, f"unfinished, untouched for {days:.0f} days", _size(folder), key)


def _touched(folder: Path) -> float:
    return max([folder.stat().st_mtime, *(stat.st_mtime for stat in _stats(folder))])


def _size(folder: Path) -> int:
    return sum(stat.st_size for stat in _stats(folder))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a running process may be renaming its files
            if path.is_file():
                yield path.stat()

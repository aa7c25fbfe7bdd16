"""The last guard before a run: no image trains under one name and is tested under another."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.contracts import DataSource
from cfrbench.errors import DataError, StoreError
from cfrbench.files import storage_errors, write_atomic
from cfrbench.prepared import copies
from cfrbench.volume import Split

Copy = tuple[str, str, float]
#: (how many images have been looked at, of how many)
Looking = Callable[[int, int], None]
#: the folder of a store that keeps signatures of sets which do not know theirs
SIGNATURES = "signatures"


def unseen(done: int, total: int) -> None:
    """No progress is shown."""


def refuse_leaks(
    source: DataSource, splits: Sequence[Split], fingerprint: Mapping[str, str], cache: Path, looking: Looking = unseen
) -> None:
    """Raise a DataError that names both cases if an image stands in two lists of a split, also flipped or turned.

    Sets that do not know their signatures are read once; ``cache`` is a folder that keeps them by fingerprint.
    """
    if source.synthetic:  # drawn from different seeds
        return
    cases = sorted({case for split in splits for case in (*split.train, *split.val, *split.test)})
    known = source.signatures()
    rows = known if known is not None else _gathered(source, cases, fingerprint, cache, looking)
    found = copies_among({case: rows[case] for case in cases if case in rows})
    for split, (first, second, alike) in ((s, pair) for s in splits for pair in across_lists(s, found)):
        raise DataError(f"{_place(split, first)} and {_place(split, second)} are one image under two names (perhaps "
                        f"flipped or turned: correlation {alike:.3f}), so test scores would be on seen data. Take one "
                        "of them off its list.")  # fmt: skip


def copies_among(signatures: Mapping[str, NDArray[Any]]) -> list[Copy]:
    """Pairs of cases that are one image, with their correlation."""
    names = list(signatures)
    return [(names[i], names[j], alike) for i, j, alike in copies.find_copies([signatures[n] for n in names])]


def across_lists(split: Split, found: Sequence[Copy]) -> list[Copy]:
    """Those that stand in different lists."""
    return [pair for pair in found if len({_list(split, pair[0]), _list(split, pair[1]), ""}) == 3]


def _list(split: Split, case: str) -> str:
    return next((name for name in ("train", "val", "test") if case in getattr(split, name)), "")


def _place(split: Split, case: str) -> str:
    return f"{case} ({_list(split, case)} list)"


def _gathered(
    source: DataSource, cases: Sequence[str], fingerprint: Mapping[str, str], cache: Path, looking: Looking
) -> dict[str, NDArray[np.int8]]:
    """Signatures of all cases that can be read; a damaged one is reported by the stage that needs it."""
    found = {}
    for done, case in enumerate(cases, 1):
        path = cache / f"{fingerprint[case]}.npy"
        row = _kept(path)
        if row is None:
            looking(done, len(cases))
            try:
                row = copies.signature(source.load(case).image.numpy())
            except DataError:
                continue
            _keep(path, row)
        found[case] = row
    return found


def _kept(path: Path) -> NDArray[np.int8] | None:
    try:
        row: NDArray[np.int8] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return row if row.shape == (copies.LENGTH,) and row.dtype == np.int8 else None


def _keep(path: Path, row: NDArray[np.int8]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, row)
    # It only saves time: a plan can be made beside a store that is full or read-only, and what runs will say so.
    with suppress(StoreError), storage_errors("keep signatures in", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())

"""Filling a folder with prepared cases: one process at a time, what is wrong gathered, copies looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cfrbench.errors import DataError, UsageError
from cfrbench.files import storage_errors
from cfrbench.prepared import copies
from cfrbench.prepared.form import MANIFEST, CaseRecord, SetRecord, read_record
from cfrbench.prepared.writing import CaseJob, prepare_cases

#: (what is being done, how much of it, of how much)
Progress = Callable[[str, int, int], None]
_TOLD = 5


def silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@contextmanager
def alone(folder: Path, what: str, other: str) -> Iterator[None]:
    """Hold the folder; UsageError if another process is at ``what`` there. other: the option that chooses another."""
    with storage_errors("use the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another process is {what}. Wait for it, or choose another {other}.") from None
    try:
        yield
    finally:
        lock.release()


def make_room(folder: Path, identity: str, source: Path, replace: bool, words: str, other: str) -> None:
    """Refuse a folder that holds another set, unless that is to be replaced; its manifest goes first.

    words: the beginning of the refusal. other: the option that chooses another folder.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    if replace:
        manifest.unlink()  # until the new one is whole, there is none
        return
    made = read_record(manifest, SetRecord).made
    if made.get("identity") == identity and made.get("source") == str(source.absolute()):
        return
    options = "the same" if made.get("identity") == identity else "other"
    raise UsageError(f"{words} from {made.get('source')} with {options} options. Choose another {other}, or replace it "
                     "with --replace.")  # fmt: skip


def prepared(
    folder: Path, jobs: Sequence[CaseJob], workers: int, known_bad: Mapping[str, str], skip_bad: bool,
    progress: Progress = silent,
) -> tuple[list[CaseRecord], dict[str, str]]:  # fmt: skip
    """The records of all cases that could be prepared, and why others could not; DataError unless they may be skipped.

    known_bad: cases that have no job, because something is known to be wrong with them.
    """
    done = 0

    def tell(case: str, outcome: Any) -> None:
        nonlocal done
        done += 1
        progress("preparing", done, len(jobs))

    bad = dict(known_bad)
    records = []
    for case, outcome in prepare_cases(folder, jobs, workers, tell).items():
        if isinstance(outcome, CaseRecord):
            records.append(outcome)
        else:
            bad[case] = str(outcome)
    if not records or (bad and not skip_bad):
        raise refusal(bad, len(jobs) + len(known_bad))
    return records, bad


def refusal(bad: Mapping[str, str], total: int) -> DataError:
    """The error that tells why so many of ``total`` cases cannot be used."""
    if len(bad) == 1 < total:
        reason = next(iter(bad.values()))
        known = "leave the case out" in reason
        return DataError(reason.removesuffix(".") + " (--skip-bad)." if known else f"{reason} Or leave the case out "
                         "with --skip-bad.")  # fmt: skip
    told = " ".join(f"({n}) {reason}" for n, reason in enumerate(list(bad.values())[:_TOLD], 1))
    more = f" ({len(bad) - _TOLD} more are like these or other.)" * (len(bad) > _TOLD)
    advice = " Correct them, or leave them out with --skip-bad." * (len(bad) < total)
    return DataError(f"{len(bad)} of {total} cases cannot be used: {told}{more}{advice}")


def without_copies(
    found: Sequence[CaseRecord], bad: dict[str, str], skip_bad: bool
) -> tuple[list[CaseRecord], list[str]]:
    """The records without second copies of an image, which are refused or put into ``bad``; and notes."""
    notes: list[str] = []
    dropped: dict[str, str] = {}
    for i, j, alike in copies.find_copies([copies.decode(record.signature) for record in found]):
        first, second = sorted((found[i], found[j]), key=lambda r: r.label is None)  # keep the one with a label
        exact = first.image.sha256 == second.image.sha256
        if first.patient == second.patient and not exact:
            notes.append(f"{first.case} and {second.case}, of one patient, are nearly one image (correlation "
                         f"{alike:.3f}); they stay in one list.")  # fmt: skip
            continue
        kind = "voxel for voxel" if exact else f"perhaps flipped, turned or scaled: correlation {alike:.3f}"
        dropped.setdefault(second.case, f"it is the image of {first.case} under another name ({kind})")
        if not skip_bad:
            raise DataError(f"{first.case} and {second.case} are one image under two names ({kind}). A copy counts "
                            "twice in training, and across the lists it leaks test data: remove one, or leave the "
                            "second out with --skip-bad.")  # fmt: skip
    bad.update(dropped)
    return [record for record in found if record.case not in dropped], notes

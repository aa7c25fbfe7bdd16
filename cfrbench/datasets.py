"""What data sources share: list files, and the search for damage, duplicates and leakage.

A list file names one case a line; the first N cases of the training list are the labelled ones of budget N.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.files import sha256_file
from cfrbench.volume import Split, Volume

#: endings that the list files of the field carry (MagicNet writes ``case0031.npy.h5``)
_ENDINGS = re.compile(r"(\.npy|\.h5|\.hdf5|\.nii|\.gz)+$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that `check_source` has to say; errors make scores wrong or impossible, notes do not."""

    level: Literal["error", "note"]
    message: str
    cases: tuple[str, ...] = ()  # whom it concerns; empty = the whole set


# ---------------------------------------------------------------------------------------------------------------------
# lists


def read_list(path: Path) -> tuple[str, ...]:
    """Read the case ids of a list file in order, without endings, commas and blank lines; DataError names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The list {path} cannot be read: {error}. Give a text file with one case id a line."
        ) from error
    cases = tuple(_case_id(path, part) for line in text.splitlines() for part in line.split(",") if part.strip())
    if not cases:
        raise DataError(f"The list {path} names no case. Write one case id a line, or remove the file.")
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise DataError(f"The list {path} names {', '.join(twice)} more than once. Remove the repetition.")
    return cases


def _case_id(path: Path, text: str) -> str:
    case = _ENDINGS.sub("", text.strip())
    # An id becomes part of a path: nothing in it may lead out of the data folder.
    if not case or case in (".", "..") or re.search(r"[/\\:]", case) or not case.isprintable():
        raise DataError(f"The list {path} holds {text.strip()!r}, which is not a case id. Write plain names, one a "
                        "line, without folders.")  # fmt: skip
    return case


def present_split(
    train: Sequence[str], test: Sequence[str], present: Callable[[str], bool], val: Sequence[str] = ()
) -> Split:
    """Keep the cases that have files, in list order; ``note`` counts them in a partial set. DataError if none."""
    Split(tuple(train), tuple(test), tuple(val))  # the lists as written must be sound, whatever is on the disk
    here = [tuple(case for case in cases if present(case)) for cases in (train, test)]
    for role, found, named in (("training", here[0], train), ("test", here[1], test)):
        if not found:
            raise DataError(f"None of the {len(named)} {role} cases ({named[0]} ...) has a file here. Check the "
                            "folder, or put a list of the cases you have beside the data.")  # fmt: skip
    kept = tuple(case for case in val if present(case))
    if len(here[0]) == len(train) and len(here[1]) == len(test):
        return Split(here[0], here[1], kept)
    note = f"{len(here[0])} of {len(train)} training and {len(here[1])} of {len(test)} test cases present"
    return Split(here[0], here[1], kept, note)


# ---------------------------------------------------------------------------------------------------------------------
# files


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; DataError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Restore the file or take the case off the list.") from error


# ---------------------------------------------------------------------------------------------------------------------
# duplicates and the whole check


def find_duplicates(fingerprint: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of case ids that share one fingerprint, each sorted; empty if every case is its own."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case, value in fingerprint.items():
        groups[value].append(case)
    return sorted(tuple(sorted(cases)) for cases in groups.values() if len(cases) > 1)


def refuse_duplicates(fingerprint: Mapping[str, str]) -> None:
    """Raise a DataError that names the cases which are one volume under several names; called before a run."""
    groups = find_duplicates(fingerprint)
    if groups:
        pairs = "; ".join(" = ".join(group) for group in groups)
        raise DataError(f"The same volume stands under several names: {pairs}. A copy counts twice in training, and "
                        "across the lists it leaks test data: keep one name of each.")  # fmt: skip


def check_source(source: DataSource, on_case: Callable[[str, Volume | None], None] | None = None) -> list[Finding]:
    """Look at every case: lists, files, shapes, labels, duplicates, leakage. Collects findings, raises nothing of them.

    ``on_case`` is shown each volume that was read, or None in place of one that could not be.
    An empty result means that a run on this source will not be stopped or spoilt by its data.
    """
    try:
        split = source.split()
        fingerprint = source.fingerprint()
    except DataError as error:
        return [Finding("error", str(error))]
    findings = [Finding("note", f"Split: {split.note.rstrip('.')}.")] if split.note else []
    images: dict[str, str] = {}
    seen: set[int] = set()
    for case in (*split.train, *split.val, *split.test):
        try:
            volume = source.load(case)
        except DataError as error:
            findings.append(Finding("error", str(error), (case,)))
            volume = None
        if on_case is not None:
            on_case(case, volume)
        if volume is None:
            continue
        # A volume that was saved again has other bytes: the voxels tell.
        images[case] = hashlib.sha256(volume.image.numpy().tobytes()).hexdigest()
        findings += _label_findings(case, volume)
        seen |= _classes(volume)
    findings += _duplicate_findings(split, [*find_duplicates(fingerprint), *find_duplicates(images)])
    return findings + _absent_classes(source, seen)


def _label_findings(case: str, volume: Volume) -> list[Finding]:
    if volume.label is None:
        return [Finding("note", f"{case} has no label: it can only serve as an unlabelled training case.", (case,))]
    if not bool(volume.label.any()):
        return [Finding("note", f"{case}: the label is background everywhere. Check that it belongs to the image.",
                        (case,))]  # fmt: skip
    return []


def _classes(volume: Volume) -> set[int]:
    return set() if volume.label is None else set(torch.unique(volume.label).tolist())


def _duplicate_findings(split: Split, groups: Sequence[tuple[str, ...]]) -> list[Finding]:
    findings = []
    for group in sorted(set(groups)):
        roles = [name for name in ("train", "val", "test") if set(group) & set(getattr(split, name))]
        leak = f" They stand in the lists {' and '.join(roles)}, so test scores would be on seen data." * (
            len(roles) > 1
        )
        message = f"{' = '.join(group)}: one volume under several names.{leak} Keep one of them."
        findings.append(Finding("error", message, group))
    return findings


def _absent_classes(source: DataSource, seen: set[int]) -> list[Finding]:
    absent = [name for number, name in enumerate(source.class_names) if number not in seen]
    if not seen or not absent:
        return []
    return [Finding("note", f"No case has a voxel of {', '.join(absent)}: that class cannot be learnt or scored.")]

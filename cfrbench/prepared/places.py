"""Where the files of a public data set may lie: layouts as patterns, cases found by them, the reader each needs.

A pattern is a path below the data root with ``{case}`` for the id, perhaps twice, and ``*`` in its folders; the ending
is kept apart, because files are passed around packed and unpacked. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cfrbench.config import Frozen
from cfrbench.prepared.arrays import ArrayReading, read_arrays
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.nifti import SUFFIXES
from cfrbench.prepared.writing import CaseJob, RawCase
from cfrbench.scan_steps import ScanSteps

Files = Mapping[str, Path]
Reader = Callable[[CaseJob, Path], RawCase]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set is passed around.

    first: role of the file that names a case -> its patterns. others: role -> paths beside that file, ``{case}`` in
    them, with an ending of their own if they have one; the first that exists is taken, and a case may lack such a
    file. ids: what an id looks like. prefix: put before
    it, where two parts of a set count alike. ready: may be loaded as it is; others go through ``data prepare``.
    """

    name: str
    first: tuple[str, tuple[str, ...]]
    read: Reader
    reading: Frozen
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ends: tuple[str, ...] = SUFFIXES
    ids: str = r"[^/.]+"
    prefix: str = ""
    labels: LabelMap | None = None
    steps: ScanSteps = field(default_factory=ScanSteps)
    ready: bool = False

    def cases(self, root: Path) -> dict[str, Files]:
        """Every case below ``root`` with its files, sorted by id; earlier patterns win."""
        role, patterns = self.first
        found: dict[str, Files] = {}
        for pattern in patterns:
            for end in self.ends:
                for path in root.glob(pattern.replace("{case}", "*") + end):
                    case = self._id(pattern + end, path.relative_to(root).as_posix())
                    if case and path.is_file():
                        found.setdefault(self.prefix + case, {role: path, **self._beside(path, case)})
        return dict(sorted(found.items()))

    def files(self, root: Path, case: str) -> Files | None:
        """The files of one case, or None if it is not there."""
        role, patterns = self.first
        bare = case.removeprefix(self.prefix)
        if not case.startswith(self.prefix) or not re.fullmatch(self.ids, bare):
            return None
        literal = re.sub(r"([*?\[])", r"[\1]", bare)
        for pattern in patterns:
            for end in self.ends:
                hits = sorted(root.glob(pattern.replace("{case}", literal) + end))
                if hits and hits[0].is_file():
                    return {role: hits[0], **self._beside(hits[0], bare)}
        return None

    def example(self) -> str:
        """The first pattern as a person reads it."""
        return f"DIR/{self.first[1][0].replace('{case}', '<id>').replace('*', '...')}{self.ends[0]}"

    def _id(self, pattern: str, path: str) -> str:
        parts = re.escape(pattern).replace(r"\*", "[^/]*").split(r"\{case\}")
        again = "(?P=case)".join(parts[1:])
        hit = re.fullmatch(f"{parts[0]}(?P<case>{self.ids}){again}", path)
        return hit["case"] if hit else ""

    def _beside(self, path: Path, case: str) -> dict[str, Path]:
        named = {}
        for role, places in self.others.items():
            stems = [path.parent / place.format(case=case) for place in places]
            beside = [stem.with_name(stem.name + end) for stem in stems for end in (self.ends if "." not in stem.name
                                                                                    else ("",))]  # fmt: skip
            hit = next((file for file in beside if file.is_file()), None)
            if hit:
                named[role] = hit
        return named


def h5_layout(*patterns: str, reading: ArrayReading, labels: LabelMap | None = None, ids: str = r"[^/.]+") -> Layout:
    """HDF5 files with members image and label; ``.npy.h5`` is an ending too."""
    return Layout("h5", ("pair", patterns), read_arrays, reading, ends=(".h5", ".hdf5", ".npy.h5"), ids=ids,
                  labels=labels, ready=True)  # fmt: skip


def npy_layout(*patterns: str, reading: ArrayReading, labels: LabelMap | None = None, ids: str = r"[^/.]+") -> Layout:
    """``<case>_image.npy`` beside ``<case>_label.npy``."""
    return Layout("npy", ("image", patterns), read_arrays, reading, {"label": ("{case}_label",)},
                  (".npy",), ids, labels=labels, ready=True)  # fmt: skip

"""Public data sets: opened prepared, or as the field passes them around; `PublicSource` is what their plug-ins share.

A plug-in states facts: classes, licence, layouts with their steps, lists, protocols. What is done with them stands here
and in `cfrbench.prepared.preparing`.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import SerializerFunctionWrapHandler, model_serializer

from cfrbench.config import Frozen, digest
from cfrbench.datasets import file_sha256, present_split, read_list
from cfrbench.errors import DataError
from cfrbench.prepared import label_maps
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.naming import patient_of
from cfrbench.prepared.places import Files, Layout
from cfrbench.prepared.source import PreparedSource, is_prepared
from cfrbench.prepared.writing import CaseJob, naming, scaled
from cfrbench.scan_steps import ScanSteps
from cfrbench.volume import Split, Volume, checked_volume

_ROLES = ("train", "test", "val")


class PublicSource(PreparedSource):
    """A data set of the field.

    layouts: how it is passed around, the most common first. lists: the field's split, ids only. own_lists: names of
    lists that win if they stand beside the data. id_pattern: the id within a line of a list, where lines hold more.
    protocols: preset -> settings.
    """

    class Config(Frozen):
        """Taken from the manifest of a prepared folder; not meant to be set by hand."""

        axcodes: str | None = None
        scan_steps: ScanSteps | None = None

        @model_serializer(mode="wrap")
        def _stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
            # Options are part of every key: what is not stated must not be in it.
            return {key: value for key, value in handler(self).items() if value is not None}

    config: Config
    layouts: ClassVar[tuple[Layout, ...]]
    lists: ClassVar[Mapping[str, Path]]
    own_lists: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("train.list", "test.list", "val.list"), ("train.txt", "test.txt", "val.txt"))  # fmt: skip
    id_pattern: ClassVar[str] = ""
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __init__(self, config: Any = None, root: Path | None = None) -> None:
        super().__init__(config, root)
        if is_prepared(root):
            record = self.prepared.record
            if record.name != self.name:
                raise DataError(f"{root} holds the prepared data set '{record.name}', not '{self.name}'. Give "
                                f"--dataset {record.name}, or the folder of {self.title}.")  # fmt: skip
            found = {"axcodes": record.axcodes, "scan_steps": record.scan_steps}
            self.config = self.config.model_copy(update=found)
        stated = {"axcodes": self.config.axcodes, "scan_steps": self.config.scan_steps}
        vars(self).update({key: value for key, value in stated.items() if value is not None})

    @property
    def is_prepared(self) -> bool:
        """Whether the data root is a prepared folder."""
        return is_prepared(self.root)

    # -----------------------------------------------------------------------------------------------------------------
    # what a data source does

    def split(self) -> Split:
        """The lists of a prepared folder; else the cases of the field's, or the folder's own, lists that have files."""
        if self.is_prepared:
            return super().split()
        root = self.folder()
        cases = self.ready_cases()
        self._refuse_raw(cases)
        try:
            split = self.listed_split(cases, root)
        except DataError as error:
            raise DataError(f"{self.title} data in {root}: {error} {self.remedy()}") from error
        return split

    def load(self, case: str) -> Volume:
        """Read one case, with its stored intensities in the field's files."""
        if self.is_prepared:
            return super().load(case)
        layout, files = self.find(case)
        where = next(iter(files.values()))
        with tempfile.TemporaryDirectory() as scratch:
            job = self.job(layout, case, files)
            raw = job.read(job, Path(scratch))
            image = np.ascontiguousarray(scaled(raw.image, raw.scale))
            label = raw.label
            if label is not None and raw.label_scale != (1.0, 0.0):
                label = scaled(label, raw.label_scale)
            labels = self.labels_of(layout)
            if label is not None:
                with naming(files.get("label", where)):
                    label = np.require(label if labels is None else labels.apply(label), requirements=["C", "W"])
            target = None if label is None else torch.from_numpy(label)
            # Memory maps of the scratch folder end with it.
            return checked_volume(str(where), torch.from_numpy(image), target, self.num_classes, raw.spacing_mm)

    def fingerprint(self) -> Mapping[str, str]:
        """Of a prepared folder what its manifest says; else SHA-256 of each case's file, or of those of its files."""
        if self.is_prepared:
            return super().fingerprint()
        split = self.split()
        found = {}
        for case in (*split.train, *split.test, *split.val):
            hashes = [file_sha256(path) for path in self.find(case)[1].values()]
            found[case] = hashes[0] if len(hashes) == 1 else digest(hashes)
        return found

    def patients(self) -> Mapping[str, str]:
        """Patient of each case, from the manifest of a prepared folder or as the data set names its cases."""
        if self.is_prepared:
            return super().patients()
        split = self.split()
        return {case: self.patient_of(case) for case in (*split.train, *split.val, *split.test)}

    def without_label(self) -> frozenset[str]:
        """Training cases without a label: public lists name none, a prepared folder's manifest may."""
        return super().without_label() if self.is_prepared else frozenset()

    def signatures(self) -> Mapping[str, NDArray[Any]] | None:
        """Signatures of a prepared folder; None otherwise."""
        return super().signatures() if self.is_prepared else None

    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Recommended settings of a preset; only ``paper`` is a published protocol."""
        return self.protocols[preset]

    # -----------------------------------------------------------------------------------------------------------------
    # files

    def folder(self) -> Path:
        """The data root; DataError with where to get the files if there is none."""
        if self.root is None:
            raise DataError(f"{self.title} needs the folder of its files: pass --data-root DIR. {self.remedy()}")
        if not self.root.is_dir():
            raise DataError(f"The {self.title} data folder {self.root} does not exist or is no folder. {self.remedy()}")
        return self.root

    def ready_cases(self) -> dict[str, Files]:
        """Cases that can be loaded as they are, with their files."""
        found: dict[str, Files] = {}
        for layout in reversed([layout for layout in self.layouts if layout.ready]):
            found |= self.cases_of(layout)
        return {case: files for case, files in found.items() if case not in self.excluded()}

    def cases_of(self, layout: Layout) -> dict[str, Files]:
        """The cases of one layout; data sets that find theirs in another way replace this."""
        return layout.cases(self.folder())

    def labels_of(self, layout: Layout) -> LabelMap | None:
        """Raw label value -> class; None where files hold class numbers."""
        return layout.labels

    def excluded(self) -> Mapping[str, str]:
        """Cases that are never used, with the reason."""
        return {}

    def patient_of(self, case: str) -> str:
        """Whose scan it is: scans of one patient stay in one list."""
        return patient_of(case)

    def find(self, case: str) -> tuple[Layout, Files]:
        """The layout and files of a case that can be loaded; DataError if it has none."""
        if Path(case).name != case or not case:
            raise DataError(f"'{case}' is no {self.title} case id. Use the plain name of a case, without folders.")
        root = self.folder()
        ready = [layout for layout in self.layouts if layout.ready]
        for layout in ready:
            files = layout.files(root, case)
            if files:
                return layout, files
        place = root / (ready[0].first[1][0].format(case=case) + ready[0].ends[0]) if ready else root
        raise DataError(f"{self.title} case {case}: there is no {place}. {self.remedy()}")

    def job(self, layout: Layout, case: str, files: Files, steps: ScanSteps | None = None,
            reading: Frozen | None = None) -> CaseJob:  # fmt: skip
        """How one case is read and prepared. steps, reading: others than the layout's."""
        labels = self.labels_of(layout) or label_maps.of_names(dict(enumerate(self.class_names)))
        options = (reading or layout.reading).model_dump(mode="json")
        return CaseJob(case, files, layout.read, labels, layout.steps if steps is None else steps,
                       self.patient_of(case), options)  # fmt: skip

    def remedy(self) -> str:
        """Where to get the files, and how to lay them out."""
        ready, raw = ([f"'{layout.example()}'" for layout in self.layouts if layout.ready is wanted]
                      for wanted in (True, False))  # fmt: skip
        words = f"Get the files from {self.origin}"
        if ready:
            words += f", and lay them out as {' or '.join(dict.fromkeys(ready))}"
        if raw:
            words += (f"; raw files ({' or '.join(dict.fromkeys(raw))}) go through `cfrbench data prepare {self.name} "
                      "--raw DIR`")  # fmt: skip
        return words + "."

    def _refuse_raw(self, cases: Collection[str]) -> None:
        """Say how to prepare a folder that holds raw files only."""
        root = self.folder()
        raw = [] if cases else [layout for layout in self.layouts if not layout.ready and self.cases_of(layout)]
        if raw:
            raise DataError(f"{root} holds raw files of {self.title} ({raw[0].example()}). Prepare them once: cfrbench "
                            f"data prepare {self.name} --raw {root}")  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # lists

    def listed_split(self, cases: Collection[str], beside: Path) -> Split:
        """The split of ``cases`` by the lists ``beside`` the data, or by the field's; ``note`` counts a partial set."""
        official = [read_list(self.shipped()[role]) if role in self.shipped() else () for role in _ROLES]
        train, test, val = self._own(beside) or official
        self.refuse_bare(cases, [*train, *test, *val])
        present = self.members(cases)
        split = present_split(train, test, lambda name: name in present, val)
        split = _counted(split, official)
        expand = [tuple(case for name in getattr(split, role) for case in present[name]) for role in _ROLES]
        return Split(expand[0], expand[1], expand[2], split.note)

    def shipped(self) -> Mapping[str, Path]:
        """The field's lists by role."""
        return self.lists

    def members(self, cases: Collection[str]) -> Mapping[str, Sequence[str]]:
        """Name in a list -> cases that it stands for: itself, unless lists name patients."""
        return {case: (case,) for case in cases}

    def refuse_bare(self, cases: Collection[str], listed: Sequence[str]) -> None:
        """Hook for layouts in which a missing file can be told from a missing case."""

    def may_split_by_seed(self, cases: Collection[str], root: Path) -> bool:
        """Whether ``cases`` that no list names may be split by seed: if they are none of the field's, and no list says
        otherwise."""
        known = {name for path in self.shipped().values() for name in read_list(path)}
        return self._own(root) is None and not known & set(self.members(cases))

    def _own(self, folder: Path) -> list[tuple[str, ...]] | None:
        """Train, test and validation ids of the lists in ``folder``; None without any, DataError for one alone."""
        for names in self.own_lists:
            paths = [folder / name for name in names]
            here = [path.exists() for path in paths]
            if not any(here[:2]):
                continue
            if not all(here[:2]):
                raise DataError(f"{folder} has {names[here.index(True)]} but no {names[here.index(False)]}. Put both "
                                "beside the data, or neither to use the split of the field.")  # fmt: skip
            found = [self._ids(path) if path.exists() else () for path in paths]
            return [*found, ()][:3]
        return None

    def _ids(self, path: Path) -> tuple[str, ...]:
        names = read_list(path)
        if not self.id_pattern:
            return names
        hits = {name: re.search(self.id_pattern, name) for name in names}
        odd = [name for name, hit in hits.items() if not hit]
        if odd:
            raise DataError(f"The list {path} holds '{odd[0]}', in which no {self.title} id is found. Write one id a "
                            "line.")  # fmt: skip
        return tuple(dict.fromkeys(hit.group() for hit in hits.values() if hit))


def _counted(split: Split, official: Sequence[Sequence[str]]) -> Split:
    """Say so where the split is a part of the field's: its numbers are not those of the whole."""
    train, test, _ = official
    ours, whole = {*split.train, *split.test}, {*train, *test}
    if split.note or not ours < whole:
        return split
    note = f"{len(split.train)} of {len(train)} training and {len(split.test)} of {len(test)} test cases present"
    return dataclasses.replace(split, note=note)

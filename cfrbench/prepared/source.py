"""A prepared set as a `DataSource`. Built-ins derive from `PreparedSource`; `ImportedSource` is anybody's own set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from numpy.typing import NDArray
from pydantic import Field

from cfrbench.config import Frozen
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.prepared.form import DATASETS as DATASETS
from cfrbench.prepared.form import MANIFEST, SetRecord
from cfrbench.prepared.reading import PreparedSet
from cfrbench.scan_steps import ScanSteps
from cfrbench.volume import Split, Volume, checked_volume


def imported_folder(store: Path, name: str) -> Path:
    """Where the store keeps, or will keep, the imported set of this name."""
    return store / DATASETS / name


def imported_names(store: Path) -> list[str]:
    """Names of the finished imported sets of a store, sorted."""
    return sorted(path.parent.name for path in (store / DATASETS).glob(f"*/{MANIFEST}"))


def is_prepared(folder: Path | None) -> bool:
    """Whether the folder holds a finished prepared set."""
    return folder is not None and (folder / MANIFEST).is_file()


class PreparedSource(DataSource):
    """Cases, split and fingerprints of the prepared set in ``root``; class facts and protocol are the subclass's."""

    @cached_property
    def prepared(self) -> PreparedSet:
        """The set in the data root; DataError without one. Opening reads one manifest, whatever the set's size."""
        if self.root is None:
            raise DataError(f"{self.title} needs the folder of its prepared files: pass --data-root DIR.")
        return PreparedSet.open(self.root)

    def split(self) -> Split:
        """The lists of the manifest."""
        record = self.prepared.record
        return Split(record.train, record.test, record.val, record.note)

    def load(self, case: str) -> Volume:
        """Read one case, checksums verified; the image stays a memory map if it is stored as float32."""
        found = self.prepared
        record = found.case(case)
        found.verify(case)
        label = found.label(case)
        return checked_volume(f"{found.record.name} case {case}", torch.from_numpy(found.image(case)),
                              None if label is None else torch.from_numpy(label), self.num_classes,
                              record.spacing_mm)  # fmt: skip

    def fingerprint(self) -> Mapping[str, str]:
        """Hash of each case's arrays and voxel size, from the manifest: of the content, not of its place."""
        return dict(self.prepared.record.cases)

    def patients(self) -> Mapping[str, str]:
        """Patient of each case, from the manifest."""
        return dict(self.prepared.record.patients)

    def without_label(self) -> frozenset[str]:
        """Training cases without a label, from the manifest."""
        return frozenset(self.prepared.record.unlabelled)

    def signatures(self) -> Mapping[str, NDArray[Any]] | None:
        """Signature of each case, from the set."""
        return self.prepared.signatures()


class ImportedSource(PreparedSource):
    """A set of which the manifest says everything: classes, orientation, steps, protocol.

    What changes numbers is in the options, completed from the manifest, so that a stage's recipe holds it and a trained
    network can be used where the set is not.
    """

    class Config(Frozen):
        """Taken from the manifest if left empty; not meant to be set by hand."""

        classes: tuple[str, ...] = Field((), description="names of the classes, background first")
        axcodes: str = Field("RAS", description="orientation of the arrays")
        scan_steps: ScanSteps = Field(default_factory=ScanSteps, description="what a scan goes through before")

    config: Config
    title = "Imported"
    modality = "not stated"
    licence = "not stated"
    origin = "imported from a folder"
    class_names = ("background", "foreground")

    def __init__(self, config: Any = None, root: Path | None = None) -> None:
        super().__init__(config, root)
        facts: dict[str, Any] = {}
        if is_prepared(root):
            record = self.prepared.record
            known = {"classes": record.class_names, "axcodes": record.axcodes, "scan_steps": record.scan_steps}
            facts = {name: getattr(record, name) for name in ("title", "modality", "licence", "origin", "budgets")}
            facts["config"] = self.Config(**known)
        # What other sources state for their class is known here of each set alone.
        vars(self).update(facts)
        if self.config.classes:
            vars(self).update(class_names=self.config.classes, axcodes=self.config.axcodes,
                              scan_steps=self.config.scan_steps)  # fmt: skip

    def protocol(self, preset: str) -> Mapping[str, Any]:
        """What the import proposed for this preset, or whatever stands in the manifest now."""
        return self.prepared.record.protocol.get(preset, {})


def open_imported(store: Path, name: str) -> SetRecord:
    """What the manifest of an imported set says; DataError if the store has none of that name."""
    return PreparedSet.open(imported_folder(store, name)).record


def has_manifest(source: DataSource) -> TypeGuard[PreparedSource]:
    """Whether a data set is read from a prepared folder; public ones may also be read from the field's own files."""
    return isinstance(source, PreparedSource) and is_prepared(source.root)

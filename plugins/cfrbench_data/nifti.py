"""Anybody's own images: a folder that ``cfrbench data import`` has prepared, under the name it was given there.

``--dataset NAME`` finds it in the store; ``--dataset nifti --data-root FOLDER`` opens a prepared folder anywhere. Every
fact about the set stands in its manifest (`cfrbench.prepared.form`).
"""

from __future__ import annotations

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.source import ImportedSource


class Nifti(ImportedSource):
    """An imported set."""

    name = "nifti"
    title = "NIfTI"
    origin = "your own folder of NIfTI files, through `cfrbench data import`"


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The imported sets."""
    return [Nifti]

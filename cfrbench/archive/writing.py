"""`cfrbench export`: a finished run of a store as one archive (`cfrbench.archive.form` says what lies in it)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import __version__
from cfrbench.archive.cells import Scored, manifests, scored_cells
from cfrbench.archive.form import (
    COLUMNS,
    FORMAT,
    MANIFEST,
    REQUEST,
    SCORES,
    STAGES,
    SUMMARY,
    CaseRecord,
    DataRecord,
    FileRecord,
    Manifest,
    prediction_file,
    score_rows,
    seal_of,
    truth_checksum,
    truth_file,
)  # fmt: skip
from cfrbench.config import write_toml
from cfrbench.errors import DataError, StoreError, UsageError
from cfrbench.files import plain, sha256_file, storage_errors, sync
from cfrbench.formats import read_table
from cfrbench.images import encode_volume
from cfrbench.recipes import SCORES as SCORES_TABLE
from cfrbench.recipes import open_source
from cfrbench.report import frames
from cfrbench.store import Store
from cfrbench.sweep import Result, recall

if TYPE_CHECKING:
    from cfrbench.contracts import DataSource

#: the first day that a ZIP file can name: an archive does not say when it was written
_DAY = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Exported:
    """What was written: cells, label maps, bytes, and the archive's own SHA-256, which a paper can print."""

    path: Path
    cells: int
    predictions: int
    bytes: int
    sha256: str
    licence: str


def export_run(reference: str, store: Path, output: Path, *, with_truth: bool = False) -> Exported:
    """Write the archive of a run. UsageError if a cell of it is not finished, StoreError if its masks have gone."""
    home, result = Store(store), recall(reference, store)
    record = home.run(result.name)
    scored = _all_cells(record, home)
    config = result.config
    source = open_source(config.dataset, config.data_root, config.set)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors("write", output):
        try:
            with _Writer(temporary) as writer:
                count = _write(writer, result, record, scored, source, home, with_truth)
            sync(temporary)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    return Exported(output, len(scored), count, output.stat().st_size, sha256_file(output), source.licence)


def _write(
    writer: _Writer, result: Result, record: Mapping[str, Any], scored: list[Scored], source: DataSource, home: Store,
    with_truth: bool,
) -> int:  # fmt: skip
    """Fill the archive, the table of contents last; how many label maps it holds."""
    cases: dict[str, CaseRecord] = {}
    fingerprint = source.fingerprint()
    count = 0
    for one in scored:
        for case, mask in one.label_maps().items():
            if case not in cases:
                cases[case], truth = _case(source, case, fingerprint)
                if with_truth:
                    writer.add(truth_file(case), encode_volume(truth, cases[case].spacing_mm, source.axcodes))
            payload = encode_volume(mask, cases[case].spacing_mm, source.axcodes)
            writer.add(prediction_file(one.record.name, case), payload)
            count += 1
    writer.add(SCORES, _scores_text(scored).encode())
    writer.add_json(SUMMARY, frames.json_rows(frames.summary(result.cases), result.facts["unit"]))
    # Where the data lay is nobody else's business, and of no use elsewhere.
    writer.add(REQUEST, write_toml(result.config.model_copy(update={"data_root": None})).encode())
    writer.add_json(STAGES, list(_stages(record, home)))
    manifest = Manifest(
        format=FORMAT, made_by=f"cfrbench {__version__}", run=result.name, facts=plain(result.facts),
        protocol=f"preset {result.facts['preset']}; {result.facts['protocol']}", data=_data(scored, source),
        cells=tuple(one.record for one in scored), cases=cases, files=writer.files,
    )  # fmt: skip
    writer.add_json(MANIFEST, manifest.model_copy(update={"seal": seal_of(manifest)}).model_dump(mode="json"))
    return count


def _all_cells(record: Mapping[str, Any], home: Store) -> list[Scored]:
    """Every cell of a run; UsageError if one has no scores, StoreError if the label maps of one have gone."""
    found, missing = scored_cells(record, home)
    if missing:
        raise UsageError(f"The run {record['name']} is half finished: {len(missing)} of {len(record['cells'])} cells "
                         f"have no scores: {'; '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Give its "
                         "command again, then export it.")  # fmt: skip
    for one in found:
        if one.masks is None:
            raise StoreError(f"The label maps of {one.words} are no longer in {home.root}. Give the run's command "
                             "again.")  # fmt: skip
    return found


def _case(source: DataSource, case: str, fingerprint: Mapping[str, str]) -> tuple[CaseRecord, Any]:
    volume = source.load(case)
    if volume.label is None:
        raise DataError(f"The case {case} of {source.title} has no label any more, but it was scored. Restore its file "
                        "before you export the run.")  # fmt: skip
    truth = volume.label.numpy()
    record = CaseRecord(fingerprint=fingerprint[case], shape=volume.shape, spacing_mm=volume.spacing_mm,
                        truth_sha256=truth_checksum(truth, volume.spacing_mm))  # fmt: skip
    return record, truth


def _scores_text(scored: list[Scored]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in scored:  # floats are written as Python prints them, so they come back bit for bit
        writer.writerows(score_rows(one.record, read_table(one.scores.path(SCORES_TABLE)).to_dict("records")))
    return text.getvalue()


def _stages(record: Mapping[str, Any], home: Store) -> Iterator[dict[str, Any]]:
    """What is known of each stage that the run stands on."""
    wanted = ("stage", "key", "title", "needs", "recipe", "environment", "attempts", "seconds", "peak_mib")
    for manifest in manifests(record, home):
        yield {name: manifest[name] for name in wanted}


def _data(scored: list[Scored], source: DataSource) -> DataRecord:
    plugin = scored[0].scores.manifest["recipe"]["data"]
    return DataRecord(name=plugin["name"], version=plugin["version"], options=plugin["options"], title=source.title,
                      licence=source.licence, origin=source.origin, synthetic=source.synthetic,
                      class_names=source.class_names, axcodes=source.axcodes)  # fmt: skip


class _Writer:
    """A ZIP file that records the checksum of everything put into it; equal content, equal bytes."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, FileRecord] = {}
        self._zip = zipfile.ZipFile(path, "w")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def add(self, name: str, payload: bytes) -> None:
        """Add a file; what is compressed already is stored as it is."""
        entry = zipfile.ZipInfo(name, _DAY)
        entry.compress_type = zipfile.ZIP_STORED if name.endswith(".gz") else zipfile.ZIP_DEFLATED
        entry.external_attr = 0o644 << 16
        entry.create_system = 3  # the same on every system
        self._zip.writestr(entry, payload)
        self.files[name] = FileRecord(sha256=hashlib.sha256(payload).hexdigest(), bytes=len(payload))

    def add_json(self, name: str, value: Any) -> None:
        """Add a value as JSON for people."""
        self.add(name, (json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())

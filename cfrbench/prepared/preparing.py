"""A public data set, raw or as the field passes it around, becomes a prepared folder.

    found = look(request)           which layout, which cases, which split: nothing is written
    done = prepare_set(request)     prepared cases, copies looked for, manifest

Given again, `prepare_set` verifies what is finished and goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfrbench import __version__
from cfrbench.config import Frozen, digest, validate
from cfrbench.errors import DataError, UsageError
from cfrbench.prepared.filling import Progress, alone, make_room, prepared, silent, without_copies
from cfrbench.prepared.form import CaseRecord, SetRecord, checked_case
from cfrbench.prepared.places import Files, Layout
from cfrbench.prepared.public import PublicSource
from cfrbench.prepared.reading import PreparedSet, seal
from cfrbench.prepared.splits import Candidate, SplitChoice, make_split
from cfrbench.prepared.writing import CaseJob, remove_cases
from cfrbench.scan_steps import ScanSteps
from cfrbench.volume import Split


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, and how. steps, reading: values that replace those of the layout. lists: folder of own lists.

    source: the data set, opened on the folder that holds its files.
    """

    source: PublicSource
    folder: Path
    layout: str | None = None
    steps: Mapping[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    lists: Path | None = None
    split: SplitChoice = field(default_factory=SplitChoice)
    skip_bad: bool = False
    replace: bool = False
    jobs: int = 1

    @property
    def identity(self) -> str:
        """Hash of everything that decides what the set becomes, but the files."""
        return digest([self.source.name, self.source.config, self.layout, dict(self.steps), dict(self.reading),
                       self.split, self.skip_bad])  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What a folder holds. cases: those of the split, by id; left_out: case -> why."""

    layout: str
    cases: Mapping[str, tuple[Layout, Files]]
    split: Split
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Done:
    """A finished preparation; notes: what a person should know about it, a sentence each."""

    prepared: PreparedSet
    look: Look
    notes: tuple[str, ...]


def look(request: PrepareRequest) -> Look:
    """Find the cases of one layout and their split; DataError if there are none."""
    source = request.source
    root = source.folder()
    name, found = _found(request, root)
    whole = {case: entry for case, entry in found.items() if {"pair", "image"} & entry[1].keys()}
    left_out = dict.fromkeys(found.keys() - whole.keys(), "without an image")
    left_out |= {case: reason for case, reason in source.excluded().items() if case in whole}
    cases = {checked_case(case): entry for case, entry in whole.items() if case not in left_out}
    split = _split(request, cases, root)
    listed = {*split.train, *split.test, *split.val}
    left_out |= dict.fromkeys(cases.keys() - listed, "in no list")
    return Look(name, {case: cases[case] for case in (*split.train, *split.val, *split.test)}, split, left_out)


def _found(request: PrepareRequest, root: Path) -> tuple[str, dict[str, tuple[Layout, Files]]]:
    """The layout's name and its cases; UsageError if the choice is open."""
    source = request.source
    names = list(dict.fromkeys(layout.name for layout in source.layouts))
    if request.layout is not None and request.layout not in names:
        raise UsageError(f"{source.title} has no layout '{request.layout}'. Choose one of {', '.join(names)}.")
    by_name: dict[str, dict[str, tuple[Layout, Files]]] = {}
    for layout in source.layouts:
        if request.layout in (None, layout.name):
            for case, files in source.cases_of(layout).items():
                by_name.setdefault(layout.name, {}).setdefault(case, (layout, files))
    if not by_name:
        tried = ", ".join(dict.fromkeys(layout.example() for layout in source.layouts))
        raise DataError(f"{root} holds no file of {source.title}. Looked for {tried}. {source.remedy()}")
    if len(by_name) > 1:
        counts = ", ".join(f"{name} ({len(cases)} cases)" for name, cases in by_name.items())
        raise UsageError(f"{root} holds {source.title} in several layouts: {counts}. Choose one with --layout.")
    return next(iter(by_name.items()))


def _split(request: PrepareRequest, cases: Mapping[str, Any], root: Path) -> Split:
    """By lists where they name cases that are here; by seed otherwise."""
    source = request.source
    if not cases:
        raise DataError(f"{root} holds no usable case of {source.title}. {source.remedy()}")
    try:
        return source.listed_split(list(cases), request.lists or root)
    except DataError as error:
        if request.lists is not None or not source.may_split_by_seed(list(cases), root):
            raise DataError(f"{source.title} data in {root}: {error}") from error
    labelled = [case for case, (_, files) in cases.items() if {"pair", "label"} & files.keys()]
    candidates = [Candidate(case, source.patient_of(case), case in labelled) for case in cases]
    split, _ = make_split(candidates, request.split)
    note = f"own split with seed {request.split.seed}, patients kept together"
    return Split(split.train, split.test, split.val, note)


# ---------------------------------------------------------------------------------------------------------------------
# preparing


def prepare_set(request: PrepareRequest, progress: Progress = silent, seen: Look | None = None) -> Done:
    """Prepare the cases of the split into ``request.folder``.

    DataError for files that cannot be used (unless they are to be skipped) and for one image under two names.
    """
    seen = seen or look(request)
    source = request.source
    with alone(request.folder, f"preparing {source.title} in {request.folder}", "folder with -o"):
        make_room(request.folder, request.identity, source.folder(), request.replace,
                  f"{request.folder} holds a prepared data set already, made", "folder with -o")  # fmt: skip
        records, bad = prepared(request.folder, _jobs(request, seen), request.jobs, {}, request.skip_bad, progress)
        records, notes = without_copies(records, bad, request.skip_bad)
        record = _set_record(request, seen, records, bad)
        done = seal(request.folder, record, records)
        remove_cases(request.folder, keep=done.record.cases)
    told = [f"left out: {case}: {reason}." for case, reason in list(record.left_out.items())[:20]]
    return Done(done, seen, (*notes, *told, *_uncropped(record.scan_steps, records)))


def _uncropped(steps: ScanSteps, records: Sequence[CaseRecord]) -> list[str]:
    """A note where a crop to what is not 0 found nothing to cut off: the background is not 0 then."""
    whole = [r for r in records if r.placement.start == (0, 0, 0)
             and max(np.subtract(r.placement.shape, r.placement.stop)) <= 1]  # fmt: skip
    if not (steps.crop.startswith("nonzero") and whole):
        return []
    return [f"Nothing was cut off {len(whole)} cases ({whole[0].case} for example, whose darkest voxel is "
            f"{whole[0].statistics.low:.4g} after all steps): if their background is not 0, give --crop above-minimum "
            "and --normalise zscore-above-minimum."]  # fmt: skip


def settled(request: PrepareRequest, layout: Layout) -> tuple[ScanSteps, Frozen]:
    """Steps and reading of a layout with the values that replace them; ConfigError if one is unknown or wrong."""
    steps = validate(ScanSteps, {**layout.steps.model_dump(), **request.steps}, "the steps")
    reading = validate(type(layout.reading), {**layout.reading.model_dump(), **request.reading},
                       f"the options of the layout {layout.name}")  # fmt: skip
    return steps, reading


def _jobs(request: PrepareRequest, seen: Look) -> list[CaseJob]:
    made = {id(layout): settled(request, layout) for layout, _ in seen.cases.values()}
    return [request.source.job(layout, case, files, *made[id(layout)]) for case, (layout, files) in seen.cases.items()]


def _set_record(
    request: PrepareRequest, seen: Look, records: Sequence[CaseRecord], bad: Mapping[str, str]
) -> SetRecord:
    source = request.source
    here = {record.case for record in records}
    kept = {role: tuple(case for case in getattr(seen.split, role) if case in here)
            for role in ("train", "test", "val")}  # fmt: skip
    layout = next(iter(seen.cases.values()))[0]
    steps, reading = settled(request, layout)
    job = source.job(layout, "", {}, steps, reading)
    skipped = f"; {len(bad)} left out" * bool(bad)
    return SetRecord(
        name=source.name, title=source.title, modality=source.modality, licence=source.licence, origin=source.origin,
        class_names=source.class_names, labels={str(raw): number for raw, number in job.labels.values.items()},
        axcodes=Counter(record.axcodes for record in records).most_common(1)[0][0], scan_steps=steps,
        **kept, note=seen.split.note + skipped, budgets=dict(source.budgets), cases={},
        left_out={**seen.left_out, **bad},
        made={"source": str(source.folder().absolute()), "layout": layout.name, "identity": request.identity,
              "version": __version__, "labels": job.labels.stated(), "reading": reading.model_dump(mode="json"),
              "options": source.config.model_dump(mode="json")},
    )  # fmt: skip

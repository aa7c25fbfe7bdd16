"""Anybody's folder of NIfTI files becomes a prepared set in a store, under a name.

    found = survey_folder(request)      which files, what is wrong with them, which classes: nothing is written
    done = import_folder(request)       prepared cases, copies looked for, split, manifest

Everything wrong is gathered before it is told; what is finished is kept, so the corrected command goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cfrbench import __version__
from cfrbench.config import digest
from cfrbench.errors import ConfigError, UsageError, suggest
from cfrbench.prepared import label_maps
from cfrbench.prepared.filling import Progress, alone, make_room, prepared, refusal, silent, without_copies
from cfrbench.prepared.form import CaseRecord, SetRecord
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.pair_reader import Reading, Surveyed, read_pair, survey
from cfrbench.prepared.pairs import Found, Pair, Search, find_pairs
from cfrbench.prepared.parallel import each
from cfrbench.prepared.proposals import propose, target_spacing
from cfrbench.prepared.reading import PreparedSet, seal
from cfrbench.prepared.source import imported_folder
from cfrbench.prepared.splits import Candidate, SplitChoice, make_split
from cfrbench.prepared.writing import CaseJob, remove_cases
from cfrbench.scan_steps import ScanSteps


@dataclass(frozen=True)
class ImportRequest:
    """What to import, as what, and how. builtin: names of data sets that are taken."""

    source: Path
    name: str
    store: Path
    builtin: Collection[str] = ()
    search: Search = field(default_factory=Search)
    reading: Reading = field(default_factory=Reading)
    split: SplitChoice = field(default_factory=SplitChoice)
    steps: ScanSteps = field(default_factory=ScanSteps)
    labels: str | None = None  # as `label_maps.parse` takes it
    skip_bad: bool = False
    replace: bool = False
    jobs: int = 1

    @property
    def folder(self) -> Path:
        """Where the set lies or will lie."""
        return imported_folder(self.store.absolute(), self.name)

    @property
    def identity(self) -> str:
        """Hash of everything that decides what the set becomes, but the files."""
        return digest([self.reading, self.split, self.steps, self.labels, self.skip_bad,
                       [self.search.channel, self.search.contrast, self.search.patient_pattern]])  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What a folder holds. bad: case -> why it cannot be used."""

    found: Found
    cases: Mapping[str, Surveyed]
    labels: LabelMap
    bad: Mapping[str, str]

    @property
    def usable(self) -> list[Pair]:
        """The pairs that nothing is wrong with."""
        return [pair for pair in self.found.pairs if pair.case not in self.bad]


@dataclass(frozen=True)
class Imported:
    """A finished import; notes: what a person should know about it, a sentence each."""

    prepared: PreparedSet
    survey: Survey
    notes: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# looking


def survey_folder(request: ImportRequest, progress: Progress = silent) -> Survey:
    """Find the pairs, read every header and label, settle the classes. DataError if no case is left."""
    _check_name(request)
    found = find_pairs(request.source, request.search)
    cases: dict[str, Surveyed] = {}
    looked = each(partial(survey, request.reading), found.pairs, request.jobs)
    for done, (number, what) in enumerate(looked, 1):
        cases[found.pairs[number].case] = what
        progress("looking at", done, len(found.pairs))
    cases = {pair.case: cases[pair.case] for pair in found.pairs}
    bad = {case: seen.problem for case, seen in cases.items() if seen.problem}
    if len(bad) == len(cases):
        raise refusal(bad, len(cases))
    labels = _label_map(request, found, cases)
    if labels.other is None:
        for case, seen in cases.items():
            odd = sorted(set(seen.counts) - set(labels.values))
            if odd:
                bad[case] = (f"{_label_of(found, case)} holds {', '.join(map(str, odd[:8]))}, which dataset.json does "
                             f"not name ({labels.stated()}). Name every value with --labels-map.")  # fmt: skip
    return Survey(found, cases, labels, bad)


def _check_name(request: ImportRequest) -> None:
    name = request.name
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or not name[0].isalnum():
        raise UsageError(f"'{name}' cannot name a data set. Use letters, digits, '.', '_' and '-', beginning with a "
                         "letter or a digit.")  # fmt: skip
    if name in request.builtin:
        raise UsageError(f"'{name}' is a built-in data set. Import your folder under another --name, for example "
                         f"my-{name}.")  # fmt: skip


def _label_map(request: ImportRequest, found: Found, cases: Mapping[str, Surveyed]) -> LabelMap:
    if request.labels is not None:
        return label_maps.parse(request.labels)
    if found.class_names:
        return label_maps.of_names(found.class_names)
    seen: Counter[int] = Counter()
    for case in cases.values():
        seen.update(case.counts)
    return label_maps.inferred(seen)


def _label_of(found: Found, case: str) -> Path | None:
    return next(pair.label for pair in found.pairs if pair.case == case)


# ---------------------------------------------------------------------------------------------------------------------
# importing


def with_own_spacing(request: ImportRequest, seen: Survey) -> ImportRequest:
    """The request, resampling to the voxel size that suits all cases."""
    spacing = target_spacing([case.spacing_mm for case in seen.cases.values() if not case.problem])
    return replace(request, steps=request.steps.model_copy(update={"spacing_mm": spacing}))


def import_folder(request: ImportRequest, progress: Progress = silent, seen: Survey | None = None) -> Imported:
    """Prepare the folder as the set ``request.name`` of the store. Given again, it verifies and goes on.

    DataError for files that cannot be used (unless they are to be skipped) and for one image under two names.
    """
    seen = seen or survey_folder(request, progress)
    if seen.bad and not request.skip_bad:
        raise refusal(seen.bad, len(seen.cases))
    with alone(request.folder, f"importing '{request.name}' into {request.store}", "--name"):
        make_room(request.folder, request.identity, request.source, request.replace,
                  f"The store {request.store} has a data set '{request.name}' already, imported", "--name")  # fmt: skip
        jobs = _jobs(request, seen)
        records, bad = prepared(request.folder, jobs, request.jobs, seen.bad, request.skip_bad, progress)
        records, notes = without_copies(records, bad, request.skip_bad)
        record, left_out = _set_record(request, seen, records, bad)
        done = seal(request.folder, record, records)
        remove_cases(request.folder, keep=done.record.cases)
    return Imported(done, seen, (*notes, *_notes(seen, records, left_out)))


def _jobs(request: ImportRequest, seen: Survey) -> list[CaseJob]:
    options = request.reading.model_dump(mode="json")
    return [
        CaseJob(pair.case, {"image": pair.image} | ({"label": pair.label} if pair.label else {}), read_pair,
                seen.labels, request.steps, pair.patient, options)
        for pair in seen.usable
    ]  # fmt: skip


def _set_record(
    request: ImportRequest, seen: Survey, records: Sequence[CaseRecord], bad: Mapping[str, str]
) -> tuple[SetRecord, dict[str, str]]:
    """The manifest, and every file and case that is in no list with the reason."""
    pairs = {pair.case: pair for pair in seen.found.pairs}
    candidates = [_candidate(record, pairs[record.case]) for record in records]
    split, held_back = make_split(candidates, _reachable(request.split, candidates, bad))
    left_out = {**seen.found.left_out, **bad, **held_back}
    labelled = sum(1 for record in records if record.label and record.case in split.train)
    facts = seen.found.facts
    record = SetRecord(
        name=request.name, title=facts.get("title", request.name),
        **{key: facts[key] for key in ("modality", "licence", "origin") if key in facts},
        class_names=seen.labels.names, labels={str(raw): number for raw, number in seen.labels.values.items()},
        axcodes=request.reading.axcodes, scan_steps=request.steps,
        train=split.train, test=split.test, val=split.val, note=_split_words(request.split, candidates),
        budgets={"scarce": 1, "moderate": max(1, round(labelled / 5))},
        protocol=propose([record.shape for record in records]), cases={}, left_out=left_out,
        made={"source": str(request.source.absolute()), "layout": seen.found.layout, "identity": request.identity,
              "version": __version__, "labels": seen.labels.stated(), "split": request.split.model_dump(mode="json"),
              "target_spacing_mm": target_spacing([record.spacing_mm for record in records])},
    )  # fmt: skip
    return record, left_out


def _candidate(record: CaseRecord, pair: Pair) -> Candidate:
    size = float(record.spacing_mm[0] * record.spacing_mm[1] * record.spacing_mm[2])
    present = tuple(number for number, count in enumerate(record.voxels) if number and count)
    return Candidate(record.case, record.patient, record.label is not None, pair.role, pair.stratum,
                     size * sum(record.voxels[1:]), present)  # fmt: skip


def _reachable(choice: SplitChoice, candidates: Sequence[Candidate], bad: Mapping[str, str]) -> SplitChoice:
    """The choice without cases that were skipped; ConfigError if a list names one that never was."""
    known = {candidate.case for candidate in candidates}
    for names in (choice.labelled, choice.test_cases, choice.val_cases):
        for name in names:
            if name not in known and name not in bad:
                raise ConfigError(f"'{name}' was listed, but is no case here. {suggest(name, sorted(known)[:50])}")
    kept = {key: tuple(name for name in getattr(choice, key) if name in known)
            for key in ("labelled", "test_cases", "val_cases")}  # fmt: skip
    return choice.model_copy(update=kept)


def _split_words(choice: SplitChoice, candidates: Sequence[Candidate]) -> str:
    given = {candidate.role for candidate in candidates} - {""}
    how = "as the folder has it" if given else f"own split with seed {choice.seed}"
    patients = len({candidate.patient for candidate in candidates})
    alike = f", stratified by {choice.stratify}" * (choice.stratify != "none")
    return f"{how}, {patients} patients kept together{alike}"


def _notes(seen: Survey, records: Sequence[CaseRecord], left_out: Mapping[str, str]) -> list[str]:
    """What the data say about themselves that a person should weigh."""
    notes = [f"left out: {name}: {reason}." for name, reason in list(left_out.items())[:20]]
    stored = Counter(case.stored for case in seen.cases.values() if case.stored)
    if len(stored) > 1:
        kinds = ", ".join(f"{count} {codes}" for codes, count in stored.most_common())
        notes.append(f"The files differ in orientation ({kinds}); all are turned to {records[0].axcodes}.")
    spacing = target_spacing([record.spacing_mm for record in records])
    thick = max(range(3), key=lambda axis: spacing[axis])
    if spacing[thick] > 2 * min(spacing) and thick != 2:
        axes = records[0].axcodes
        order = "".join(axes[axis] for axis in range(3) if axis != thick) + axes[thick]
        notes.append(f"Slices are cut along the last axis, {axes[2]}, but voxels are thickest along {axes[thick]}: "
                     f"--axcodes {order} cuts where the scanner did.")  # fmt: skip
    spread = [max(r.spacing_mm[a] for r in records) / min(r.spacing_mm[a] for r in records) for a in range(3)]
    if max(spread) > 1.5:
        notes.append(f"Voxel sizes differ by a factor of {max(spread):.1f} between cases: --spacing "
                     f"{','.join(f'{s:g}' for s in spacing)} brings them onto one.")  # fmt: skip
    return notes

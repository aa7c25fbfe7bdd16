"""Seeded splits that keep patients together, and the order of the training list, whose first cases are labelled.

A random order is the order of SHA-256 over seed and patient: it is the same on every machine, and a patient who is
added moves no other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cfrbench.config import Frozen
from cfrbench.errors import ConfigError, DataError, suggest
from cfrbench.prepared.naming import natural
from cfrbench.volume import Split


class SplitChoice(Frozen):
    """What a person may ask of a split. Lists name cases; a listed case takes its patient along."""

    seed: int = Field(0, ge=0)
    test: float = Field(0.2, ge=0, description="share of the patients below 1, their number from 1 on")
    val: float = Field(0.0, ge=0, description="the same for validation")
    stratify: Literal["none", "volume", "classes", "column"] = Field(
        "none", description="alike in labelled volume (thirds), classes present, or the column stratum of a .csv"
    )
    order: Literal["name", "seed"] = Field("name", description="of the training list")
    labelled: tuple[str, ...] = Field((), description="these training cases come first, in this order")
    test_cases: tuple[str, ...] = ()
    val_cases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """What a split is made of. volume: of all that is labelled, in any unit; classes: those present."""

    case: str
    patient: str
    labelled: bool
    role: str = ""
    stratum: str = ""
    volume: float = 0.0
    classes: tuple[int, ...] = ()


Groups = dict[str, list[Candidate]]


def make_split(cases: Sequence[Candidate], choice: SplitChoice) -> tuple[Split, dict[str, str]]:
    """The split, and the cases that are in no list with the reason. Test and validation hold labelled cases only.

    DataError if fewer than two patients with labels are there, or a patient is asked to be in two lists.
    """
    _require_known(cases, choice)
    patients: Groups = defaultdict(list)
    for case in cases:
        patients[case.patient].append(case)
    given = {patient: _given_role(patient, group, choice) for patient, group in patients.items()}
    strata = _strata(patients, choice.stratify)
    free = [p for p, role in given.items() if not role and any(c.labelled for c in patients[p])]
    order = evenly(free, strata, choice.seed)
    whole = len(free) + sum(1 for role in given.values() if role)
    chosen = {"test": [p for p in given if given[p] == "test"], "val": [p for p in given if given[p] == "val"]}
    for role, share in (("test", choice.test), ("val", choice.val)):
        count = 0 if chosen[role] else _count(role, share, whole, len(order))
        chosen[role], order = chosen[role] + order[:count], order[count:]
    held = {*chosen["test"], *chosen["val"]}
    train = [c for patient, group in patients.items() if patient not in held for c in group]
    lists = {role: _in_order([c for p in chosen[role] for c in patients[p] if c.labelled]) for role in chosen}
    left_out = {c.case: f"without a label, and its patient {p} is held out" for p in held for c in patients[p]
                if not c.labelled}  # fmt: skip
    ordered = _training_order(train, strata, choice)
    if not lists["test"] or not any(c.labelled for c in train):
        raise DataError(f"{len(patients)} patients with {sum(c.labelled for c in cases)} labelled cases cannot be "
                        "split into training and test. Add labelled cases, or name the test cases.")  # fmt: skip
    return Split(ordered, lists["test"], lists["val"]), left_out


def _require_known(cases: Sequence[Candidate], choice: SplitChoice) -> None:
    by_name = {case.case: case for case in cases}
    for option, names in (("--labelled", choice.labelled), ("--test-cases", choice.test_cases),
                          ("--val-cases", choice.val_cases)):  # fmt: skip
        for name in names:
            if name not in by_name:
                raise ConfigError(f"{option} names '{name}', which is no case of this folder. "
                                  f"{suggest(name, list(by_name)[:50])}")  # fmt: skip
            if not by_name[name].labelled:
                raise ConfigError(f"{option} names '{name}', which has no label. Choose cases with one.")


def _given_role(patient: str, group: Sequence[Candidate], choice: SplitChoice) -> str:
    """The list a patient was put into by the folder, the table or the options; "" if it is free."""
    asked = {"test": choice.test_cases, "val": choice.val_cases, "train": choice.labelled}
    named: dict[str, str] = {}
    for case in group:
        for role in [role for role, names in asked.items() if case.case in names] or [case.role]:
            named.setdefault(role, case.case)
    named.pop("", None)
    if len(named) > 1:
        (a, first), (b, second) = sorted(named.items())[:2]
        raise DataError(f"{first} is to be in the {a} list and {second} in the {b} list, but both are of the patient "
                        f"'{patient}'; scores on patients seen in training mean nothing. Put them into one list, or "
                        "correct the patients (column patient of a .csv, or --patient-pattern).")  # fmt: skip
    return next(iter(named), "")


def _count(role: str, share: float, whole: int, free: int) -> int:
    """How many patients a list gets: a share of all, or their number; at least one, and one is left for training."""
    wanted = 0 if not share else round(share) if share >= 1 else max(1, round(share * whole))
    if wanted > max(0, free - 1) and share >= 1:
        raise ConfigError(f"--{role} {wanted} asks for {wanted} patients, but only {free} are free, and one must stay "
                          "for training. Ask for fewer.")  # fmt: skip
    return min(wanted, max(0, free - 1))


def evenly(patients: Sequence[str], strata: Mapping[str, str], seed: int) -> list[str]:
    """A random order of ``patients`` in which every beginning holds each stratum in proportion."""
    groups: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(patients, key=lambda p: _draw(seed, p)):
        groups[strata.get(patient, "")].append(patient)
    places = {p: ((n + 0.5) / len(group), _draw(seed, p)) for group in groups.values() for n, p in enumerate(group)}
    return sorted(patients, key=lambda p: places[p])


def _draw(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def _strata(patients: Groups, by: str) -> dict[str, str]:
    """Stratum of each patient; empty if none are wanted."""
    if by == "column":
        return {p: group[0].stratum for p, group in patients.items()}
    if by == "classes":
        return {p: ",".join(map(str, sorted({n for c in group for n in c.classes}))) for p, group in patients.items()}
    if by == "volume":
        sizes = {p: max(c.volume for c in group) for p, group in patients.items() if any(c.labelled for c in group)}
        ranked = sorted(sizes, key=lambda p: (sizes[p], p))
        return {p: str(3 * place // len(ranked)) for place, p in enumerate(ranked)}
    return {}


def _in_order(cases: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(sorted((c.case for c in cases), key=natural))


def _training_order(cases: Sequence[Candidate], strata: Mapping[str, str], choice: SplitChoice) -> tuple[str, ...]:
    """Cases with labels before those without; among them those that were listed, then by name or by seed."""
    names = _in_order(cases)
    labelled = {c.case for c in cases if c.labelled}
    first = [case for case in choice.labelled if case in labelled]
    if choice.order == "seed":
        patients = {c.case: c.patient for c in cases}
        places = {p: n for n, p in enumerate(evenly(sorted(set(patients.values())), strata, choice.seed))}
        names = tuple(sorted(names, key=lambda case: places[patients[case]]))
    rest = [case for case in names if case in labelled and case not in first]
    return (*first, *rest, *(case for case in names if case not in labelled))

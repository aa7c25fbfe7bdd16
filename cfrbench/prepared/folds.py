"""Other ways to use the cases of a split: folds of cross-validation, and other labelled cases.

Both are drawn as splits are (`cfrbench.prepared.splits`): the same seed gives the same lists on every machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from cfrbench.errors import ConfigError
from cfrbench.prepared.naming import natural, patient_of
from cfrbench.prepared.splits import evenly
from cfrbench.volume import Split


def folds(split: Split, patients: Mapping[str, str], unlabelled: Collection[str], count: int, seed: int) -> list[Split]:
    """``count`` splits of all cases of ``split``: each labelled one is tested in one of them, with its patient's.

    Where ``patients`` does not say whose a case is, its id without time points, frames and visits does. Training lists
    keep the order of ``split``, cases without a label last, and are cut to the length of the shortest, so that rows of
    all folds count alike. ConfigError if fewer than ``count`` patients have a label.
    """
    pool = (*split.train, *split.val, *split.test)
    groups: dict[str, list[str]] = defaultdict(list)
    for case in pool:
        groups[patients.get(case) or patient_of(case)].append(case)
    known = [patient for patient, cases in groups.items() if not set(cases) <= set(unlabelled)]
    if not 2 <= count <= len(known):
        raise ConfigError(f"--folds {count} cannot be: {len(known)} patients have a label, so there are 2 to "
                          f"{len(known)} folds.")  # fmt: skip
    order = evenly(known, {}, seed)
    held = [{case for patient in order[fold::count] for case in groups[patient]} for fold in range(count)]
    cases = sorted(pool, key=lambda case: case in unlabelled)  # otherwise as they stand
    train = [[case for case in cases if case not in fold] for fold in held]
    shortest = min(map(len, train))
    test = [sorted((case for case in fold if case not in unlabelled), key=natural) for fold in held]
    return [Split(tuple(seen[:shortest]), tuple(unseen)) for seen, unseen in zip(train, test, strict=True)]


def with_labels_of(split: Split, unlabelled: Collection[str], seed: int) -> Split:
    """The split with its labelled training cases in a random order: its first cases are other labelled ones.

    Fewer labelled cases are the first of more.
    """
    known = evenly([case for case in split.train if case not in unlabelled], {}, seed)
    return replace(split, train=(*known, *(case for case in split.train if case in unlabelled)))

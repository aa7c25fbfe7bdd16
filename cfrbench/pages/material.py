"""What a page is made of: a run's scores, its label maps, and, where they can be read, the volumes behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cfrbench.archive.cells import Scored, scored_cells
from cfrbench.artifact import Artifact
from cfrbench.contracts import DataSource
from cfrbench.errors import CfrbenchError, StoreError
from cfrbench.formats import read_labels
from cfrbench.recipes import STORED, open_source, task
from cfrbench.report.pictures import telling_cases
from cfrbench.stages import StageWork
from cfrbench.store import Store
from cfrbench.sweep import Result, recall
from cfrbench.volume import Volume

Mask = NDArray[np.uint8]
#: what a pseudo-label is called wherever it stands beside predictions
PSEUDO = "pseudo-label"
Spacing = tuple[float, float, float]
#: images in memory at a time
HELD = 12


@dataclass(frozen=True)
class Layer:
    """Label maps of test cases under one name, and their Dice in percent; ``key`` is unique within the run."""

    key: str
    name: str
    masks: Mapping[str, Mask]
    dice: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """What is looked at together: the forms of one method at one budget and seed, and the pseudo-labels they saw."""

    title: str
    ssl: str
    labels: int
    seed: int
    layers: tuple[Layer, ...]

    def gains(self) -> dict[str, float]:
        """Case -> Dice of the last form minus that of the first; empty unless there are two."""
        forms = [layer for layer in self.layers if layer.name != PSEUDO]
        if len(forms) < 2:
            return {}
        return {case: forms[-1].dice[case] - dice for case, dice in forms[0].dice.items() if case in forms[-1].dice}


@dataclass
class Material:
    """A recalled run. ``notes`` collects what the page must say is missing, and why."""

    result: Result
    record: Mapping[str, Any]
    home: Store
    cells: list[Scored]
    notes: list[str] = field(default_factory=list)
    _volumes: dict[str, Volume] = field(default_factory=dict)
    _truths: dict[str, tuple[Mask, Spacing]] = field(default_factory=dict)

    @classmethod
    def of(cls, reference: str, store: Path) -> Material:
        """Recall a run and find its artifacts; cells that are not finished become a note."""
        home, result = Store(store), recall(reference, store)
        record = home.run(result.name)
        cells, missing = scored_cells(record, home)
        notes = [f"Not finished, and so missing here: {'; '.join(missing)}."] if missing else []
        notes += [f"Failed: {title}. {reason}" for title, reason in result.failures.items()]
        return cls(result, record, home, cells, notes)

    @cached_property
    def source(self) -> DataSource | None:
        """The data set; None, with a note, where it cannot be read."""
        config = self.result.config
        try:
            source = open_source(config.dataset, config.data_root, config.set)
            source.split()
        except CfrbenchError as error:
            self.notes.append(f"The data set could not be read, so there are no volumes and no pictures. {error}")
            return None
        return source

    def volume(self, case: str) -> Volume:
        """A case as stored; the last few stay in memory."""
        assert self.source is not None
        if case not in self._volumes:
            if len(self._volumes) >= HELD:
                self._volumes.pop(next(iter(self._volumes)))
            self._volumes[case] = self.source.load(case)
        return self._volumes[case]

    def truth(self, case: str) -> Mask:
        """The label of a case, ``(H, W, D)``; all of them stay in memory."""
        return self._labelled(case)[0]

    def spacing_mm(self, case: str) -> Spacing:
        """The voxel size of a case."""
        return self._labelled(case)[1]

    def _labelled(self, case: str) -> tuple[Mask, Spacing]:
        if case not in self._truths:
            volume = self.volume(case)
            if volume.label is None:
                raise StoreError(f"The case {case} was scored, but its label has gone from the data set. Restore it.")
            self._truths[case] = volume.label.numpy(), volume.spacing_mm
        return self._truths[case]

    @property
    def test_cases(self) -> list[str]:
        """Every case that a network was tested on, as scored."""
        return list(dict.fromkeys(case for one in self._tested for case in one.record.cases))

    @property
    def pseudo_cells(self) -> list[Scored]:
        """The finished rows of pseudo-labels."""
        return [one for one in self.cells if one.record.about["variant"] == PSEUDO]

    @property
    def _tested(self) -> list[Scored]:
        return [one for one in self.cells if one.record.about["variant"] != PSEUDO]

    def groups(self, *, label_tests: bool, say: Callable[[str], None]) -> list[Group]:
        """What can be compared, in table order; methods with pseudo-labels before the supervised bounds.

        ``label_tests``: let the fine-tuned model label the test cases, where that has not been done yet.
        """
        found: dict[tuple[Any, ...], list[Layer]] = {}
        for one in self._tested:
            key = tuple(one.record.about[name] for name in ("ssl", "labels", "unlabelled", "seed"))
            found.setdefault(key, []).append(Layer(one.record.name, one.name, one.label_maps(), one.dice()))
        pseudo = self._test_labels(label_tests, say)
        groups = []
        for (ssl, labels, unlabelled, seed), layers in found.items():
            own = pseudo.get((labels, seed)) if unlabelled else None
            title = f"{layers[0].name.removesuffix(' + CFR')}, {labels} labelled, seed {seed}"
            groups.append(Group(title, ssl, labels, seed, (*layers, *([own] if own else []))))
        return sorted(groups, key=lambda group: len(group.layers) < 2)

    def _test_labels(self, compute: bool, say: Callable[[str], None]) -> dict[tuple[int, int], Layer]:
        """Budget and seed -> what the fine-tuned model says of the test cases; no network has learned from it."""
        found: dict[tuple[int, int], Layer] = {}
        for one in self.pseudo_cells:
            place = one.record.about["labels"], one.record.about["seed"]
            if one.masks is None or place in found or self.source is None:
                continue
            try:
                labels = self._labelled_tests(one.masks, compute, say)
            except CfrbenchError as error:
                self.notes.append(f"The fine-tuned model did not label the test cases ({one.words}). {error}")
                continue
            if labels is not None:
                truths = {case: self.truth(case) for case in labels}
                key = f"pseudo-{place[0]}-seed{place[1]}"
                found[place] = Layer(key, PSEUDO, labels, dice_by_case(truths, labels))
        return found

    def _labelled_tests(self, usual: Artifact, compute: bool, say: Callable[[str], None]) -> dict[str, Mask] | None:
        """The stage that made the pseudo-labels, on the test cases: kept in the store as a stage of its own."""
        assert self.source is not None
        recipe, fingerprint = usual.manifest["recipe"], self.source.fingerprint()
        tests = [[case, fingerprint[case]] for case in self.test_cases]
        own = task("pseudo", f"{usual.manifest['title']}, test cases", {**recipe, "unlabelled": tests},
                   tuple(usual.manifest["needs"]))  # fmt: skip
        if compute and self.home.find(own.stage, own.key) is None:
            seconds = len(tests) * (usual.manifest["summary"].get("seconds_per_volume") or 0)
            say(f"{own.title}: the fine-tuned model labels {len(tests)} volumes, about {seconds:.0f} s")
            StageWork(self.home.root, self.result.config.data_root)(own)
        artifact = self.home.find(own.stage, own.key)
        if artifact is None:
            return None
        return {case: mask.numpy() for case, mask in read_labels(artifact.path(STORED)).items()}


def dice_by_case(truths: Mapping[str, Mask], masks: Mapping[str, Mask]) -> dict[str, float]:
    """Dice in percent of each case, mean over the classes that are in its truth; 0 where there are none."""
    found = {}
    for case, truth in truths.items():
        mask = masks[case]
        own = [_dice(truth == c, mask == c) for c in np.unique(truth[truth > 0])]
        found[case] = float(np.mean(own)) if own else 0.0
    return found


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return 200.0 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def best_median_worst(values: Mapping[str, float]) -> dict[str, str]:
    """Case -> "best", "median" or "worst" by value; of two medians the lower, each case once."""
    return telling_cases(pd.Series(values, dtype=float).sort_values(kind="stable")) if values else {}

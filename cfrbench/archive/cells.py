"""The finished cells of a run with the artifacts that their numbers stand on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfrbench.archive.form import CellRecord
from cfrbench.config import ScoringSection
from cfrbench.formats import read_labels, read_table
from cfrbench.prepared.form import checked_case
from cfrbench.recipes import SCORES, STAGE_VERSIONS, STORED
from cfrbench.report import frames
from cfrbench.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cfrbench.artifact import Artifact


@dataclass(frozen=True)
class Scored:
    """One cell, its scores, and the label maps that were scored (None: no longer in the store)."""

    record: CellRecord
    scores: Artifact
    masks: Artifact | None

    @property
    def name(self) -> str:
        """``MT + CFR``."""
        about = self.record.about
        return f"{about['title']} + CFR" if about["variant"] == "cfr" else str(about["title"])

    @property
    def words(self) -> str:
        """``MT + CFR, 1 labelled, seed 0``."""
        return f"{self.name}, {self.record.about['labels']} labelled, seed {self.record.about['seed']}"

    def label_maps(self) -> dict[str, NDArray[np.uint8]]:
        """Case -> label map ``(H, W, D)``; none if they have gone."""
        if self.masks is None:
            return {}
        stored = read_labels(self.masks.path(STORED))
        return {case: stored[case].numpy() for case in self.record.cases}

    def dice(self) -> dict[str, float]:
        """Case -> Dice in percent, mean over classes."""
        means = read_table(self.scores.path(SCORES)).groupby("case", sort=False)["dice"].mean()
        return {str(case): float(value) for case, value in means.items()}


def scored_cells(record: Mapping[str, Any], home: Store) -> tuple[list[Scored], list[str]]:
    """The finished cells of a run's record in table order, and in words those that are not."""
    found, missing = [], []
    for number, cell in enumerate(record["cells"], start=1):
        about = {name: (record["names"] | cell)[name] for name in (*frames.CELL, "seed")}
        scores = home.find_verified("score", cell["score"])
        if scores is None:
            missing.append(f"{cell['title']} ({cell['variant']}, {cell['labels']} labelled, seed {cell['seed']})")
            continue
        recipe = scores.manifest["recipe"]
        cases = dict.fromkeys(read_table(scores.path(SCORES))["case"])
        masks = home.find_verified(recipe["from"]["stage"], recipe["from"]["key"])
        section = ScoringSection.model_validate(recipe["settings"]["scoring"])
        own = CellRecord(name=_folder(number, about), about=about, stage=recipe["from"]["stage"], scoring=section,
                         cases=tuple(map(checked_case, cases)))  # fmt: skip
        found.append(Scored(own, scores, masks))
    return found, missing


def manifests(record: Mapping[str, Any], home: Store) -> Iterator[Mapping[str, Any]]:
    """The manifests of every stage in the store that a run stands on, in the order of its cells."""
    for key in dict.fromkeys(key for cell in record["cells"] for key in cell["keys"]):
        for stage in STAGE_VERSIONS:
            artifact = home.find_any(stage, [key])
            if artifact is not None:
                yield artifact.manifest


def _folder(number: int, about: Mapping[str, Any]) -> str:
    """A name that is harmless in any archive."""
    words = f"{number:03d}-{about['ssl']}-{about['variant']}-{about['labels']}-seed{about['seed']}"
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", words)

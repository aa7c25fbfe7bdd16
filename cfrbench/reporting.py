"""A run as reports need it: scores, what is missing, what it cost. Read from the store, without data or plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import results
from cfrbench.cells import Cell
from cfrbench.errors import StoreError
from cfrbench.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: stage -> value of its manifest's summary -> column of the costs
MEASURED = {
    "train": {"parameters": "parameters"},
    "tune": {"parameters": "foundation_parameters", "trained_parameters": "foundation_trained"},
}
TIMED = ("tune", "pseudo", "train", "predict")


@dataclass(frozen=True)
class Remembered:
    """A run from its record: scores (columns of `cfrbench.report.frames`), facts with ``missing`` cells, and costs."""

    name: str
    cases: pd.DataFrame
    facts: dict[str, Any]
    costs: pd.DataFrame


def remember(reference: str, store: Path) -> Remembered:
    """The run called ``reference``, finished or not; UsageError if there is none, StoreError if no cell is."""
    result = results.recall(reference, store)
    if result.cases.empty:
        raise StoreError(f"The run {result.name} has no finished cell, so there is no table. Its command, given again, "
                         "goes on from what is there.")  # fmt: skip
    home = Store(store)
    record = home.run(result.name)
    missing = [_words(cell) for cell in record["cells"] if home.find("score", cell["score"]) is None]
    facts = result.facts | ({"missing": missing} if missing else {})
    return Remembered(result.name, result.cases, facts, _costs(record, home))


def _words(cell: Mapping[str, Any]) -> str:
    names = ("ssl", "title", "variant", "labels", "unlabelled", "seed")
    return Cell(**{name: cell[name] for name in names}).words.replace(" · ", ", ")


def _costs(record: Mapping[str, Any], home: Store) -> pd.DataFrame:
    """One row per cell (columns `frames.CELL`): means over its seeds of what the manifests of its stages say."""
    import pandas as pd

    from cfrbench.report import frames

    rows = [record["names"] | cell | _cost(cell, home) for cell in record["cells"]]
    names = [*(f"seconds_{stage}" for stage in TIMED), *(name for one in MEASURED.values() for name in one.values())]
    table = pd.DataFrame(rows).reindex(columns=[*frames.CELL, *names])
    return table.groupby(list(frames.CELL), as_index=False)[names].mean()


def _cost(cell: Mapping[str, Any], home: Store) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in TIMED:
        artifact = home.find_any(stage, cell["keys"])
        if artifact is not None:
            found[f"seconds_{stage}"] = float(artifact.manifest["seconds"])
            summary = artifact.manifest["summary"]
            found |= {name: float(summary[key]) for key, name in MEASURED.get(stage, {}).items() if key in summary}
    return found

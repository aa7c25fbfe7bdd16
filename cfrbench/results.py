"""Finished runs from their records and stored scores; neither data, plug-ins nor torch are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench.artifact import SCORES
from cfrbench.config import RunConfig, read_toml, validate
from cfrbench.errors import UsageError
from cfrbench.store import Store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """A finished run. ``cases`` holds one row per case, class and metric; `table` is its summary."""

    name: str
    config: RunConfig
    cases: pd.DataFrame
    trained: int
    reused: int
    seconds: float
    failures: dict[str, str]
    facts: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """One row per method, variant and budget: means over cases and seeds, spreads, counts of empty masks."""
        from cfrbench.report import frames

        return frames.summary(self.cases, self.config.ssl)

    def as_json(self) -> dict[str, Any]:
        """The object `--json` prints."""
        from cfrbench.report import frames

        return {
            "rows": frames.json_rows(self.table(), self.facts["unit"]),
            "splits": self.facts.get("splits", []),
            "stages": {"trained": self.trained, "reused": self.reused},
            "seconds": round(self.seconds, 3),
            "failures": self.failures,
        }


def of_record(name: str, record: dict[str, Any], home: Store) -> Result:
    """The result that a run's record tells of, its scores gathered from the store."""
    config = validate(RunConfig, record["config"], f"the record of {name}")
    return Result(name, config, gather_cases(record, home), record["trained"], record["reused"], record["seconds"],
                  record["failures"], record["facts"])  # fmt: skip


def gather_cases(record: dict[str, Any], home: Store) -> pd.DataFrame:
    """The tidy frame of a record's finished cells (columns in `cfrbench.report.frames`)."""
    import pandas as pd

    from cfrbench.formats import read_table
    from cfrbench.report import frames

    parts = []
    for cell in record["cells"]:
        artifact = home.find_verified("score", cell["score"])
        if artifact is not None:
            parts.append(frames.tidy(read_table(artifact.path(SCORES)), record["names"] | cell))
    return pd.concat(parts, ignore_index=True) if parts else frames.nothing()


def recall(reference: str, store: Path) -> Result:
    """A finished run from its record and stored scores; neither data nor plug-ins are needed."""
    home = Store(store)
    record = home.run(reference)
    return of_record(record["name"], record, home)


def read_config(reference: str, store: Path) -> RunConfig:
    """A RunConfig from a TOML file, or from the record of a finished run."""
    path = Path(reference)
    if path.suffix == ".toml" or path.is_file():
        return read_toml(path)
    record = Store(store).run(reference)
    if "ablation" in record["facts"]:
        raise UsageError(f"{record['name']} is an ablation: several requests in one. Give `cfrbench ablate "
                         f"{record['facts']['ablation']['kind']}` with its options again.")  # fmt: skip
    return validate(RunConfig, record["config"], f"the record of {reference}")

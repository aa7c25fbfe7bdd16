"""The two sides of `cfrbench compare`: runs from their records, somebody's scores from a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import reporting
from cfrbench.errors import DataError, UsageError
from cfrbench.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from cfrbench.report.versus import Comparison, Side

#: names that somebody else's file may use for our columns
OTHER_NAMES = {"method": "ssl", "case_id": "case", "labelled": "labels", "95hd": "hd95"}


def compare(left: str, right: str, metric: str, store: Path, other_store: Path | None = None) -> Comparison:
    """Compare run ``left`` with ``right``, a run (of ``other_store``, by default of the same) or a CSV file."""
    from cfrbench.report import versus

    if is_file(left):
        raise UsageError(f"A must be a run, and {left} is a file. Give the run first: cfrbench compare RUN {left}.")
    second = of_csv(Path(right)) if is_file(right) else of_run(right, other_store or store)
    return versus.compared(of_run(left, store), second, metric)


def is_file(reference: str) -> bool:
    """Whether a side is meant as a file: runs have no suffix ``.csv``."""
    return reference.casefold().endswith(".csv")


def of_run(reference: str, store: Path) -> Side:
    """The scores of a run, with the fingerprints of the cases they were made on."""
    from cfrbench.report import versus

    remembered = reporting.remember(reference, store)
    return versus.Side(
        remembered.name, remembered.cases, remembered.facts, _fingerprints(remembered.name, Store(store))
    )


def _fingerprints(name: str, home: Store) -> dict[str, str]:
    """Case -> hash of its content, from the recipes of the stages that predicted it."""
    found: dict[str, str] = {}
    for cell in home.run(name)["cells"]:
        for stage, cases in (("predict", "test"), ("pseudo", "unlabelled")):
            artifact = home.find_any(stage, cell["keys"])
            found |= dict(artifact.manifest["recipe"].get(cases, ())) if artifact else {}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# somebody's CSV


def of_csv(path: Path) -> Side:
    """Scores in a file: column ``case``, a column for each metric or the columns ``metric`` and ``value``.

    Optional: ``class``, ``seed``, and ``ssl``, ``variant``, ``labels`` if the file holds several rows of a table.
    Dice and Jaccard are percentages. DataError that names the file and what is wrong.
    """
    from cfrbench.report import frames, versus

    wide = _read(path)
    metrics = [name for name in frames.METRICS if name in wide]
    if {"metric", "value"} <= set(wide.columns):
        long = wide.assign(metric=wide["metric"].astype(str).str.casefold())
    elif metrics:
        others = [name for name in wide.columns if name not in metrics]
        long = wide.melt(others, metrics, var_name="metric", value_name="value")
    else:
        raise DataError(f"{path} has no scores: its columns are {', '.join(wide.columns)}. Give a column for each "
                        f"metric ({', '.join(frames.METRICS)}), or the columns metric and value.")  # fmt: skip
    stated = tuple(name for name in frames.CELL if name in long)
    cases = long if "seed" in long else long.assign(seed=0)
    _check_values(path, cases, [name for name in ("seed", "case", "class", "metric", *stated) if name in cases])
    return versus.Side(path.name, cases.astype({"value": float, "case": str}), stated=stated)


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype={"case": str, "class": str})
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path} cannot be read as a CSV file: {error}. It must be a comma-separated table with the "
                        "column case and one for each metric, e.g. case,dice.") from error  # fmt: skip
    names = [str(name).strip().casefold() for name in table.columns]
    table.columns = pd.Index([OTHER_NAMES.get(name, name) for name in names])
    if "case" not in table:
        raise DataError(f"{path} has no column case: its columns are {', '.join(names)}. Scores are paired by case, so "
                        "each row must name one.")  # fmt: skip
    if table.empty:
        raise DataError(f"{path} has a head and no rows. Write one row for each case.")
    return table


def _check_values(path: Path, cases: pd.DataFrame, keys: list[str]) -> None:
    import pandas as pd

    values = pd.to_numeric(cases["value"], errors="coerce")
    wrong = cases[values.isna() & cases["value"].notna()]
    if not wrong.empty:
        first: dict[Any, Any] = wrong.iloc[0].to_dict()
        raise DataError(f"{path}: the {first['metric']} of case {first['case']} is '{first['value']}', not a number.")
    twice = cases[cases.duplicated(keys)]
    if not twice.empty:
        first = twice.iloc[0].to_dict()
        raise DataError(f"{path} has two values of {first['metric']} for case {first['case']}. Tell them apart by "
                        "columns such as class, seed, ssl, variant or labels, or leave one out.")  # fmt: skip
    for metric in ("dice", "jaccard"):
        found = values[cases["metric"] == metric]
        if len(found) and 0 < found.max() <= 1:
            raise DataError(f"{path}: no {metric} is above 1, so these look like fractions. cfrbench compares "
                            "percentages: multiply them by 100.")  # fmt: skip
        if (found < 0).any() or (found > 100).any():
            raise DataError(f"{path}: {metric} must lie between 0 and 100; found {found.min():g} to {found.max():g}.")

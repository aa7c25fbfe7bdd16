"""What figures and tables of exhibits are drawn from: cases and slices by rule, missing values, equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfrbench.report import pictures, plots
from cfrbench.report.plots import Dot, Pair, Score
from cfrbench.report.tables import Mark, Table, with_metrics, with_rows
from cfrbench.wording import duration, storage

NOTHING = Score(math.nan)
MASK = np.array([[[0, 1], [1, 1]], [[0, 0], [2, 0]]])

DRAWINGS: dict[str, Callable[[Path], None]] = {
    "budgets": lambda path: plots.draw_budgets(
        {"MT": {"baseline": {1: Score(30, 5), 4: NOTHING}, "cfr": {1: Score(70), 4: Score(80)}},
         "ACMT": {"baseline": {1: NOTHING}}}, "t", "Dice", path),
    "methods": lambda path: plots.draw_methods(
        [Pair("MT", Score(30, 5), NOTHING), Pair("DTC", NOTHING, None)], {"lower bound": 20.0, "upper": math.nan}, "t",
        "Dice", path),
    "quality": lambda path: plots.draw_quality([Dot("MT", 1, 70, 75), Dot("MT", 4, 70, 75)], "t", path),
    "curves": lambda path: plots.draw_curves(
        {f"M{n}": {"baseline": ([1, 2], [3.0, 2.0])} for n in range(5)}, "t", path),
    "ranks": lambda path: plots.draw_ranks({"MT": np.array([1, 1.5, 2]), "DTC": np.array([2, 1.5, 1])}, "t", path),
    "montage": lambda path: pictures.draw_montage(
        {"best": [pictures.Panel("truth", np.eye(4), None, np.eye(4, dtype=int)), pictures.Panel("MT", np.eye(4))]},
        "t", path, [f"organ {n}" for n in range(13)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWINGS)
def test_equal_drawings_give_equal_bytes_as_png_and_pdf(name: str, tmp_path: Path) -> None:
    written = []
    for turn in ("a", "b"):
        DRAWINGS[name](tmp_path / turn / "table-1.2")
        files = pictures.files_of(tmp_path / turn / "table-1.2")
        written.append([file.read_bytes() for file in files])
    assert [file.name for file in files] == ["table-1.2.png", "table-1.2.pdf"]
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")
    assert written[0][1].startswith(b"%PDF")


def test_cases_are_the_best_the_median_and_the_worst() -> None:
    values = pd.Series([-3.0, 0.0, 2.0, 9.0], index=["d", "a", "b", "c"])
    assert pictures.telling_cases(values) == {"c": "best", "a": "median", "d": "worst"}
    assert pictures.telling_cases(values[:1]) == {"d": "best"}


def test_the_slice_is_where_masks_differ_among_those_with_much_of_the_truth() -> None:
    truth = np.zeros((4, 4, 3), int)
    truth[:2, :2, 0] = truth[:2, 0, 1] = truth[0, 0, 2] = 1
    one, other = np.zeros_like(truth), np.zeros_like(truth)
    other[:, :, 2] = 1  # most unlike, but hardly any truth there
    other[0, :, 1] = 1
    assert pictures.telling_slice(truth, [one, other]) == 1
    assert pictures.telling_slice(truth, [one, one]) == 0 == pictures.best_slice(truth)


def test_smoothing_keeps_a_constant_and_the_number_of_values() -> None:
    assert np.allclose(plots.smoothed([2.0] * 230), 2.0)
    assert np.allclose(plots.smoothed([1.0, 5.0, 2.0]), [1.0, 5.0, 2.0])


def test_rows_of_a_table_follow_the_plan_and_marks_follow_their_rows() -> None:
    table = Table("t", ("Method", "Lab.", "Dice"), (("MT", "1", "9.00"), ("ACMT", "1", "8.00")), (),
                  frozenset({Mark(0, "Dice", "best")}))  # fmt: skip
    found = with_rows(table, [("ACMT", "1"), ("DTC", "1"), ("MT", "1")])
    assert found.rows == (("ACMT", "1", "8.00"), ("DTC", "1", "–"), ("MT", "1", "9.00"))
    assert found.marks == {Mark(2, "Dice", "best")}
    assert with_rows(table, [("DTC", "1")]).rows[1:] == table.rows, "what was not planned is shown all the same"


def test_metrics_that_a_recipe_does_not_name_have_no_column() -> None:
    table = Table("t", ("M", "Dice (%)", "Jaccard (%)", "95HD (mm)"), (("a", "1", "2", "3"),), (),
                  frozenset({Mark(0, "Jaccard (%)", "best")}))  # fmt: skip
    assert with_metrics(table, ("dice", "hd95")) == Table("t", ("M", "Dice (%)", "95HD (mm)"), (("a", "1", "3"),))
    assert with_metrics(table, ("dice", "jaccard", "asd", "hd95")) == table


def test_durations_and_sizes_are_told_in_the_unit_that_fits() -> None:
    assert [duration(seconds) for seconds in (7, 600, 36000)] == ["7 s", "10 min", "10.0 h"]
    assert [storage(mib) for mib in (0.25, 45, 3584)] == ["0.2 MiB", "45 MiB", "3.5 GiB"]

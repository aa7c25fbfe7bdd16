"""Two sides compared: pairing by case, what is refused and by which words, what somebody's CSV may look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfrbench import comparing
from cfrbench.errors import CfrbenchError, UsageError
from cfrbench.report import statistics, versus
from cfrbench.report.frames import nothing
from cfrbench.report.versus import Side, as_json, compared, table_of
from cfrbench.report.writers import to_markdown
from tests.report.scores import FACTS, study

ABOUT = {**FACTS, "dataset": "la", "classes": ["background", "spleen", "gallbladder"]}


def run(name: str = "first", lift: float = 0.0, **facts: Any) -> Side:
    """A run of the stored study, its CFR rows lifted by a little more in every case."""
    cases = study()
    guided = cases["variant"] == "cfr"
    steps = cases["case"].str[1:].astype(int) / 4
    return Side(name, cases.assign(value=cases["value"] + lift * (1 + steps) * guided), ABOUT | facts)


def rows_of(found: versus.Comparison) -> dict[str, Any]:
    return {f"{row['name_a']} {row['budget']}": row for row in found.rows}


def test_equal_runs_differ_by_nothing() -> None:
    found = compared(run(), run("again"))
    assert [row["difference"] for row in found.rows] == [0.0] * 5
    assert [row["p_holm"] for row in found.rows] == [1.0] * 5
    assert "†" not in to_markdown(table_of(found))


def test_rows_are_paired_by_case_and_the_change_is_found() -> None:
    found = rows_of(compared(run(), run("better", lift=2.0)))["MT + CFR 1/19"]
    expected = 2.0 * (1 + np.arange(8) / 4)
    assert found["difference"] == pytest.approx(expected.mean())
    assert [found["low_cases"], found["high_cases"]] == pytest.approx(statistics.mean_interval(expected))
    assert (found["wins"], found["n_cases"], found["seeds"]) == (8, 8, (0, 1, 2))


def test_protocol_differences_are_named_and_mark_every_row() -> None:
    found = compared(run(), run("longer", lift=1.0, protocol="6000 steps", preset="paper"))
    assert found.protocols == {"a": ["preset quick", "900 steps"], "b": ["preset paper", "6000 steps"]}
    table = table_of(found)
    assert all(row[0].endswith("†") for row in table.rows)
    assert any("6000 steps" in note and note.startswith("†") for note in table.notes)


def test_different_seeds_are_averaged_on_each_side_and_said() -> None:
    other = run("one seed", lift=2.0)
    found = compared(run(), Side("one seed", other.cases[other.cases["seed"] == 0], other.facts))
    assert any(note.startswith("The seeds differ") for note in found.notes)
    assert np.isnan(found.rows[0]["low_seeds"])


def test_rows_that_only_one_side_has_are_named() -> None:
    other = run("half")
    found = compared(run(), Side("half", other.cases[other.cases["ssl"] != "acmt"], other.facts))
    assert found.only == {"a": ["ACMT (1/19)", "ACMT + CFR (1/19)"], "b": []}
    assert any("Only in A: ACMT (1/19)" in note for note in table_of(found).notes)


def refused(left: Side, right: Side) -> str:
    with pytest.raises(CfrbenchError) as caught:
        compared(left, right)
    return str(caught.value)


def test_different_test_sets_are_refused_with_the_names_of_what_differs() -> None:
    other = run("other")
    fewer = Side("other", other.cases[other.cases["case"] != "c3"].replace({"case": {"c7": "c9"}}), other.facts)
    message = refused(run(), fewer)
    assert "only in first: c3, c7" in message
    assert "only in other: c9" in message
    assert "different data sets: la and btcv" in refused(run(), run("other", dataset="btcv"))
    same = {"c0": "aa", "c1": "bb"}
    first, second = run(), run("other")
    message = refused(Side("first", first.cases, ABOUT, same), Side("other", second.cases, ABOUT, same | {"c1": "cc"}))
    assert "different content: c1" in message


def test_a_run_without_a_finished_row_and_runs_without_a_common_one_are_refused() -> None:
    assert "no finished row" in refused(run(), Side("empty", nothing(), ABOUT))
    cases = study().assign(ssl="dtc")
    assert "no row in common" in refused(run(), Side("other", cases, ABOUT))


def test_the_json_is_plain() -> None:
    answer = as_json(compared(run(), run("again")))
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert {"name_a", "a", "b", "difference", "low_cases", "p_holm", "seeds"} <= set(answer["rows"][0])


# ---------------------------------------------------------------------------------------------------------------------
# somebody's CSV


def csv_side(folder: Path, text: str) -> Side:
    path = folder / "mine.csv"
    path.write_text(text, encoding="utf-8")
    return comparing.of_csv(path)


def test_one_list_of_scores_is_compared_with_every_row(tmp_path: Path) -> None:
    lines = "".join(f"c{i},{70 + i}\n" for i in range(8))
    found = compared(run(), csv_side(tmp_path, "Case,Dice\n" + lines))
    assert len(found.rows) == 5
    row = rows_of(found)["MT + CFR 1/19"]
    assert row["b"] == pytest.approx(73.5)
    assert row["difference"] == pytest.approx(73.5 - row["a"])
    assert any("mean of classes" in note for note in found.notes)


def test_a_file_of_several_methods_is_matched_by_what_it_states(tmp_path: Path) -> None:
    cases = study()
    dice = cases[(cases["metric"] == "dice") & (cases["ssl"] != "supervised")]
    path = tmp_path / "all.csv"
    wide = dice.rename(columns={"value": "dice"})[["ssl", "variant", "labels", "seed", "case", "class", "dice"]]
    wide.replace({"class": {"spleen": "1", "gallbladder": "2"}}).to_csv(path, index=False)
    found = compared(run(), comparing.of_csv(path))
    assert [row["difference"] for row in found.rows] == [0.0] * 4
    dice.to_csv(path, index=False)  # the long form, as tidy frames are
    assert [row["difference"] for row in compared(run(), comparing.of_csv(path)).rows] == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,dice\nc0,50\n", "no column case"),
        ("case,iou\nc0,50\n", "has no scores"),
        ("case,dice\n", "no rows"),
        ("", "cannot be read as a CSV"),
        ("case,dice\nc0,high\n", "'high', not a number"),
        ("case,dice\nc0,50\nc0,60\n", "two values of dice for case c0"),
        ("case,dice\nc0,0.5\nc1,0.75\n", "look like fractions"),
        ("case,dice\nc0,150\n", "between 0 and 100"),
        ('case,dice\nc0,"1\n', "cannot be read as a CSV"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CfrbenchError, match=r"mine\.csv") as caught:
        csv_side(tmp_path, text)
    assert words in str(caught.value)


def test_a_missing_file_and_a_file_as_first_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CfrbenchError, match="cannot be read"):
        comparing.of_csv(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="A must be a run"):
        comparing.compare("mine.csv", "latest", "dice", tmp_path)


def test_a_file_of_other_cases_or_other_classes_is_refused(tmp_path: Path) -> None:
    message = refused(run(), csv_side(tmp_path, "case,dice\n" + "".join(f"c{i},70\n" for i in range(7))))
    assert "only in first: c7" in message
    message = refused(run(), csv_side(tmp_path, "case,class,dice\n" + "".join(f"c{i},1,70\n" for i in range(8))))
    assert "mine.csv has spleen" in message


def test_a_metric_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    side = csv_side(tmp_path, "case,dice\n" + "".join(f"c{i},70\n" for i in range(8)))
    with pytest.raises(CfrbenchError, match="no scores of hd95, only of dice"):
        compared(run(), side, "hd95")
    assert isinstance(side.cases, pd.DataFrame)

"""Gains, standings and the sentence about them, from small frames whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfrbench.errors import DataError, UsageError
from cfrbench.report import evidence, findings, statistics, wording
from cfrbench.report.frames import summary, tidy
from cfrbench.report.tables import comparison, protocol_line
from tests.report.scores import FACTS, cell, scores, study

BASE = np.array([60.0, 55.0, 70.0, 64.0, 58.0, 71.0, 66.0, 62.0])
GAIN = np.array([20.0, 31.0, 12.0, 18.0, 25.0, 9.0, 14.0, 22.0])


def pair(gain: np.ndarray[Any, Any] = GAIN, seeds: tuple[int, ...] = (0,), **other: Any) -> pd.DataFrame:
    """MT and its twin, the gain of each case given, one more point per seed in both."""
    parts = []
    for seed in seeds:
        parts.append(tidy(scores(list(BASE + seed)), cell("mt", "baseline", 1, 19, seed=seed, **other)))
        parts.append(tidy(scores(list(BASE + seed + gain)), cell("mt", "cfr", 1, 19, seed=seed, **other)))
    return pd.concat(parts)


def test_a_gain_is_paired_by_case_with_interval_wins_and_p() -> None:
    (row,) = evidence.gains(pair()).to_dict("records")
    assert row["difference"] == pytest.approx(GAIN.mean())
    assert [row["low_cases"], row["high_cases"]] == pytest.approx(statistics.mean_interval(GAIN))
    assert (row["wins"], row["losses"], row["ties"], row["n_cases"]) == (8, 0, 0, 8)
    assert row["p"] == row["p_holm"] == pytest.approx(2 / 256)
    assert np.isnan([row["low_seeds"], row["low_both"]]).all()


def test_cases_and_seeds_are_named_apart() -> None:
    shifted = pair(seeds=(0, 1, 2))
    (row,) = evidence.gains(shifted).to_dict("records")
    assert row["low_seeds"] == pytest.approx(row["high_seeds"])  # every seed has the same mean gain
    assert row["low_cases"] < row["difference"] < row["high_cases"]
    assert np.isfinite([row["low_both"], row["high_both"]]).all()


def test_a_smaller_distance_is_a_win_and_intervals_of_dice_stay_possible() -> None:
    (row,) = evidence.gains(pair(), "hd95").to_dict("records")
    assert row["difference"] < 0
    assert row["wins"] == 8
    wild = pair(np.array([0.0, 0, 0, 0, 0, 0, 1, 99.0]) - 5)
    assert evidence.gains(wild)["high_cases"].iloc[0] <= 100


def test_what_one_of_the_two_lacks_is_left_out_of_both_and_counted() -> None:
    cases = pair()
    cases.loc[(cases["case"] == "c3") & (cases["variant"] == "cfr"), "value"] = np.nan
    (row,) = evidence.gains(cases).to_dict("records")
    assert (row["n_cases"], row["dropped"]) == (7, 1)
    assert row["difference"] == pytest.approx(np.delete(GAIN, 3).mean())
    table = findings.gains(cases, FACTS)
    assert any("MT + CFR (1/19): 1" in note for note in table.notes)


def test_a_seed_that_only_one_of_them_has_finished_is_left_out() -> None:
    cases = pair(seeds=(0, 1))
    half = cases[~((cases["variant"] == "cfr") & (cases["seed"] == 1))]
    (row,) = evidence.gains(half).to_dict("records")
    assert row["seeds"] == (0,)


def test_holm_counts_the_gains_of_the_table() -> None:
    other = pair(GAIN[::-1] - 3).assign(ssl="acmt", title="ACMT")
    found = evidence.gains(pd.concat([pair(), other]))
    assert list(found["p_holm"]) == pytest.approx([4 / 256] * 2)


def test_rows_of_a_budget_are_ranked_without_bounds_and_tested_in_all_pairs() -> None:
    bound = tidy(scores([99.0] * 8), cell("supervised", "baseline", 1, 0))
    third = tidy(scores(list(BASE + 10)), cell("acmt", "baseline", 1, 19))
    (standing,) = evidence.standings(pd.concat([bound, pair(), third]))
    assert [row["title"] + row["variant"] for row in standing.group.rows] == ["MTbaseline", "MTcfr", "ACMTbaseline"]
    assert standing.ranking.rank.tolist() == [3.0, 1.0, 2.0]
    assert standing.p_holm[0, 1] == pytest.approx(3 * 2 / 256)
    assert (standing.above(1), standing.above(2)) == ([0, 2], [0])
    assert standing.above(0) == []


SENTENCE = "MT + CFR is above MT by 18.9 points ["


def test_the_sentence_says_by_how_much_in_how_many_cases_and_what_it_cannot_tell() -> None:
    notes = comparison(pair(), FACTS).notes
    assert notes[0].startswith(SENTENCE)
    assert "], 8 of 8 cases; with 8 cases differences under " in notes[0]
    assert notes[0].endswith("can't be told apart.")
    assert not any(note.startswith("Nothing here") for note in notes)


def test_no_difference_is_claimed_that_the_test_does_not_show() -> None:
    mixed = GAIN * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    (first, *_) = comparison(pair(mixed), FACTS).notes
    assert first.startswith("MT + CFR and MT are not significantly different: ")
    below = wording.gains_sentence(evidence.gains(pair(-GAIN)), 3.0)[0]
    assert below.startswith("MT + CFR is below MT by 18.9 points [")
    low, high = map(float, below.split("[")[1].split("]")[0].split(", "))
    assert 0 < low < 18.9 < high


@pytest.mark.parametrize(("cases", "reached"), [(5, False), (6, True)])
def test_a_table_of_too_few_cases_says_that_nothing_can_be_significant(cases: int, reached: bool) -> None:
    frame = pair()
    few = frame[frame["case"].isin([f"c{i}" for i in range(cases)])]
    notes = comparison(few, FACTS).notes
    assert any(note.startswith("Nothing here can be significant") for note in notes) != reached
    assert ("significant", "Gain (Dice)") in {(m.kind, m.head) for m in comparison(few, FACTS).marks} or not reached


def test_best_and_second_are_marked_within_a_budget_and_bounds_are_not() -> None:
    table = comparison(study(), FACTS)
    marked = {(table.rows[m.row][0], m.kind) for m in table.marks if m.head == "Dice (%)"}
    assert marked == {("MT + CFR", "best"), ("ACMT + CFR", "second")}
    hd95 = {(table.rows[m.row][0], m.kind) for m in table.marks if m.head == "95HD (voxel)"}
    assert ("MT + CFR", "best") in hd95


# ---------------------------------------------------------------------------------------------------------------------
# protocols


def test_rows_of_two_protocols_are_never_averaged() -> None:
    mixed = pd.concat([pair().assign(protocol="a"), pair(seeds=(1,)).assign(protocol="b")])
    with pytest.raises(DataError, match="several protocols"):
        summary(mixed)


def test_a_foreign_row_is_marked_and_gains_cross_no_protocol() -> None:
    own = pair().assign(protocol=protocol_line(FACTS))
    guided = own["variant"] == "cfr"
    foreign = pd.concat([own[~guided], own[guided].assign(protocol="preset paper; 6000 steps")])
    table = comparison(foreign, FACTS)
    assert [row[0] for row in table.rows] == ["MT", "MT + CFR †"]
    assert "Gain (Dice)" not in table.columns
    assert any(note.startswith("†") and "6000 steps" in note for note in table.notes)
    assert evidence.gains(foreign).empty
    assert not any("†" in note for note in comparison(own, FACTS).notes)


def test_an_unknown_table_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'costs'"):
        findings.tables_of(pair(), FACTS, None, ["cost"])

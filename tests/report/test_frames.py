"""Laws of the tidy frame, its summary, gains and JSON rows."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pandas as pd
import pytest

from cfrbench.report.frames import CELL, COLUMNS, METRICS, gains, json_rows, nothing, per_class, summary, tidy
from tests.report.scores import cell, la_sweep, scores


def test_tidy_has_one_row_per_case_class_and_metric() -> None:
    frame = tidy(scores([50.0, 60.0]), cell("mt", "cfr", 1, 19, seed=3))
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 2 * len(METRICS)
    assert set(frame["seed"]) == {3}
    assert frame.set_index(["case", "metric"]).loc[("c1", "hd95"), "value"] == 40.0


def test_rows_stand_in_the_paper_order_whatever_the_order_of_the_scores() -> None:
    cases = la_sweep()
    other = cases.assign(ssl=cases["ssl"].replace("mt", "acmt"), title="ACMT")
    both = pd.concat([other[other["ssl"] == "acmt"], cases]).sample(frac=1.0, random_state=0)
    table = summary(both, ["mt", "acmt"])
    assert list(zip(table["ssl"], table["variant"], table["labels"], strict=True)) == [
        ("supervised", "baseline", 1),
        ("supervised", "baseline", 20),
        ("mt", "baseline", 1),
        ("mt", "cfr", 1),
        ("acmt", "baseline", 1),
        ("acmt", "cfr", 1),
        ("lite-medsam+lora", "pseudo-label", 1),
    ]
    assert list(summary(both, ["acmt", "mt"])["ssl"])[2:6] == ["acmt", "acmt", "mt", "mt"]


def _plain(values: dict[tuple[int, str, str], float]) -> tuple[float, float, float]:
    """Mean, deviation over seeds and over cases by loops: cases, then classes, then seeds; NaN left out."""

    def mean(numbers: list[float]) -> float:
        kept = [x for x in numbers if not np.isnan(x)]
        return statistics.fmean(kept) if kept else float("nan")

    seeds, cases, classes = (sorted({key[i] for key in values}) for i in range(3))
    of_seeds = [mean([mean([values[s, c, k] for c in cases]) for k in classes]) for s in seeds]  # type: ignore[index]
    of_cases = [[mean([values[s, c, k] for k in classes]) for c in cases] for s in seeds]  # type: ignore[index]
    return mean(of_seeds), statistics.stdev(of_seeds), mean([statistics.stdev(row) for row in of_cases])


def test_multi_class_summary_equals_plain_loops() -> None:
    rng = np.random.default_rng(5)
    values = {(s, f"c{i}", k): float(rng.uniform(0, 100)) for s in (0, 1, 2) for i in range(4) for k in "xyz"}
    values[0, "c1", "y"] = float("nan")  # the policy "nan": this score does not exist
    parts = []
    for (seed, case, name), dice in values.items():
        score = scores([dice], name, "both" if np.isnan(dice) else "").assign(case=case)
        parts.append(tidy(score, cell("mt", "cfr", 1, 19, seed=seed)))
    cases = pd.concat(parts)
    row = summary(cases).iloc[0]
    expected = _plain(values)
    assert (row["dice"], row["dice_std_seeds"], row["dice_std_cases"]) == pytest.approx(expected, rel=1e-12)
    assert (row["n_cases"], row["n_scores"], row["empty_both"]) == (4, 36, 1)
    assert row["seeds"] == (0, 1, 2)
    by_class = per_class(cases)
    assert list(by_class["class"]) == ["x", "y", "z"]
    assert by_class["dice"].iloc[0] == pytest.approx(np.mean([v for k, v in values.items() if k[2] == "x"]))


def test_one_seed_has_no_spread_over_seeds() -> None:
    cases = la_sweep()
    table = summary(cases[cases["seed"] == 0])
    assert table["dice_std_seeds"].isna().all()
    assert table["dice_std_cases"].notna().all()


def test_gain_is_cfr_minus_baseline_and_needs_both() -> None:
    table = summary(la_sweep())
    (row,) = gains(table).to_dict("records")
    assert row["ssl"] == "mt"
    assert row["dice_gain"] == pytest.approx(row["dice_cfr"] - row["dice_baseline"])
    assert row["dice_cfr"] == pytest.approx(74.5)
    assert row["dice_baseline"] == pytest.approx((65 / 3 + 67 / 3) / 2)
    assert gains(table[table["variant"] != "baseline"]).empty


def test_a_shared_baseline_serves_every_strategy() -> None:
    cases = la_sweep()
    mine = cases[cases["ssl"] == "mt"]
    guided = mine[mine["variant"] == "cfr"]
    shuffled = guided.assign(concat="shuffled", value=guided["value"] - 1)
    found = gains(summary(pd.concat([mine, shuffled]))).set_index("concat")["dice_gain"]
    assert found["grid"] - found["shuffled"] == pytest.approx(1.0)


def test_a_class_is_never_found_only_if_every_score_with_truth_is_an_empty_prediction() -> None:
    def one(kinds: list[str]) -> bool:
        cases = tidy(scores([0.0] * len(kinds)).assign(empty=kinds), cell("mt", "baseline", 1, 19))
        return bool(summary(cases)["never_found"].iloc[0])

    assert one(["prediction", "prediction"])
    assert one(["prediction", "both"])
    assert not one(["prediction", ""])
    assert not one(["both", "both"])
    assert not one(["prediction", "truth", ""])


def test_json_rows_have_exactly_these_keys_and_plain_values() -> None:
    rows = json_rows(summary(la_sweep(), ["mt"]))
    for row in rows:
        assert list(row) == ["dataset", "ssl", "variant", "labels", "seeds", "dice", "jaccard", "asd_voxel",
                             "hd95_voxel", "empty"]  # fmt: skip
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[2]["empty"] == 2
    assert rows[2]["seeds"] == [0, 1]
    assert rows == json_rows(summary(la_sweep().sample(frac=1.0, random_state=1), ["mt"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_says_null_where_a_number_is_not_finite(bad: float) -> None:
    cases = tidy(scores([bad, bad]), cell("mt", "baseline", 1, 19))
    (row,) = json_rows(summary(cases), unit="mm")
    assert row["dice"] is None
    assert row["asd_mm"] == 3.5


def test_a_run_without_scores_has_an_empty_summary() -> None:
    assert tuple(nothing().columns) == COLUMNS
    assert json_rows(summary(nothing())) == []
    assert gains(summary(nothing())).empty


def test_cells_differ_in_every_cell_column() -> None:
    one = cell("mt", "cfr", 1, 19)
    for name in CELL:
        changed = one | {name: 2 if name in ("labels", "unlabelled") else "baseline"}
        table = summary(pd.concat([tidy(scores([1.0]), one), tidy(scores([2.0]), changed)]))
        assert sorted(table["dice"]) == [1.0, 2.0], name

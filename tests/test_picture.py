"""The picture of a run: chosen by rule, drawn from stored predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cfrbench
from cfrbench import montage
from cfrbench.errors import UsageError
from cfrbench.report import pictures

SMALL = {"data.phantom.train": 3, "data.phantom.test": 3, "data.phantom.shape": (32, 32, 16)}


def test_the_case_is_the_one_of_median_gain() -> None:
    dice = {"a": (10, 60), "b": (20, 25), "c": (30, 50)}  # gains 50, 5, 20
    rows = [
        {"ssl": "mt", "labels": 1, "seed": 0, "metric": "dice", "case": case, "variant": variant, "value": value}
        for case, pair in dice.items()
        for variant, value in zip(("baseline", "cfr"), pair, strict=True)
    ]
    assert pictures.median_gain_case(pd.DataFrame(rows), "mt", 1, 0) == "c"
    with pytest.raises(UsageError, match="acmt"):
        pictures.median_gain_case(pd.DataFrame(rows), "acmt", 1, 0)


def test_the_slice_is_the_one_with_most_truth() -> None:
    truth = np.zeros((4, 4, 3), dtype=np.uint8)
    truth[0, 0, 1] = truth[:2, :2, 2] = 1
    assert pictures.best_slice(truth) == 2


def test_a_finished_run_can_be_drawn(tmp_path: Path) -> None:
    result = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=tmp_path / "store", bounds=False)
    output = tmp_path / "sub" / "picture.png"
    case = montage.draw_run("latest", tmp_path / "store", output, {})
    assert case in set(result.cases["case"])
    assert output.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="labels"):
        montage.draw_run("latest", tmp_path / "store", output, {"ssl": "mt", "labels": 2})

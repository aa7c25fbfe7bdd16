"""The shipped numbers are the paper's, and a cell finds its number."""

from __future__ import annotations

import csv
import hashlib
import os
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest

from cfrbench.published import PaperValue, paper_value, published

MD5 = "b460decfce6b4e6357ab6389e1ea8bc7"


def test_the_shipped_file_is_the_source_file() -> None:
    default = Path(__file__).parents[3] / "shared" / "paper" / "published.csv"
    source = Path(os.environ.get("CFRBENCH_PAPER", default))
    shipped = files("cfrbench.published").joinpath("published.csv").read_bytes()
    expected = hashlib.md5(source.read_bytes()).hexdigest() if source.is_file() else MD5
    assert hashlib.md5(shipped).hexdigest() == expected


def test_every_row_is_that_of_the_shared_file() -> None:
    default = Path(__file__).parents[3] / "shared" / "paper" / "published.csv"
    source = Path(os.environ.get("CFRBENCH_PAPER", default))
    if not source.is_file():
        pytest.skip(f"the paper's numbers are not at {source}; set CFRBENCH_PAPER (the stored hash is compared anyway)")
    rows = list(csv.DictReader(source.open(encoding="utf-8")))
    shipped = published().to_dict("records")
    assert len(shipped) == len(rows)
    for row, ours in zip(rows, shipped, strict=True):
        for name, text in row.items():
            value = ours[name]
            number = float(text) if name == "value" else bool(int(text)) if name == "zero_marked" else text
            assert ("" if pd.isna(value) else value if name in ("value", "zero_marked") else str(value)) == number


def test_a_class_of_the_paper_is_found_by_its_name() -> None:
    found = paper_value("btcv", "MagicNet", "cfr", 7, class_name="Left Kidney")
    rows = published().query("dataset == 'btcv' and method == 'MagicNet' and variant == 'cfr' and labelled == 7")
    assert found is not None
    assert found.value == rows.set_index("class")["value"]["left_kidney"]
    assert paper_value("btcv", "MagicNet", "cfr", 7, class_name="tail") is None


def test_every_row_is_a_number_with_its_table() -> None:
    table = published()
    assert table["value"].notna().all()
    assert table["value"].between(0, 100).all()
    assert set(table["variant"]) == {"baseline", "cfr", "pseudo-label"}
    assert set(table["table"]) == set(range(1, 11))
    assert (table.loc[table["zero_marked"], "value"] == 0).all()


def test_the_frame_is_a_copy() -> None:
    table = published()
    table.loc[:, "value"] = -1.0
    assert published()["value"].ge(0).all()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (("la", "MT", "baseline", 1), PaperValue(29.68, 1, 79, 3)),
        (("la", "mt", "cfr", 1), PaperValue(74.4, 1, 79, 3)),
        (("la", "ACMT", "cfr", 1), PaperValue(76.76, 1, None, 9)),
        (("la", "MT", "cfr", 16, "hd95"), PaperValue(6.15, 16, 64, 1)),
        (("la", "supervised", "baseline", 1), PaperValue(17.99, 1, 0, 3)),
        (("la", "supervised", "baseline", 80), PaperValue(91.14, 80, 0, 1)),
        (("la", "anything", "pseudo-label", 16), PaperValue(90.39, 16, None, 9)),
        (("la", "anything", "pseudo-label", 16, "asd"), PaperValue(1.83, 16, None, 10)),
        (("brats19", "supervised", "baseline", 50), PaperValue(80.16, 50, 0, 2)),
        (("btcv", "MagicNet", "cfr", 7), PaperValue(77.06, 7, 11, 5)),
        (("mact", "MT", "cfr", 1), PaperValue(36.23, 1, 69, 8)),
    ],
)
def test_a_cell_finds_its_number(question: tuple[str, str, str, int], answer: PaperValue) -> None:
    assert paper_value(*question) == answer


@pytest.mark.parametrize(
    "question",
    [
        ("la", "MT", "baseline", 2),
        ("phantom", "MT", "baseline", 1),
        ("la", "self-training", "baseline", 1),
        ("la", "MT", "pseudo", 1),
        ("btcv", "MT", "baseline", 7, "hd95"),
    ],
)
def test_what_the_paper_does_not_have_is_none(question: tuple[str, str, str, int]) -> None:
    assert paper_value(*question) is None


def test_another_segmenter_has_another_number() -> None:
    assert paper_value("la", "MT", "cfr", 1, net="vnet") is not None
    assert paper_value("la", "MT", "cfr", 1, net="unet3d") is None
    assert paper_value("brats19", "MT", "cfr", 1, net="unet3d") is not None


def test_every_method_row_of_the_paper_is_reachable() -> None:
    table = published()
    means = table[table["class"].isin(["foreground", "mean"])]
    for row in means.to_dict("records"):
        if row["method"] != "3DSAM-Adapter":  # another fine-tuner than the one of CFR
            name = "supervised" if row["method"] in ("V-Net", "3D U-Net") else row["method"]
            found = paper_value(row["dataset"], name, row["variant"], row["labelled"], row["metric"])
            assert found is not None
            assert found.value == row["value"]

"""Tables, byte for byte, and what their notes say."""

from __future__ import annotations

import csv
import io
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from cfrbench.report.frames import nothing, summary, tidy
from cfrbench.report.tables import Table, by_class, comparison
from cfrbench.report.writers import to_csv, to_markdown, to_rich
from tests.report.scores import FACTS, cell, la_sweep, scores

MARKDOWN = """\
### Left atrium

| Method | Lab./unlab. | Dice (%) | ± seeds | ± cases | Jaccard (%) | ASD (voxel) | 95HD (voxel) | Gain (Dice) | Paper's Dice |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| V-Net, lower bound | 1/0 | 20.00 | 0.00 | 10.00 | 10.00 | 3.50 | 80.00 | – | 17.99 (1/0) |
| V-Net, upper bound, all 20 labels | 20/0 | 87.00 | 0.00 | 1.00 | 77.00 | 3.50 | 13.00 | – | – |
| MT | 1/19 | 22.00 | 0.47 | 19.22 | 12.00 | 3.50 | 78.00 | – | 29.68 (1/79) |
| MT + CFR | 1/19 | **74.50** | 0.71 | 4.00 | **64.50** | 3.50 | **25.50** | +52.50 | 74.40 (1/79) |
| LiteMedSAM + LoRA pseudo-labels, on unlabelled cases | 1/19 | 71.00 | 0.00 | 1.41 | 61.00 | 3.50 | 29.00 | – | 74.78 (1/?) |

- MT + CFR and MT are not significantly different: +52.5 points [-3.4, 100.0] over cases, [-3.4, 100.0] over seeds and cases, better in 3 of 3 cases; with 3 cases differences under 55.9 points can't be told apart.
- Nothing here can be significant at 0.05: the smallest p of a signed-rank test of 3 cases is 0.25 (Holm).
- Brackets: 95 % intervals. Significant (a star): p of the signed-rank test, after Holm, under 0.05.
- Means over 3 test cases and seeds 0, 1; ± is the sample standard deviation, of the seeds' means or of the cases within a seed.
- Empty masks: MT (1/19): 2 empty predictions of 6 scores.
- Protocol: preset quick; 900 steps.
- The weights may have seen LA.
- Paper's Dice: as printed (table 3, table 9), with its labelled/unlabelled cases. Its protocol and hardware differ from this run's.
- The paper's fine-tuned SAM stands beside test scores; ours is scored on the unlabelled cases.
"""  # noqa: E501 - a snapshot is kept as it is printed

CSV_HEAD = """\
Method,Lab./unlab.,Dice (%),± seeds,± cases,Jaccard (%),ASD (voxel),95HD (voxel),Gain (Dice),Paper's Dice
"V-Net, lower bound",1/0,20.00,0.00,10.00,10.00,3.50,80.00,,17.99 (1/0)
"""

RICH_80 = """\
                                  Left atrium

                 Lab./  Dice     ±     ± Jaccard     ASD    95HD   Gain Paper's
 Method         unlab.   (%) seeds cases     (%) (voxel) (voxel) (Dice)    Dice
 ──────────────────────────────────────────────────────────────────────────────
 V-Net, lower      1/0 20.00  0.00 10.00   10.00    3.50   80.00      –   17.99
 bound                                                                    (1/0)
"""


def rendered(table: Table, width: int) -> str:
    """What a plain terminal of that width shows, without the spaces that fill its lines."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(to_rich(table))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def test_markdown_snapshot() -> None:
    assert to_markdown(comparison(la_sweep(), FACTS)) == MARKDOWN


def test_csv_snapshot_and_round_trip() -> None:
    table = comparison(la_sweep(), FACTS)
    text = to_csv(table)
    assert text.startswith(CSV_HEAD)
    lines = text.splitlines()
    numbers = [line for line in lines if not line.startswith("# ")]
    back = list(csv.reader(numbers))
    assert tuple(back[0]) == table.columns
    assert [tuple(row) for row in back[1:]] == [tuple(c.replace("–", "") for c in row) for row in table.rows]
    assert lines[len(numbers) :] == [f"# {line}" for line in (table.title, *table.notes)]


def test_rich_fits_eighty_columns_with_every_number_whole() -> None:
    table = comparison(la_sweep(), FACTS)
    text = rendered(table, 80)
    assert text.startswith(RICH_80)
    assert max(map(len, text.splitlines())) <= 80
    for row in table.rows:
        for number in row[1:]:
            assert number.split(" ")[0] in text
    assert "…" not in text


def test_names_are_never_read_as_markup() -> None:
    table = Table("[bold]t[/bold]", ("a [red]", "b"), (("[link]x", "1"),), ("[nope",))
    text = rendered(table, 80)
    for piece in ("[bold]t[/bold]", "[red]", "[link]x", "[nope"):
        assert piece in text
    assert "x \\| y" in to_markdown(Table("t", ("a",), (("x | y",),)))


def test_columns_without_any_value_are_left_out() -> None:
    cases = la_sweep()
    one_seed = cases[(cases["seed"] == 0) & (cases["variant"] == "baseline")].assign(dataset="elsewhere")
    table = comparison(one_seed, FACTS)
    assert not {"± seeds", "Gain (Dice)", "Paper's Dice"} & set(table.columns)
    assert {"± cases", "Dice (%)"} <= set(table.columns)
    assert not any("Paper" in note or "weights" in note for note in table.notes)


def test_the_warning_goes_only_under_the_paper_preset() -> None:
    def warned(preset: str) -> bool:
        return any("hardware differ" in n for n in comparison(la_sweep(), FACTS | {"preset": preset}).notes)

    assert warned("quick")
    assert not warned("paper")


@pytest.mark.parametrize(
    "changed", [{"net": "unet3d"}, {"dataset": "phantom"}, {"labels": 2}, {"concat": "shuffled"}, {"tune": "other"}]
)
def test_the_paper_is_quoted_only_where_the_cell_matches(changed: dict[str, Any]) -> None:
    same = cell("mt", "cfr", 1, 19)
    quoted = comparison(tidy(scores([74.0]), same), FACTS)
    other = comparison(tidy(scores([74.0]), same | changed), FACTS)
    assert quoted.columns[-1] == "Paper's Dice"
    assert other.columns[-1] != "Paper's Dice"


@pytest.mark.parametrize("title", ["Phantom", "Chamber"])
def test_synthetic_data_is_called_a_phantom_in_title_and_notes(title: str) -> None:
    cases = tidy(scores([74.0, 75.0]), cell("mt", "cfr", 1, 15, dataset="phantom"))
    facts = FACTS | {"title": title, "synthetic": True}
    for table in (comparison(cases, facts), by_class(cases, facts)):
        assert table.title.casefold().count("phantom") == 1
        assert any(note.startswith("Phantom: synthetic") for note in table.notes)


def test_a_partial_data_set_says_so() -> None:
    assert "Split: 20 of 80 cases." in comparison(la_sweep(), FACTS | {"split": "20 of 80 cases."}).notes


def test_the_unit_stands_in_the_header() -> None:
    columns = comparison(la_sweep(), FACTS | {"unit": "mm"}).columns
    assert {"ASD (mm)", "95HD (mm)"} <= set(columns)


def test_each_class_has_its_column_and_a_class_never_found_prints_zero_star() -> None:
    rows = pd.concat([scores([50.0, 70.0], "spleen"), scores([0.0, 0.0], "gallbladder", empty="prediction")])
    cases = tidy(rows, cell("mt", "cfr", 1, 15, dataset="phantom-organs"))
    table = by_class(cases, FACTS)
    assert table.columns == ("Method", "Lab./unlab.", "Mean Dice (%)", "spleen", "gallbladder")
    assert table.rows == (("MT + CFR", "1/15", "30.00", "60.00", "0*"),)
    assert table.notes[0].startswith("0*")
    main = comparison(cases, FACTS)
    assert main.rows[0][2] == "30.00"  # one class was found
    assert any("2 empty predictions of 4 scores" in note for note in main.notes)


def test_nothing_found_prints_zero_star_in_the_main_table() -> None:
    rows = scores([0.0, 0.0], empty="prediction")
    table = comparison(tidy(rows, cell("mt", "baseline", 1, 19)), FACTS)
    assert table.rows[0][2] == "0*"
    assert any(note.startswith("0*") for note in table.notes)


def test_equal_scores_in_another_order_give_equal_bytes() -> None:
    shuffled = la_sweep().sample(frac=1.0, random_state=3)
    assert to_markdown(comparison(shuffled, FACTS)) == MARKDOWN


def test_missing_is_never_shown_as_zero() -> None:
    cases = tidy(scores([float("nan")], empty="both"), cell("mt", "baseline", 1, 19))
    (row,) = comparison(cases, FACTS).rows
    assert "0.00" not in row
    assert pd.isna(summary(cases)["dice"].iloc[0])


def test_a_run_without_a_finished_cell_has_a_table_without_rows() -> None:
    table = comparison(nothing(), FACTS)
    assert table.rows == ()
    assert table.columns[0] == "Method"
    assert "Left atrium" in to_markdown(table)

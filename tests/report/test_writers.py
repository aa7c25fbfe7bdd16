"""Five writers on a stored frame, byte for byte. ``python -m tests.report.test_writers`` writes the snapshots anew."""

from __future__ import annotations

import csv
import html.parser
import io
from pathlib import Path

import pandas as pd
import pytest

from cfrbench.report import findings, frames, writers
from cfrbench.report.tables import Mark, Table
from tests.report.scores import FACTS, study

SNAPSHOTS = Path(__file__).parent / "snapshots"
SUFFIX = {"rich": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}
ODD = Table(
    "50 % of <b> & $x_1$", ("Method", "Dice (%)", "± cases", "p"),
    (("a|b_c", "1.00", "0.10", "–"), ("[red]#1", "2.00", "–", "0.03"), ("~^\\{}", "3.00", "0.20", "<0.0001")),
    ("≤ 5 × 5 – fine", 'say "no" & go'),
    frozenset({Mark(2, "Dice (%)", "best"), Mark(1, "Dice (%)", "second"), Mark(1, "p", "significant")}),
)  # fmt: skip


def everything() -> list[Table]:
    """Each table of the stored study."""
    measured = study().drop_duplicates(list(frames.CELL))[list(frames.CELL)]
    measured = measured.assign(parameters=572178.0, foundation_parameters=9540354.0, foundation_trained=float("nan"),
                               seconds_tune=61.4, seconds_pseudo=9.0, seconds_train=25.7,
                               seconds_predict=0.98)  # fmt: skip
    return findings.tables_of(study(), FACTS, measured)


def text_in(format: str) -> str:
    """All of them in one text."""
    return "\n".join(writers.render(table, format) for table in everything())


@pytest.mark.parametrize("format", writers.FORMATS)
def test_the_writers_are_byte_stable(format: str) -> None:
    stored = (SNAPSHOTS / f"study.{SUFFIX[format]}").read_text(encoding="utf-8")
    assert text_in(format) == stored


@pytest.mark.parametrize("format", writers.FORMATS)
def test_order_of_scores_changes_no_byte(format: str) -> None:
    shuffled = study().sample(frac=1.0, random_state=1)
    first = study()["ssl"].unique()
    again = shuffled.sort_values("ssl", key=lambda names: names.map(list(first).index), kind="stable")
    wanted = ("scores", "gains", "ranking")
    texts = [
        [writers.render(table, format) for table in findings.tables_of(cases, FACTS, None, wanted)]
        for cases in (study(), again)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("format", writers.FORMATS)
def test_every_cell_and_note_is_in_every_format(format: str) -> None:
    text = writers.render(Table("title", ("Method", "Dice"), (("MT", "12.34"), ("CFR", "56.78")), ("a note",)), format)
    for piece in ("title", "Method", "Dice", "MT", "12.34", "56.78", "a note"):
        assert piece in text
    assert text.endswith("\n")


def test_latex_escapes_what_is_special_and_marks_cells() -> None:
    text = writers.to_latex(ODD)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert r"\textbf{3.00}" in body
    assert r"\underline{2.00}" in body
    assert r"0.03$^{*}$" in body
    assert r"$\pm$ 0.10" in body
    assert r"a|b\_c" in body
    assert r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}" in body
    assert r"50 \% of \textless{}b\textgreater{} \& \$x\_1\$" in text
    for line in body.splitlines()[1:]:
        assert line.count("&") == 3
        assert line.endswith(r" \\")


class Reader(html.parser.HTMLParser):
    """Collects cells and their classes; fails on tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str | None]] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append(("", dict(attrs).get("data-value")))
            self.classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            text, value = self.cells[-1]
            self.cells[-1] = (text + data, value)


def test_html_is_well_formed_escaped_and_sortable() -> None:
    reader = Reader()
    reader.feed(writers.to_html(ODD))
    assert reader.open == []
    assert [text for text, _ in reader.cells[4:]] == [
        "a|b_c", "1.00", "0.10", "–", "[red]#1", "2.00", "–", "0.03*", "~^\\{}", "3.00", "0.20", "<0.0001"
    ]  # fmt: skip
    assert reader.cells[5][1] == "1"
    assert reader.cells[7][1] is None
    assert (reader.classes[9], reader.classes[13]) == ("second", "best")


def test_csv_keeps_numbers_plain() -> None:
    rows = list(csv.reader(io.StringIO(writers.to_csv(ODD))))
    assert rows[1] == ["a|b_c", "1.00", "0.10", ""]
    assert rows[2][3] == "0.03"


def test_an_unknown_format_is_no_format() -> None:
    with pytest.raises(KeyError):
        writers.render(ODD, "pdf")


def test_tables_without_rows_are_left_out_but_for_the_scores() -> None:
    found = findings.tables_of(frames.nothing(), FACTS, pd.DataFrame(columns=list(frames.CELL)))
    assert [table.title for table in found] == ["Left atrium"]


if __name__ == "__main__":
    for name in writers.FORMATS:
        (SNAPSHOTS / f"study.{SUFFIX[name]}").write_text(text_in(name), encoding="utf-8")

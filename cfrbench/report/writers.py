"""One table model, five writers: rich for terminals, Markdown, LaTeX, CSV, and a fragment of HTML.

Equal tables give equal bytes. Marks of cells: the best is bold, the second underlined, a significant one has a star.
CSV is for machines and carries the plain cells alone.
"""

from __future__ import annotations

import csv
import html
import io
import re
from typing import TYPE_CHECKING

from cfrbench.report.tables import MISSING, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = ("rich", "markdown", "latex", "csv", "html")
#: columns of rich text that no terminal asked for: wide enough for every table of ours
WIDTH = 140
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "…": r"\ldots{}",
}  # fmt: skip


def render(table: Table, format: str) -> str:
    """The table as text in one of `FORMATS`, with a newline at its end; KeyError for another format."""
    return {"rich": to_text, "markdown": to_markdown, "latex": to_latex, "csv": to_csv, "html": to_html}[format](table)


# ---------------------------------------------------------------------------------------------------------------------
# rich


def to_rich(table: Table) -> RichTable:
    """A rich table whose caption holds the notes; text is shown as it is, never read as markup."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = Text("\n".join(table.notes)) if table.notes else None
    result = RichTable(title=Text(table.title), caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    # Eighty columns must do: cells stand one space apart, only names wrap, heads and brackets stack.
    result.add_column(Text(table.columns[0]), overflow="fold", min_width=14)
    for column in table.columns[1:]:
        result.add_column(Text(_stacked(column)), justify="right", no_wrap=True)
    styles = {"best": "bold", "second": "underline"}
    for row, (name, *rest) in enumerate(table.rows):
        shown = [Text(name)]
        for place in range(1, 1 + len(rest)):
            marks = table.marks_at(row, place)
            style = " ".join(styles[kind] for kind in styles if kind in marks)
            shown.append(Text(_stacked(_starred(table, row, place)), style=style))
        result.add_row(*shown)
    return result


def to_text(table: Table) -> str:
    """`to_rich` as plain text of `WIDTH` columns: without colours, bold or lines that end in spaces."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(to_rich(table))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _stacked(text: str) -> str:
    return text.replace("/unlab", "/\nunlab").replace(" ", "\n")


def _starred(table: Table, row: int, column: int) -> str:
    return table.rows[row][column] + "*" * ("significant" in table.marks_at(row, column))


# ---------------------------------------------------------------------------------------------------------------------
# Markdown, CSV


def to_markdown(table: Table) -> str:
    """A heading, a pipe table, the notes as a list."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cells) + " |"

    def marked(row: int, column: int) -> str:
        marks = table.marks_at(row, column)
        text = table.rows[row][column].replace("|", "\\|")
        text = f"**{text}**" if "best" in marks else text
        text = f"<u>{text}</u>" if "second" in marks else text
        return text + "\\*" * ("significant" in marks)

    places = range(len(table.columns))
    rule = ("---", *("---:" for _ in table.columns[1:]))
    heads = tuple(head.replace("|", "\\|") for head in table.columns)
    body = [line(heads), line(rule), *(line(tuple(marked(row, c) for c in places)) for row in range(len(table.rows)))]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"### {table.title}", "", *body, *notes]) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated values, missing ones empty; title and notes follow as lines that begin with ``#``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell == MISSING else cell for cell in row] for row in table.rows)
    text.writelines(f"# {line}\n" for line in (table.title, *table.notes))
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX


def to_latex(table: Table) -> str:
    """A ``table`` environment for packages booktabs and threeparttable; deviations stand beside their means."""

    def marked(row: int, column: int) -> str:
        marks, text = table.marks_at(row, column), table.rows[row][column]
        deviation = table.columns[column].startswith("±") and text != MISSING
        text = latex(f"± {text}" if deviation else text)
        text = rf"\textbf{{{text}}}" if "best" in marks else text
        text = rf"\underline{{{text}}}" if "second" in marks else text
        return text + "$^{*}$" * ("significant" in marks)

    spec = "l" + "".join(r"@{\,}l" if head.startswith("±") else "r" for head in table.columns[1:])
    rows = [[marked(row, column) for column in range(len(table.columns))] for row in range(len(table.rows))]
    lines = [" & ".join(map(latex, table.columns)) + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows)]
    items = [rf"\item {latex(note)}" for note in table.notes]
    notes = [r"\begin{tablenotes}\footnotesize", *items, r"\end{tablenotes}"]
    return "\n".join([
        r"% \usepackage{booktabs,threeparttable}", r"\begin{table}", r"\centering", r"\begin{threeparttable}",
        rf"\caption{{{latex(table.title)}}}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule", *lines, r"\bottomrule",
        r"\end{tabular}", *(notes if table.notes else []), r"\end{threeparttable}", r"\end{table}", "",
    ])  # fmt: skip


def latex(text: str) -> str:
    """Text with LaTeX's special characters, and typographic signs that plain engines lack, written as commands."""
    return "".join(LATEX_SPECIAL.get(sign, sign) for sign in text)


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def to_html(table: Table) -> str:
    """A ``<figure>`` with a table and its notes; cells that begin with a number carry it as ``data-value``."""

    def data(row: int, column: int) -> str:
        marks, text = table.marks_at(row, column), html.escape(_starred(table, row, column))
        kinds = f' class="{" ".join(sorted(marks))}"' if marks else ""
        number = re.match(r"[+-]?\d+(\.\d+)?", table.rows[row][column])
        value = f' data-value="{float(number[0]):g}"' if number and column else ""
        tag = 'th scope="row"' if column == 0 else "td"
        return f"<{tag}{kinds}{value}>{text}</{tag.split()[0]}>"

    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in table.columns)
    rows = ["".join(data(row, column) for column in range(len(table.columns))) for row in range(len(table.rows))]
    notes = [f"<li>{html.escape(note)}</li>" for note in table.notes]
    return "\n".join([
        '<figure class="cfrbench-table">', f"<figcaption>{html.escape(table.title)}</figcaption>", "<table>",
        f"<thead><tr>{heads}</tr></thead>", "<tbody>", *(f"<tr>{row}</tr>" for row in rows), "</tbody>", "</table>",
        *(["<ul>", *notes, "</ul>"] if notes else []), "</figure>", "",
    ])  # fmt: skip

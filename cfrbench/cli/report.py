"""`cfrbench report` and `cfrbench runs`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, ChoiceOption, FoldOption, JsonOption, StoreOption, parse_names

if TYPE_CHECKING:
    from cfrbench.report.tables import Table

EXAMPLES = """
Tables: **scores** (that of the run), **classes** (each organ), **gains** (intervals, wins, tests), **ranking**,
**paper** (ours beside the paper's), **costs** (parameters, seconds, empty predictions).

Examples:

    cfrbench report

    cfrbench report latest --format latex --tables scores,gains -o tables.tex

    cfrbench report latest --format html -o report/
"""
Format = Annotated[
    Literal["rich", "markdown", "latex", "csv", "html"], typer.Option("--format", help="How to write it.")
]
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="A file, not the terminal; html: a folder.")]


@app.command(epilog=EXAMPLES)
def report(
    run: Annotated[str, typer.Argument(help="A run's name, a prefix of it, or latest.")] = "latest",
    format_: Format = "rich",
    wanted: Annotated[str | None, typer.Option("--tables", help="Which, comma-separated.  [default: all]")] = None,
    output: OutputOption = None,
    no_pseudo: Annotated[
        bool, typer.Option("--no-pseudo", help="html: do not let the fine-tuned model label test cases for the viewer.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Print the tables of a run again, with statistics, from stored scores; html into a folder: the run as one page."""
    from cfrbench import reporting
    from cfrbench.report import findings

    if format_ == "html" and output is not None and (output.is_dir() or not output.suffix):
        _write_page(run, store, output, label_tests=not no_pseudo)
        return
    remembered = reporting.remember(run, store)
    names = parse_names(wanted) or findings.TABLES
    show(findings.tables_of(remembered.cases, remembered.facts, remembered.costs, names), format_, output)


def show(tables: Sequence[Table], format_: str, output: Path | None) -> None:
    """Print tables in a format of `cfrbench.report.writers`, or write them to a file."""
    from cfrbench.files import write_atomic
    from cfrbench.report import writers

    if format_ == "rich" and output is None:
        for table in tables:
            Console().print(writers.to_rich(table))
        return
    text = "\n".join(writers.render(table, format_) for table in tables)
    if output is None:
        typer.echo(text)
    else:
        write_atomic(output, text.encode())


def _write_page(run: str, store: Path, folder: Path, *, label_tests: bool) -> None:
    from cfrbench.pages.writing import write_page

    done = write_page(run, store, folder, label_tests=label_tests, say=lambda what: typer.echo(f"  {what}", err=True))
    for note in done.notes:
        typer.secho(note, err=True, fg=typer.colors.YELLOW)
    typer.echo(f"{done.path}: {done.figures} figures, {done.volumes} volumes, {done.bytes / 2**20:.1f} MiB")


@app.command(epilog="Example:  cfrbench picture latest -o picture.png --ssl mt --labels 1")
def picture(
    run: Annotated[str, typer.Argument(help="A run's name, a prefix of it, or latest.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG or PDF to write.")],
    ssl: Annotated[str | None, typer.Option(help="Which method.  [default: the first]")] = None,
    labels: Annotated[int | None, typer.Option(help="Which budget.  [default: the first]")] = None,
    seed: Annotated[int | None, typer.Option(help="Which seed.  [default: the first]")] = None,
    fold: FoldOption = None,
    label_seed: ChoiceOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Draw image, truth, baseline and CFR twin on the test case of median gain."""
    from cfrbench import montage
    from cfrbench.report.pictures import checked_path

    wanted = {"ssl": ssl, "labels": labels, "seed": seed, "fold": fold, "choice": label_seed}
    case = montage.draw_run(run, store, checked_path(output), wanted)
    typer.echo(f"{output}: case {case}")


@app.command(epilog="Example:  cfrbench runs")
def runs(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the runs of a store, newest last."""
    from cfrbench.store import Store

    found = Store(store).runs()
    if as_json:
        typer.echo(json.dumps(found))
        return
    heads = ("data", "methods", "labels", "seeds", "preset", "failed")
    table = RichTable(Column("run", overflow="fold"), *heads, box=None)
    for record in found:
        config, ablation = record["config"], record["facts"].get("ablation")
        methods = f"ablate {ablation['kind']}" if ablation else config["ssl"]
        cells = [config["dataset"], methods, config["labels"], config["seeds"], config["preset"]]
        words = [",".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells]
        table.add_row(record["name"], *words, str(len(record["failures"])))
    Console().print(table)

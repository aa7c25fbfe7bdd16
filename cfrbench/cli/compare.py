"""`cfrbench compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption
from cfrbench.cli.report import Format, OutputOption, show

EXAMPLES = """
Examples:

    cfrbench compare la-mt-3f2a latest

    cfrbench compare latest mine.csv --metric hd95      (mine.csv: case,dice,hd95)
"""


@app.command(epilog=EXAMPLES)
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run's name, a prefix of it, or latest.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another run, or a CSV file of scores by case.")],
    metric: Annotated[Literal["dice", "jaccard", "asd", "hd95"], typer.Option(help="What is compared.")] = "dice",
    format_: Format = "rich",
    output: OutputOption = None,
    store: StoreOption = DEFAULT_STORE,
    other_store: Annotated[Path | None, typer.Option(help="Store of run B.  [default: --store]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs of the same test cases, or a run and somebody's scores: differences, intervals, tests."""
    from cfrbench import comparing
    from cfrbench.report import versus

    found = comparing.compare(a, b, metric, store, other_store)
    if as_json:
        typer.echo(json.dumps(versus.as_json(found), allow_nan=False))
    else:
        show([versus.table_of(found)], format_, output)

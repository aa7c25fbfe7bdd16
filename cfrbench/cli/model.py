"""`cfrbench model list | info | get | params`."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from cfrbench import registry
from cfrbench.cli import app
from cfrbench.cli.common import JsonOption, parse_names

if TYPE_CHECKING:
    from cfrbench.parameters import Count

model = typer.Typer(help="Look at foundation models, get their weights, count parameters.", no_args_is_help=True)
app.add_typer(model, name="model")


@model.command("list", epilog="Example:  cfrbench model list")
def list_(as_json: JsonOption = False) -> None:
    """Name every foundation model, and say whether its weights are here."""
    from cfrbench import catalogue

    found = [catalogue.about(name) for name in registry.names("model")]
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("name", "title", "encoder", "input", "licence", "weights", box=None)
    for row in found:
        table.add_row(row["name"], row["title"], row["encoder"], str(row["input_size"]), row["licence"], row["weights"])
    Console().print(table)


@model.command(epilog="Example:  cfrbench model info medsam")
def info(name: str, as_json: JsonOption = False) -> None:
    """Say what a foundation model is, what it sees, where its weights are from and where they are looked for."""
    from cfrbench import catalogue

    about = catalogue.about(name) | catalogue.details(name)
    if as_json:
        typer.echo(json.dumps(about))
        return
    for key, value in about.items():
        typer.echo(f"{key.replace('_', ' '):<13} {f'{value:,}' if key == 'parameters' else value}".rstrip())


@model.command(epilog="Examples:  cfrbench model get sam-vit-b   cfrbench model get medsam --from medsam_vit_b.pth")
def get(
    name: str,
    source: Annotated[Path | None, typer.Option("--from", help="A file you have: checked, then copied.")] = None,
    folder: Annotated[Path | None, typer.Option("--to", help="Folder; default: where runs look for it.")] = None,
) -> None:
    """Fetch a released checkpoint, going on after an interruption, and check that it is what it should be."""
    from cfrbench import catalogue

    if source is not None:
        place = catalogue.adopt(name, source, folder)
    else:
        with _bar(name) as progress:
            place = catalogue.fetch(name, folder, progress)
    typer.echo(f"{place}\nSHA-256 {catalogue.digest(place)}")
    if folder is not None:
        typer.echo(f"Use it with CFRBENCH_WEIGHTS={folder} or --set model.{name}.checkpoint={place}")


@model.command(epilog="Examples:  cfrbench model params   cfrbench model params --tune lora --classes 14")
def params(
    name: Annotated[str, typer.Option("--model", help="The foundation model.")] = "sam-vit-b",
    tune: Annotated[str | None, typer.Option(help="Fine-tuners, separated by commas; default: all.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Masks, background included.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the encoder's image.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Count the parameters of each fine-tuner: in all, flagged trainable, reached by a gradient. Needs no weights."""
    gc.disable()  # models of shapes alone are many small objects: looking through them for cycles takes a sixth
    try:
        from cfrbench.parameters import count_tuners

        rows = count_tuners(name, parse_names(tune) or (), input_size, classes)
    finally:
        gc.enable()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    # Eleven digits must not be cut; a narrow terminal may wrap the lines.
    Console(width=max(Console().width, 110)).print(_counts(rows))
    for row in rows:
        if row.reason:
            typer.echo(f"{row.tuner} does not fit: {row.reason}.")


def _counts(rows: list[Count]) -> Table:
    table = Table(box=None)
    for title in ("fine-tuner", "configuration"):
        table.add_column(title, no_wrap=True)
    for title in ("input", "masks", "total", "trainable", "with gradient"):
        table.add_column(title, justify="right")
    for row in rows:
        if not row.reason:
            numbers = (row.total, row.flagged, row.effective)
            table.add_row(row.tuner, row.title, str(row.input_size), str(row.num_classes), *(f"{n:,}" for n in numbers))
    return table


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that takes bytes done and bytes in all."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield show

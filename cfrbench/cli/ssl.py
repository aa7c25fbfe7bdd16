"""`cfrbench ssl list | show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cfrbench import registry
from cfrbench.cli import app
from cfrbench.cli.common import JsonOption
from cfrbench.errors import UsageError

ssl = typer.Typer(help="Look at SSL methods.", no_args_is_help=True)
app.add_typer(ssl, name="ssl")


@ssl.command("list", epilog="Example:  cfrbench ssl list")
def list_(as_json: JsonOption = False) -> None:
    """Name every SSL method with its reference."""
    found = [registry.load("ssl", name) for name in registry.names("ssl")]
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "title": c.title, "reference": c.reference} for c in found]))
        return
    table = Table("name", "title", "reference", box=None)
    for cls in found:
        table.add_row(cls.name, cls.title, cls.reference)
    Console().print(table)


@ssl.command(epilog="Example:  cfrbench ssl show acmt")
def show(
    name: Annotated[str | None, typer.Argument(help="A method; see `cfrbench ssl list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every method, as one page.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As text for a page.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a method's card: reference, networks, losses, options, and where paper and code differ."""
    from rich.markdown import Markdown

    from cfrbench import cards

    if (name is None) != everything:
        raise UsageError("Name one method, or give --all. `cfrbench ssl list` names them.")
    names = registry.names("ssl") if name is None else [name]
    if as_json:
        typer.echo(json.dumps([asdict(cards.card(one)) for one in names]))
        return
    text = cards.page(names) if name is None else cards.markdown(cards.card(name))
    if markdown:
        typer.echo(text, nl=False)
    else:
        Console().print(Markdown(text if name is None else f"{text}\nSymbols: {cards.SYMBOLS}"))

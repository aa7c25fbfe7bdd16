"""`cfrbench plugins`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cfrbench import registry
from cfrbench.cli import app
from cfrbench.cli.common import JsonOption
from cfrbench.errors import UsageError, suggest


@app.command(epilog="Example:  cfrbench plugins --kind ssl")
def plugins(
    kind: Annotated[str | None, typer.Option(help="Only this kind: " + ", ".join(registry.KINDS))] = None,
    check: Annotated[bool, typer.Option("--check", help="Import every plug-in, built-ins too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List every plug-in, where it comes from, and what is wrong with it."""
    if kind is not None and kind not in registry.KINDS:
        raise UsageError(f"No kind of plug-in is called '{kind}'. {suggest(kind, registry.KINDS)}")
    found = [item for item in registry.listing(check=check) if kind in (None, item.plugin.kind)]
    if as_json:
        rows = [{"kind": i.plugin.kind, "name": i.plugin.name, "distribution": i.plugin.distribution,
                 "version": i.plugin.version, "status": i.status, "detail": i.detail} for i in found]  # fmt: skip
        typer.echo(json.dumps(rows))
        return
    table = Table("kind", "name", "from", "state", box=None)
    for item in found:
        colour = "green" if item.status == "ok" else "red"
        words = item.status if not item.detail else f"{item.status}: {item.detail}"
        origin = f"{item.plugin.distribution} {item.plugin.version}"
        table.add_row(item.plugin.kind, item.plugin.name, origin, Text(words, style=colour))
    Console().print(table)

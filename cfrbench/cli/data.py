"""`cfrbench data list | info | check | show | import | prepare`."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from cfrbench import registry
from cfrbench.cli import app, data_prepare
from cfrbench.cli import data_look as look
from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption
from cfrbench.cli.data_import import EXAMPLES, import_

data = typer.Typer(help="Look at data sets, check their files, import your own.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("list", epilog="Example:  cfrbench data list")
def list_(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Name every data set that is known, and those that were imported into the store."""
    from cfrbench.prepared.source import imported_folder, imported_names

    found = [look.about(registry.load("data", name)) for name in registry.names("data") if name != "nifti"]
    known = {row["name"] for row in found}
    found += [look.imported(imported_folder(store, name)) for name in imported_names(store) if name not in known]
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("name", "title", "modality", "classes", "budgets", box=None)
    for row in found:
        budgets = ", ".join(f"{k} {v}" for k, v in row["budgets"].items())
        table.add_row(row["name"], row["title"], row["modality"], ", ".join(row["classes"][1:]), budgets)
    Console().print(table)


data.command(epilog=look.INFO_EXAMPLES)(look.info)
data.command(epilog=look.CHECK_EXAMPLES)(look.check)
data.command(epilog=look.SHOW_EXAMPLES)(look.show)
data.command("import", epilog=EXAMPLES)(import_)
data.command("prepare", epilog=data_prepare.EXAMPLES)(data_prepare.prepare)

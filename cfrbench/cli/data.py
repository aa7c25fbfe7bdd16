"""`cfrbench data list | info | check`, and the home of `import` and `prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cfrbench import registry
from cfrbench.cli import app, data_prepare
from cfrbench.cli.common import JsonOption, parse_set
from cfrbench.cli.data_import import EXAMPLES, import_

data = typer.Typer(help="Look at data sets and check their files.", no_args_is_help=True)
app.add_typer(data, name="data")
RootOption = Annotated[Path | None, typer.Option("--data-root", help="Folder of the data set.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. data.phantom.seed=1.")]


@data.command("list", epilog="Example:  cfrbench data list")
def list_(as_json: JsonOption = False) -> None:
    """Name every data set that is known."""
    found = [registry.load("data", name) for name in registry.names("data")]
    if as_json:
        typer.echo(json.dumps([_about(cls) for cls in found]))
        return
    table = Table("name", "title", "modality", "classes", "budgets", box=None)
    for cls in found:
        budgets = ", ".join(f"{k} {v}" for k, v in cls.budgets.items())
        table.add_row(cls.name, cls.title, cls.modality, ", ".join(cls.class_names[1:]), budgets)
    Console().print(table)


@data.command(epilog="Example:  cfrbench data info la")
def info(name: str, as_json: JsonOption = False) -> None:
    """Say what a data set is, where to get it, and under which licence."""
    about = _about(registry.load("data", name))
    if as_json:
        typer.echo(json.dumps(about))
        return
    about["budgets"] = [f"{name} {count}" for name, count in about["budgets"].items()] or ["none of its own"]
    about["synthetic"] = "yes" if about["synthetic"] else "no"
    for key, value in about.items():
        typer.echo(f"{key:<12} {value if not isinstance(value, list) else ', '.join(value)}")


@data.command(epilog="Example:  cfrbench data check la --data-root DIR")
def check(name: str, data_root: RootOption = None, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Read every case: missing or damaged files, shapes, labels, duplicates, leakage between lists."""
    from cfrbench.datasets import check_source
    from cfrbench.recipes import open_source

    source = open_source(name, data_root, parse_set(set_))
    found = check_source(source)
    split = source.split()
    if as_json:
        rows = [{"level": f.level, "message": f.message} for f in found]
        typer.echo(json.dumps({"train": len(split.train), "test": len(split.test), "findings": rows}))
    else:
        typer.echo(f"{source.title}: {len(split.train)} training and {len(split.test)} test cases. {split.note}")
        for f in found:
            typer.secho(f"{f.level}: {f.message}", fg="red" if f.level == "error" else "yellow")
        typer.echo(f"{len(found)} findings" if found else "nothing wrong found")
    if any(f.level == "error" for f in found):
        raise typer.Exit(1)


data.command("import", epilog=EXAMPLES)(import_)
data.command("prepare", epilog=data_prepare.EXAMPLES)(data_prepare.prepare)


def _about(cls: Any) -> dict[str, Any]:
    return {"name": cls.name, "title": cls.title, "modality": cls.modality, "classes": list(cls.class_names),
            "budgets": dict(cls.budgets), "origin": cls.origin, "licence": cls.licence,
            "synthetic": cls.synthetic}  # fmt: skip

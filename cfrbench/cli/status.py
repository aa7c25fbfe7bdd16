"""`cfrbench status`, `logs` and `cancel`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cfrbench.standing import CellState, Standing

RunArgument = Annotated[str, typer.Argument(help="A run's name, the beginning of it, or latest.")]
STYLES = {"running": "cyan", "failed": "red", "stopped": "yellow", "done": "green", "waiting": "dim"}


@app.command(epilog="Example:  cfrbench status latest --watch")
def status(
    run: RunArgument = "latest",
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until the run is over.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks of --watch.")] = 2.0,
    all_: Annotated[bool, typer.Option("--all", help="Cells that are done or wait too.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Say which cells of a run are done, running (where, since when, how far), failed (why) or waiting.

    It reads files of the store only: from another machine, and after the command that began the run has ended.
    """
    from rich.console import Console
    from rich.live import Live

    from cfrbench.standing import standing
    from cfrbench.store import Store

    home = Store(store)
    record = home.run(run)
    found = standing(home, record)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
        return
    console = Console()
    if not watch:
        console.print(_drawn(found, all_))
        return
    with Live(_drawn(found, all_), console=console, auto_refresh=False) as live:
        while not _over(found):
            time.sleep(every)
            found = standing(home, home.run(record["name"]))
            live.update(_drawn(found, all_), refresh=True)


def _over(found: Standing) -> bool:
    """Whether nothing will change by itself: all done, or the launcher has reported, or cancelled, and nothing runs."""
    ended = found.seconds is not None or found.cancelled
    return found.count("done") == len(found.cells) or (ended and not found.count("running"))


def _plain(found: Standing) -> dict[str, Any]:
    from cfrbench.standing import STATES

    return {"name": found.name, "seconds": found.seconds, "cancelled": found.cancelled,
            "counts": {state: found.count(state) for state in STATES},
            "cells": [asdict(cell) for cell in found.cells]}  # fmt: skip


def _drawn(found: Standing, everything: bool) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from cfrbench.standing import STATES

    counts = ", ".join(f"{found.count(state)} {state}" for state in STATES if state != "done" and found.count(state))
    head = f"{found.name}: {found.count('done')} of {len(found.cells)} cells done{counts and f', {counts}'}"
    table = Table("cell", "", "state", "stage", "step", "where", "since", "left", box=None)
    for state in STATES:
        for cell in found.cells:
            if cell.state == state and (everything or state not in ("done", "waiting")):
                table.add_row(str(cell.number), Text(cell.words), Text(state, style=STYLES[state]), *_stage_words(cell))
    parts: list[RenderableType] = [Text(head + ", cancelled" * found.cancelled)]
    reasons = {cell.stage.reason: cell.number for cell in reversed(found.cells) if cell.stage and cell.stage.reason}
    parts += [table] * bool(table.row_count)
    return Group(*parts, *(Text(f"cell {number}: {reason}", style="red") for reason, number in reasons.items()))


def _stage_words(cell: CellState) -> tuple[str, ...]:
    from cfrbench.wording import duration

    stage = cell.stage
    if stage is None:
        return ("",) * 5
    left = "" if stage.left_seconds is None or cell.state != "running" else duration(stage.left_seconds)
    since = time.strftime("%H:%M:%S", time.localtime(stage.since)) if stage.since else ""
    return stage.stage, f"{stage.step}/{stage.total}" if stage.total else "", stage.host, since, left


@app.command(epilog="Example:  cfrbench logs 7 --lines 50")
def logs(
    cell: Annotated[str, typer.Argument(help="Its number in `status --all`, a part of its name, or a stage's key.")],
    run: Annotated[str, typer.Option(help="A run's name, the beginning of it, or latest.")] = "latest",
    lines: Annotated[int, typer.Option(min=1, help="Of each stage's log, its last ones.")] = 10,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Print the end of the log of each stage of a cell."""
    from cfrbench import standing
    from cfrbench.files import read_log
    from cfrbench.store import Store
    from cfrbench.wording import log_line

    home = Store(store)
    record = home.run(run)
    chosen = standing.find_cell(record, cell)
    typer.echo(standing.words(chosen))
    found = list(standing.logs(home, chosen))
    if not found:
        typer.echo("No stage of this cell has begun.")
    for title, path in found:
        typer.echo(f"\n{title}: {path}")
        for event in read_log(path)[-lines:]:
            typer.echo(f"  {time.strftime('%H:%M:%S', time.localtime(event['time']))}  {log_line(event)}")


@app.command(epilog="Example:  cfrbench cancel latest")
def cancel(run: RunArgument = "latest", store: StoreOption = DEFAULT_STORE) -> None:
    """Ask everybody who works for a run, on whatever machine, to save and stop; the run's command goes on from there.

    Running stages notice within seconds. Jobs that wait in a cluster's queue are taken out of it where its commands are
    at hand; where they are not, they end by themselves as soon as they begin.
    """
    from cfrbench import cancelling
    from cfrbench.store import Store

    for line in cancelling.cancel(Store(store), run):
        typer.echo(line)

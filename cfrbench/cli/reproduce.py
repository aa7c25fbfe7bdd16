"""`cfrbench reproduce`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cfrbench.cli import app
from cfrbench.cli.common import (
    DEFAULT_STORE,
    ExecutorOption,
    JsonOption,
    StoreOption,
    parse_labels,
    parse_replacements,
    parse_seeds,
    parse_set,
)
from cfrbench.config import PresetName

if TYPE_CHECKING:
    from cfrbench.exhibits.forecasts import Outlook
    from cfrbench.exhibits.planning import Exhibit
    from cfrbench.exhibits.showing import Shown

EXAMPLES = """
Examples:

    cfrbench reproduce --list

    cfrbench reproduce table-3 --data-root DIR

    cfrbench reproduce table-1 --dataset phantom

    cfrbench reproduce all --dataset phantom --dataset btcv=phantom-organs --dataset mact=phantom-organs --dry-run

    cfrbench reproduce table-9 --data-root la=DIR --data-root btcv=DIR
"""


@app.command(epilog=EXAMPLES)
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Tables and figures, or all.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name every table and figure.")] = False,
    dataset: Annotated[
        list[str] | None, typer.Option(help="NAME in place of every data set, or OLD=NEW in place of one.")
    ] = None,
    data_root: Annotated[
        list[str] | None, typer.Option(help="DIR of the data set, or NAME=DIR where there are several.")
    ] = None,
    preset: Annotated[PresetName | None, typer.Option(help="smoke, quick or paper.  [default: the recipe's]")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labelled cases in place of the recipe's: numbers, or scarce, moderate.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds: 0 .. N-1.  [default: the recipe's]")] = None,
    seed_list: Annotated[str | None, typer.Option(help="These seeds, comma-separated.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. training.steps=1800.")] = None,
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[Path, typer.Option("-o", "--output", help="Each goes into DIR/NAME.")] = Path("reproduced"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages at a time.  [default: what the machine has room for]")
    ] = None,
    executor: ExecutorOption = "local",
    no_run: Annotated[bool, typer.Option("--no-run", help="Compute nothing, show what is finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show cells, time, memory, disk; run nothing.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="--dry-run: as if N GPUs took one stage each.")] = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="--dry-run: time nothing, learn from the store alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run, finish or draw again a table or figure of the paper, ours beside theirs."""
    if list_ or not names:
        _list(as_json)
        return
    from cfrbench.exhibits import planning

    asked = planning.Overrides(parse_replacements(dataset), _folders(data_root), preset, parse_labels(labels),
                               parse_seeds(seeds, seed_list), parse_set(set_))  # fmt: skip
    exhibits, refused = planning.prepare_all(names, asked, store)
    if dry_run:
        from cfrbench.exhibits.forecasts import outlooks

        _forecast(outlooks(exhibits, store, jobs=gpus or jobs, probing=not no_probe), refused, as_json)
        return
    answers = [_one(exhibit, output / exhibit.name, Means(not no_run, executor, jobs), as_json) for exhibit in exhibits]
    if as_json:
        typer.echo(json.dumps({"exhibits": answers, "refused": refused}))
    _say_refused(refused)
    if refused or any(answer["failed"] for answer in answers):
        raise typer.Exit(1)


def _folders(values: list[str] | None) -> dict[str, Path]:
    return {name: Path(folder).expanduser().absolute() for name, folder in parse_replacements(values).items()}


def _list(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cfrbench.exhibits import recipe

    found = recipe.listing()
    if as_json:
        rows = [{"name": one.name, "from": one.distribution, "title": one.recipe and one.recipe.title,
                 "about": one.recipe and one.recipe.about, "reason": one.reason} for one in found]  # fmt: skip
        typer.echo(json.dumps(rows))
        return
    table = Table("name", "shows", "data", box=None)
    for one in found:
        if one.recipe is None:
            table.add_row(one.name, Text(f"broken: {one.reason}", style="red"), "")
        else:
            data = dict.fromkeys(experiment.dataset for experiment in one.recipe.experiment)
            table.add_row(one.name, Text(one.recipe.about), ", ".join(data))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


class Means(NamedTuple):
    """How stages that are missing are run, if they are."""

    compute: bool
    executor: str
    jobs: int | None


def _one(exhibit: Exhibit, folder: Path, means: Means, as_json: bool) -> dict[str, Any]:
    """Run an exhibit, write and print it; what `--json` says of it."""
    from cfrbench import exhibition
    from cfrbench.cli import progress
    from cfrbench.exhibits import running, showing

    exhibition.make_folder(folder)
    if not as_json:
        _say(exhibit)
    with progress.watch(quiet=as_json) as observer:
        finished = running.finish(exhibit, **means._asdict(), observer=observer)
    shown = showing.show(exhibit, finished, folder, compute=means.compute)
    failed = running.failures(finished)
    if not as_json:
        _print(shown, failed, folder)
    return {"name": exhibit.name, "folder": str(folder), "files": [str(path) for path in shown.files],
            "runs": [one.plan.name for one in finished], "missing": exhibit.missing, "failed": failed,
            "not_drawn": shown.omitted}  # fmt: skip


def _say(exhibit: Exhibit) -> None:
    """What will be made, and what differs from the paper; to standard error."""
    from cfrbench.cli import progress

    typer.echo(f"{exhibit.recipe.title}. {exhibit.recipe.about}", err=True)
    for plan in exhibit.planned:
        progress.header(plan.facts())
    for note in dict.fromkeys(note for part in exhibit.parts for note in part.notes):
        typer.echo(note, err=True)
    for missing in exhibit.missing:
        typer.secho(f"Missing: {missing}", err=True, fg=typer.colors.YELLOW)


def _print(shown: Shown, failed: dict[str, str], folder: Path) -> None:
    from rich.console import Console

    from cfrbench.report import writers

    console = Console(width=None if sys.stdout.isatty() else writers.WIDTH)
    for table in shown.tables:
        console.print(writers.to_rich(table))
    for name, reason in shown.omitted.items():
        typer.secho(f"not drawn: {name}: {reason}", err=True, fg=typer.colors.YELLOW)
    for title, reason in failed.items():
        typer.secho(f"failed: {title}: {reason}", err=True, fg=typer.colors.RED)
    typer.echo(f"wrote {len(shown.files)} files into {folder}")


def _say_refused(refused: dict[str, str]) -> None:
    for name, reason in refused.items():
        typer.secho(f"not made: {name}: {reason}", err=True, fg=typer.colors.YELLOW)


def _forecast(outlooks: list[Outlook], refused: dict[str, str], as_json: bool) -> None:
    """The cells of one exhibit, a line for each of several; to standard output."""
    from rich.console import Console
    from rich.table import Table

    from cfrbench.wording import duration, storage

    if as_json:
        rows = [{"name": one.name, "cells": one.cells, "stages": len(one.todo), "shared": one.shared,
                 **dataclasses.asdict(one.cost)} for one in outlooks]  # fmt: skip
        typer.echo(json.dumps({"exhibits": rows, "refused": refused}))
        return
    if len(outlooks) == 1:
        for cell, left in outlooks[0].cells.items():
            typer.echo(f"  {'finished' if not left else f'{left} stages left':<14} {cell}")
    heads = ("name", "cells", "finished", "stages to run", "work", "wall time", "memory", "disk", "learned from")
    table = Table(*heads, box=None)
    for one in outlooks:
        cost, unsure = one.cost, " + ?" * bool(one.cost.unknown)
        table.add_row(one.name, str(len(one.cells)), str(one.finished), f"{len(one.todo)}", duration(cost.work_seconds)
                      + unsure, f"{duration(cost.wall_seconds)}{unsure} ({cost.jobs} at a time)",
                      f"{cost.peak_mib / 1024:.1f} GiB{unsure}", f"{storage(cost.disk_mib)}{unsure}",
                      ", ".join(cost.sources))  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if len(outlooks) > 1:
        total = sum(one.cost.wall_seconds for one in outlooks)
        typer.echo(f"{sum(len(one.todo) for one in outlooks)} stages in all, {duration(total)}")
    _say_refused(refused)

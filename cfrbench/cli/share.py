"""`cfrbench export` and `cfrbench verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption

if TYPE_CHECKING:
    from cfrbench.archive.verifying import Verdict

#: findings that a terminal shows; --json gives all
SHOWN = 20


@app.command(epilog="Example:  cfrbench export latest -o run.zip")
def export(
    run: Annotated[str, typer.Argument(help="A run's name, a prefix of it, or latest.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The archive to write.")],
    with_truth: Annotated[
        bool, typer.Option("--with-truth", help="Put the true masks in too. Read the data set's licence first.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a run as one small archive: scores, predictions as NIfTI, configuration, protocol, checksums."""
    from cfrbench.archive.writing import export_run

    done = export_run(run, store, output, with_truth=with_truth)
    typer.echo(f"{done.path}: {done.cells} cells, {done.predictions} label maps, {done.bytes / 2**20:.1f} MiB, SHA-256 "
               f"{done.sha256}")  # fmt: skip
    if with_truth:
        typer.secho(f"It holds the true masks. Their licence: {done.licence}.", err=True, fg=typer.colors.YELLOW)


@app.command(epilog="Example:  cfrbench verify run.zip --data-root DIR")
def verify(
    archive: Annotated[Path, typer.Argument(help="An archive that `cfrbench export` wrote.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the data set, for the truth.  [default: synthetic, or the archive's]")
    ] = None,
    max_gib: Annotated[float, typer.Option(help="What the archive may hold unpacked.")] = 4.0,
    as_json: JsonOption = False,
) -> None:
    """Recompute every number of an archive from its predictions; exit code 1 if anything differs."""
    from cfrbench.archive.verifying import verify as check

    def show(number: int, total: int, case: str) -> None:
        typer.echo(f"  case {number}/{total}: {case}", err=True)

    verdict = check(archive, data_root, max_gib, None if as_json else show)
    if as_json:
        typer.echo(json.dumps(asdict(verdict)))
    else:
        _show(verdict)
    if verdict.findings:
        raise typer.Exit(1)


def _show(verdict: Verdict) -> None:
    checked = (
        f"{verdict.files} files, {verdict.numbers} numbers of {verdict.predictions} label maps, truth {verdict.truth}"
    )
    if not verdict.findings:
        typer.secho(f"{verdict.run}: all equal. Checked: {checked}.", fg=typer.colors.GREEN)
        return
    for finding in verdict.findings[:SHOWN]:
        typer.secho(f"differs: {finding}", fg=typer.colors.RED)
    more = len(verdict.findings) - SHOWN
    if more > 0:
        typer.echo(f"... and {more} more; --json shows all.")
    typer.secho(f"{verdict.run}: {len(verdict.findings)} differences. Checked: {checked}.", fg=typer.colors.RED)

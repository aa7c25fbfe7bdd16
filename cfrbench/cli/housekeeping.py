"""`cfrbench explain`, `doctor` and `clean`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, ChoiceOption, FoldOption, JsonOption, StoreOption

if TYPE_CHECKING:
    from cfrbench.diagnosis import Finding


@app.command(epilog="Example:  cfrbench explain latest --ssl mt --labels 1 --variant cfr")
def explain(
    run: Annotated[str, typer.Argument(help="A run's name, a prefix of it, latest, or a TOML file.")] = "latest",
    ssl: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    labels: Annotated[int | None, typer.Option(help="Only this budget.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    variant: Annotated[str | None, typer.Option(help="baseline, cfr or pseudo-label.")] = None,
    fold: FoldOption = None,
    label_seed: ChoiceOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Say for each stage of a cell whether it would be reused, and if not, what differs from the nearest one."""
    from cfrbench import explanation, sweep

    wanted = {"ssl": ssl, "labels": labels, "seed": seed, "variant": variant, "fold": fold,
              "choice": label_seed}  # fmt: skip
    config = sweep.read_config(run, store)
    for line in explanation.explain(config, store, {k: v for k, v in wanted.items() if v is not None}):
        typer.echo(line)


@app.command(epilog="Examples:  cfrbench doctor;  cfrbench doctor --bench")
def doctor(
    bench: Annotated[bool, typer.Option("--bench", help="Also measure: speeds, what presets take; a minute.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: packages, devices, precision, memory, store, weights."""
    from cfrbench.diagnosis import findings

    found: list[Finding] = []
    for finding in itertools.chain(findings(store), _measured() if bench else ()):
        found.append(finding)
        if not as_json:
            mark, colour = ("ok  ", None) if finding.ok else ("LOOK", "yellow")
            typer.secho(f"{mark}  {finding.what}: {finding.detail}", fg=colour)
    if as_json:
        typer.echo(json.dumps([{"what": f.what, "ok": f.ok, "detail": f.detail} for f in found]))
    if not all(f.ok for f in found):
        raise typer.Exit(1)


def _measured() -> Iterator[Finding]:
    from cfrbench import probes

    yield from probes.findings()


@app.command(epilog="Example:  cfrbench clean --yes")
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it only say what would be removed.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Remove what no run refers to: unreferenced and damaged artifacts, remains of stages that will not go on."""
    from cfrbench import cleaning, sweep
    from cfrbench.store import Store

    home = Store(store)
    found = cleaning.unused(home, sweep.referenced(home))
    for item in found:
        typer.echo(f"{item.path}: {item.reason}, {item.bytes / 2**20:.1f} MiB")
    if yes:
        typer.echo(f"removed {cleaning.remove(home, found) / 2**20:.1f} MiB")
    else:
        typer.echo(f"{len(found)} folders could go.{' Add --yes to remove them.' if found else ''}")

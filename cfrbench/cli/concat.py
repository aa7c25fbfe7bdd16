"""`cfrbench concat list | show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cfrbench.cli import app
from cfrbench.cli.common import JsonOption, parse_set
from cfrbench.config import PresetName, RunConfig, validate

concat = typer.Typer(help="Look at concatenation strategies.", no_args_is_help=True)
app.add_typer(concat, name="concat")

EXAMPLES = """
Examples:

    cfrbench concat show --strategy grid -o grid.png

    cfrbench concat show --strategy scaled:n=4 --dataset la --data-root DIR --canvas 480 -o scaled.png

    cfrbench concat show --strategy natural-mix --done 0.5 -o halfway.png
"""


@concat.command("list", epilog="Example:  cfrbench concat list")
def list_() -> None:
    """Name every strategy that is known, with the first line of its description."""
    from cfrbench import registry

    for name in registry.names("concat"):
        said = (registry.load("concat", name).__doc__ or "").strip().splitlines()
        typer.echo(f"{name:<16} {said[0] if said else ''}")


@concat.command(epilog=EXAMPLES)
def show(
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG or PDF to write.")],
    strategy: Annotated[str, typer.Option(help="NAME or NAME:OPTION=VALUE.")] = "grid",
    dataset: Annotated[str, typer.Option(help="Data set.")] = "phantom",
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    case: Annotated[str | None, typer.Option(help="Case id.  [default: the first training case]")] = None,
    canvas: Annotated[int | None, typer.Option(help="Side of a canvas in pixels.  [default: the preset's]")] = None,
    preset: Annotated[PresetName, typer.Option(help="smoke, quick or paper: its crop, canvas, grid.")] = "quick",
    model: Annotated[str | None, typer.Option(help="Foundation model.  [default: the preset's]")] = None,
    most: Annotated[int, typer.Option(min=1, help="Draw at most so many canvases.")] = 8,
    done: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Draw a canvas of fine-tuning, this share of its steps being over."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. tuning.patch=[32,32,16].")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw what a foundation model sees of a case under a strategy: its middle crop, with the labels' outlines."""
    from cfrbench import ablation, exhibition
    from cfrbench.report.pictures import checked_path

    values = parse_set(set_) | ({} if canvas is None else {"tuning.canvas": canvas})
    root = None if data_root is None else data_root.expanduser().absolute()
    base = validate(RunConfig, {"dataset": dataset, "data_root": root, "preset": preset, "model": model, "set": values},
                    "the command line")  # fmt: skip
    config = ablation.named(base, "concat", strategy).config
    found = exhibition.show_canvases(config, case, checked_path(output), most=most, done=done)
    typer.echo(json.dumps(found) if as_json else _words(strategy, found, output))


def _words(strategy: str, found: dict[str, Any], output: Path) -> str:
    def size(name: str) -> str:
        return " x ".join(map(str, found[name]))

    several = "es" * (found["canvases"] > 1)
    lines = [
        f"{output}: case {found['case']} ({size('volume')} voxels on the working grid), middle crop {size('crop')}",
        f"{strategy}: {found['canvases']} canvas{several} of {found['side']} x {found['side']} pixels, "
        f"model input {found['input']}",
        f"{found['slices_per_canvas']:g} of {found['slices']} slices on a canvas; "
        f"{found['ignored']:.1%} of its pixels ignored in labels",
    ]
    if found["tiles"]:
        lines.append(f"{size('tiles')} tiles, {found['blank_tiles']} of them blank")
    return "\n".join(lines)

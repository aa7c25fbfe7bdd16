"""`cfrbench evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cfrbench.cli import app
from cfrbench.cli.common import JsonOption, parse_set
from cfrbench.errors import UsageError

EXAMPLES = """
Examples:

    cfrbench evaluate predictions/ labels/

    cfrbench evaluate --checkpoint vnet.pth --dataset la --data-root DIR --preset paper
"""


@app.command(epilog=EXAMPLES)
def evaluate(
    predictions: Annotated[Path | None, typer.Argument(help="A folder of masks, or one mask.")] = None,
    truth: Annotated[Path | None, typer.Argument(help="The true masks, of the same file names.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a segmenter, instead of masks.")] = None,
    dataset: Annotated[str, typer.Option(help="With --checkpoint: the data set.")] = "phantom",
    data_root: Annotated[Path | None, typer.Option(help="With --checkpoint: its folder.")] = None,
    net: Annotated[str, typer.Option(help="With --checkpoint: the segmenter.")] = "vnet",
    preset: Annotated[str, typer.Option(help="With --checkpoint: patch, strides and grid.")] = "paper",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. scoring.unit=mm.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score anybody's masks, or anybody's published weights, by the protocol of the tables."""
    from cfrbench import evaluation

    values = parse_set(set_)
    if checkpoint is not None and predictions is not None:
        raise UsageError(f"--checkpoint {checkpoint} and the masks {predictions} contradict each other: either weights "
                         "or masks are scored. Give one of them.")  # fmt: skip
    if checkpoint is not None:
        frame, unit = evaluation.of_checkpoint(checkpoint, dataset, data_root, net, preset, values)
    elif predictions is not None and truth is not None:
        frame, unit = evaluation.of_folders(predictions, truth, values)
    else:
        raise UsageError("Give PREDICTIONS and TRUTH, or --checkpoint FILE with --dataset. See --help for examples.")
    if as_json:
        typer.echo(json.dumps(evaluation.as_json(frame, unit), allow_nan=False))
    else:
        _show(frame, unit)


def _show(frame: Any, unit: str) -> None:
    table = Table("case", "class", "Dice (%)", "Jaccard (%)", f"ASD ({unit})", f"95HD ({unit})", "empty", box=None)
    metrics = ["dice", "jaccard", "asd", "hd95"]
    for row in frame.to_dict("records"):
        table.add_row(row["case"], row["class"], *(f"{row[m]:.2f}" for m in metrics), row["empty"])
    means = frame[metrics].mean()
    table.add_row("mean", "", *(f"{means[m]:.2f}" for m in metrics), str(int((frame["empty"] != "").sum())))
    Console().print(table)

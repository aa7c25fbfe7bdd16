"""`cfrbench predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfrbench.cli import app
from cfrbench.cli.common import DEFAULT_STORE, ChoiceOption, FoldOption, StoreOption


@app.command(epilog="Example:  cfrbench predict latest scan.nii.gz -o mask.nii.gz --ssl mt --labels 1 --variant cfr")
def predict(
    run: Annotated[str, typer.Argument(help="A run's name, a prefix of it, or latest.")],
    source: Annotated[Path, typer.Argument(help="A NIfTI scan, or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The mask, or a folder of masks.")],
    ssl: Annotated[str | None, typer.Option(help="Which method of the run.")] = None,
    labels: Annotated[int | None, typer.Option(help="Which budget.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which seed.")] = None,
    variant: Annotated[str | None, typer.Option(help="baseline or cfr.")] = None,
    fold: FoldOption = None,
    label_seed: ChoiceOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Segment scans with a trained segmenter; masks have the geometry of their scans. No foundation model is needed."""
    from cfrbench import prediction

    wanted = {"ssl": ssl, "labels": labels, "seed": seed, "variant": variant, "fold": fold,
              "choice": label_seed}  # fmt: skip
    network, bench = prediction.open_model(store, run, wanted)
    prediction.predict_files(network, bench, source, output, lambda path: typer.echo(str(path)))

"""Writes an exhibit into a folder: tables in every format, figures as PNG and PDF, and where it all comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfrbench import __version__
from cfrbench.exhibition import make_folder
from cfrbench.exhibits import figures, tables
from cfrbench.exhibits.planning import Exhibit
from cfrbench.exhibits.running import Finished, failures
from cfrbench.files import storage_errors, write_atomic, write_json
from cfrbench.report import writers
from cfrbench.report.tables import Table

#: format -> ending of its files
ENDINGS = {"rich": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv", "html": ".html"}
ABOUT = "about.json"


@dataclass(frozen=True)
class Shown:
    """What was written: tables as they are, the files, and the reason for each figure that could not be drawn."""

    tables: tuple[Table, ...]
    files: tuple[Path, ...]
    omitted: dict[str, str]


def show(exhibit: Exhibit, finished: Sequence[Finished], folder: Path, *, compute: bool) -> Shown:
    """Write tables, figures and ``about.json``; ``compute`` is explained at `cfrbench.exhibits.figures.draw_all`."""
    make_folder(folder)
    made = tables.all_tables(exhibit, finished)
    written = []
    for stem, table in made.items():
        for name in writers.FORMATS:
            written.append(folder / f"{stem}{ENDINGS[name]}")
            write_atomic(written[-1], writers.render(table, name).encode())
    with storage_errors("write the figures into", folder):
        drawn, omitted = figures.draw_all(exhibit, finished, folder, compute=compute)
    write_json(folder / ABOUT, _about(exhibit, finished, omitted))
    return Shown(tuple(made.values()), (*written, *drawn, folder / ABOUT), omitted)


def _about(exhibit: Exhibit, finished: Sequence[Finished], omitted: dict[str, str]) -> dict[str, Any]:
    """Where the numbers come from: `cfrbench report RUN` and `cfrbench explain RUN` go on from the runs' names."""
    return {
        "exhibit": exhibit.name,
        "recipe": exhibit.recipe.model_dump(mode="json"),
        "cfrbench": __version__,
        "runs": [{"run": one.plan.name, "config": one.part.config.model_dump(mode="json"),
                  "protocol": one.result.facts["protocol"],
                  "cells": len(one.plan.chains),
                  "finished": sum(one.artifact("score", cell) is not None for cell in one.plan.chains)}
                 for one in finished],
        "missing": exhibit.missing,
        "failed": failures(finished),
        "not_drawn": omitted,
    }  # fmt: skip

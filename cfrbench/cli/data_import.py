"""`cfrbench data import`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption, parse_names
from cfrbench.cli.progress import Pace
from cfrbench.errors import ConfigError

if TYPE_CHECKING:
    from cfrbench.prepared.filling import Progress
    from cfrbench.prepared.importing import Imported, ImportRequest, Survey

EXAMPLES = """
Examples:

    cfrbench data import DIR --name mine

    cfrbench data import DIR --name mine --labels-map 1=spleen,2+3=kidneys --window=-175,250

    cfrbench data import pairs.csv --name mine --test 10 --stratify volume --order seed --seed 3
"""

Source = Annotated[Path, typer.Argument(help="A folder of NIfTI images and labels, or a .csv that lists them.")]
Name = Annotated[str, typer.Option(help="What to call the set.")]
LabelsMap = Annotated[str | None, typer.Option(help="VALUE=NAME,VALUE+VALUE=NAME,...; other values: background.")]
Channel = Annotated[int | None, typer.Option(help="Which of several volumes of a case, from 0.")]
Contrast = Annotated[str | None, typer.Option(help="Ending of the wanted images' names, e.g. flair.")]
Axcodes = Annotated[str, typer.Option(help="Orientation of the arrays; slices lie along the last axis.")]
Spacing = Annotated[str | None, typer.Option(help="Resample to X,Y,Z mm, or auto.")]
Window = Annotated[str | None, typer.Option(help="Clip intensities to LOW,HIGH, e.g. Hounsfield units.")]
Test = Annotated[float, typer.Option(help="Patients to test on: a share below 1, or their number.")]
Val = Annotated[float, typer.Option(help="Patients for validation, likewise.")]
TestCases = Annotated[str | None, typer.Option(help="These cases are the test list, comma-separated.")]
Seed = Annotated[int, typer.Option(help="Of the split and of --order seed.")]
Stratify = Annotated[Literal["none", "volume", "classes", "column"], typer.Option(help="What lists have alike.")]
Order = Annotated[Literal["name", "seed"], typer.Option(help="Of the training list: its first cases are labelled.")]
Labelled = Annotated[str | None, typer.Option(help="These cases are the first labelled ones.")]
PatientPattern = Annotated[str | None, typer.Option(help="Regular expression; group 1 is the patient.")]
IgnoreAffine = Annotated[bool, typer.Option("--ignore-affine", help="Lay labels on images by index.")]
FollowLinks = Annotated[bool, typer.Option("--follow-links", help="Links may lead out of the folder.")]
MaxGib = Annotated[float, typer.Option(help="Largest file, unpacked.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and copies.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace a set of this name.")]
Jobs = Annotated[int | None, typer.Option(help="Processes.  [default: all cores]")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what was found, write nothing.")]


def import_(
    source: Source, name: Name, store: StoreOption = DEFAULT_STORE, labels_map: LabelsMap = None,
    channel: Channel = None, contrast: Contrast = None, axcodes: Axcodes = "RAS", spacing: Spacing = None,
    window: Window = None, test: Test = 0.2, val: Val = 0.0, test_cases: TestCases = None, seed: Seed = 0,
    stratify: Stratify = "none", order: Order = "name", labelled: Labelled = None,
    patient_pattern: PatientPattern = None, ignore_affine: IgnoreAffine = False, follow_links: FollowLinks = False,
    max_gib: MaxGib = 16.0, skip_bad: SkipBad = False, replace: Replace = False, jobs: Jobs = None,
    dry_run: DryRun = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Turn a folder of images and labels into a data set that `cfrbench run --dataset NAME` takes."""
    from cfrbench import registry
    from cfrbench.config import validate
    from cfrbench.machine import room_for_jobs
    from cfrbench.prepared import importing
    from cfrbench.prepared.pair_reader import Reading
    from cfrbench.prepared.pairs import Search
    from cfrbench.prepared.splits import SplitChoice
    from cfrbench.scan_steps import ScanSteps

    words = "the command line"
    split = {"seed": seed, "test": test, "val": val, "stratify": stratify, "order": order,
             "labelled": parse_names(labelled) or (), "test_cases": parse_names(test_cases) or ()}  # fmt: skip
    reading = {"axcodes": axcodes, "channel": channel, "limit_gib": max_gib, "ignore_affine": ignore_affine}
    low_high = numbers("--window", window, 2)
    steps = {"window": low_high, "spacing_mm": None if spacing == "auto" else numbers("--spacing", spacing, 3)}
    request = importing.ImportRequest(
        source.expanduser(), name, store, tuple(registry.names("data")),
        search=Search(channel, contrast, patient_pattern, follow_links), reading=validate(Reading, reading, words),
        split=validate(SplitChoice, split, words), steps=validate(ScanSteps, steps, words), labels=labels_map,
        skip_bad=skip_bad, replace=replace, jobs=jobs or room_for_jobs(1, 1.0),
    )  # fmt: skip
    with Bar(transient=True, disable=as_json, console=Console(stderr=True)) as bar:
        seen = importing.survey_folder(request, watching(bar))
        request = importing.with_own_spacing(request, seen) if spacing == "auto" else request
        done = None if dry_run else importing.import_folder(request, watching(bar), seen)
    _tell(request, seen, done, as_json)
    if dry_run and seen.bad:
        raise typer.Exit(1)


def numbers(option: str, text: str | None, count: int) -> tuple[float, ...] | None:
    """``count`` numbers separated by commas; None stays None, anything else is a ConfigError that names the option."""
    names = parse_names(text) if text is not None else None
    parts = text.split(",") if text is not None and names else []
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if text is not None and len(numbers) != count:
        raise ConfigError(f"{option} {text} is not {count} numbers separated by commas.")
    return numbers or None


def watching(bar: Bar) -> Progress:
    """Show each thing that is done as a bar with ETA on a terminal, as a line every ten seconds elsewhere."""
    tasks: dict[str, Any] = {}
    paces: dict[str, Pace] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
            paces[what] = Pace(total, time.monotonic())
        bar.update(tasks[what], completed=done)
        left = None if bar.disable or bar.console.is_terminal else paces[what].left_seconds(done, time.monotonic())
        if left is not None:
            bar.console.print(f"{what} {done}/{total}  ETA {left:.0f} s")

    return show


# ---------------------------------------------------------------------------------------------------------------------
# what was found


def _tell(request: ImportRequest, seen: Survey, done: Imported | None, as_json: bool) -> None:
    facts = _facts(request, seen, done)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{facts['layout']}: {facts['cases']} cases, {facts['with_label']} with a label")
    typer.echo(f"classes: {', '.join(facts['classes'][1:])}  ({facts['labels']})")
    for case, reason in seen.bad.items():
        typer.secho(f"cannot use {case}: {reason}", fg="red")
    if done is None:
        typer.echo("Nothing was written.")
        return
    record = done.prepared.record
    table = Table("", "", box=None, show_header=False)
    table.add_row("training", f"{len(record.train)} cases, first {', '.join(record.train[:4])}")
    table.add_row("test", f"{len(record.test)} cases: {', '.join(record.test[:8])}{' ...' * (len(record.test) > 8)}")
    table.add_row("split", record.note)
    for preset in ("quick", "paper"):
        values = record.protocol[preset]
        table.add_row(preset, f"crop {_sides(values['training.patch'])}, canvas {values['tuning.canvas']}, grid / "
                              f"{values.get('grid.downsample', 1)}")  # fmt: skip
    table.add_row("voxels", f"{_sides(record.made['target_spacing_mm'])} mm would suit all (--spacing auto)")
    Console().print(table)
    for note in done.notes:
        typer.secho(note, fg="yellow")
    typer.echo(f"Prepared as '{record.name}' in {done.prepared.folder}. Next: cfrbench run --dataset {record.name} "
               "--ssl mt --labels 1")  # fmt: skip


def _facts(request: ImportRequest, seen: Survey, done: Imported | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": request.name, "layout": seen.found.layout, "cases": len(seen.cases),
        "with_label": sum(pair.label is not None for pair in seen.found.pairs), "classes": list(seen.labels.names),
        "labels": seen.labels.stated(), "bad": dict(seen.bad),
    }  # fmt: skip
    if done is not None:
        record = done.prepared.record
        facts |= {"folder": str(done.prepared.folder), "train": list(record.train), "val": list(record.val),
                  "test": list(record.test), "protocol": record.protocol, "left_out": record.left_out,
                  "notes": list(done.notes)}  # fmt: skip
    return facts


def _sides(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values)

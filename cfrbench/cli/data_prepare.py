"""`cfrbench data prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption, parse_set
from cfrbench.cli.data_import import Jobs, numbers, watching
from cfrbench.errors import UsageError

if TYPE_CHECKING:
    from cfrbench.prepared.preparing import Done, Look, PrepareRequest
    from cfrbench.prepared.public import PublicSource

EXAMPLES = """
Examples:

    cfrbench data prepare la --raw DIR

    cfrbench data prepare brats19 --raw DIR -o prepared/brats19 --jobs 4

    cfrbench data prepare btcv --raw DIR --window=-175,250

    cfrbench data prepare btcv --explain
"""

Dataset = Annotated[str, typer.Argument(help="Which data set: la, brats19, btcv, mact, acdc, hippocampus, msd.")]
Raw = Annotated[Path | None, typer.Option(help="Folder of its files, raw or as the field passes them around.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to fill.  [default: in the store]")]
LayoutOption = Annotated[str | None, typer.Option(help="Which layout, where the folder holds several.")]
Crop = Annotated[str | None, typer.Option(help="none, nonzero, nonzero-open, above-minimum.")]
Spacing = Annotated[str | None, typer.Option(help="Resample to X,Y,Z mm, or none.")]
Window = Annotated[str | None, typer.Option(help="Clip intensities to LOW,HIGH, or none.")]
ClipAbove = Annotated[str | None, typer.Option(help="Clip at this share of the cumulative histogram, or none.")]
Normalise = Annotated[str | None, typer.Option(help="none, zscore, zscore-positive, zscore-above-minimum.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the reading; --explain lists them.")]
Lists = Annotated[Path | None, typer.Option(help="Folder with train.list and test.list.  [default: --raw]")]
Test = Annotated[float, typer.Option(help="Where no list names the cases: share or number of patients to test on.")]
Seed = Annotated[int, typer.Option(help="Of such a split.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and copies.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace what the folder holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what was found, write nothing.")]
Explain = Annotated[bool, typer.Option("--explain", help="List layouts, steps and options, and end.")]


def prepare(
    dataset: Dataset, raw: Raw = None, output: Output = None, store: StoreOption = DEFAULT_STORE,
    layout: LayoutOption = None, crop: Crop = None, spacing: Spacing = None, window: Window = None,
    clip_above: ClipAbove = None, normalise: Normalise = None, set_: SetOption = None, lists: Lists = None,
    test: Test = 0.2, seed: Seed = 0, skip_bad: SkipBad = False, replace: Replace = False, jobs: Jobs = None,
    dry_run: DryRun = False, explain: Explain = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Turn the files of a public data set into mapped arrays, which `cfrbench run --dataset NAME` opens at once."""
    from cfrbench.config import validate
    from cfrbench.machine import room_for_jobs
    from cfrbench.prepared import preparing
    from cfrbench.prepared.source import imported_folder
    from cfrbench.prepared.splits import SplitChoice

    values = parse_set(set_)
    own = {key: values.pop(key) for key in list(values) if key.startswith("data.")}
    source = _source(dataset, raw, own)
    if explain:
        _explain(source, as_json)
        return
    steps = {"crop": crop, "spacing_mm": _or_none("--spacing", spacing, 3), "window": _or_none("--window", window, 2),
             "clip_above": _or_none("--clip-above", clip_above, 1), "normalise": normalise}  # fmt: skip
    folder = output.expanduser() if output else imported_folder(store.absolute(), source.name)
    request = preparing.PrepareRequest(
        source, folder, layout, {key: None if value == () else value for key, value in steps.items()
                                 if value is not None}, values, lists,
        validate(SplitChoice, {"seed": seed, "test": test}, "the command line"), skip_bad, replace,
        jobs or room_for_jobs(1, 1.0),
    )  # fmt: skip
    seen = preparing.look(request)
    with Bar(transient=True, disable=as_json, console=Console(stderr=True)) as bar:
        done = None if dry_run else preparing.prepare_set(request, watching(bar), seen)
    _tell(request, seen, done, as_json)


def _source(dataset: str, raw: Path | None, options: dict[str, Any]) -> PublicSource:
    """The data set on its raw folder; UsageError if it is not one that is prepared."""
    from cfrbench.prepared.public import PublicSource
    from cfrbench.recipes import open_source

    source = open_source(dataset, raw.expanduser() if raw else None, options)
    if not isinstance(source, PublicSource):
        raise UsageError(f"'{dataset}' has no files to prepare. A folder of your own goes through `cfrbench data "
                         "import DIR --name NAME`.")  # fmt: skip
    if source.is_prepared:
        raise UsageError(f"{raw} holds prepared data already. Give the folder of the files it was made from.")
    return source


def _or_none(option: str, text: str | None, count: int) -> Any:
    """Numbers, ``()`` for "none", None if the option is not given."""
    if text == "none":
        return ()
    found = numbers(option, text, count)
    return found[0] if found and count == 1 else found


def _explain(source: PublicSource, as_json: bool) -> None:
    """Layouts with their steps and the options of their readers."""
    rows: list[dict[str, Any]] = []
    for layout in source.layouts:
        fields = type(layout.reading).model_fields
        rows.append({"layout": layout.name, "place": layout.example(), "loads as it is": layout.ready,
                     "steps": list(layout.steps.words()),
                     "labels": layout.labels.stated() if layout.labels else "as stored",
                     "options": {key: {"default": value, "meaning": fields[key].description or ""}
                                 for key, value in layout.reading.model_dump(mode="json").items()}})  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        way = "loads as it is, or prepared" if row["loads as it is"] else "is prepared first"
        typer.echo(f"{row['layout']}: {row['place']}  ({way})")
        typer.echo(f"    steps   {', '.join(row['steps']) or 'none'}")
        typer.echo(f"    labels  {row['labels']}")
        for key, about in row["options"].items():
            typer.echo(f"    --set {key}={_plain(about['default'])}    {about['meaning']}".rstrip())


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def _tell(request: PrepareRequest, seen: Look, done: Done | None, as_json: bool) -> None:
    split = done.prepared.record if done else seen.split
    facts: dict[str, Any] = {
        "name": request.source.name, "layout": seen.layout, "train": list(split.train), "val": list(split.val),
        "test": list(split.test), "split": split.note, "left_out": dict(seen.left_out),
    }  # fmt: skip
    if done:
        facts |= {"folder": str(done.prepared.folder), "notes": list(done.notes),
                  "left_out": done.prepared.record.left_out}  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table("", "", box=None, show_header=False)
    table.add_row("layout", seen.layout)
    for role in ("train", "val", "test"):
        if facts[role]:
            table.add_row(role, f"{len(facts[role])} cases, first {', '.join(facts[role][:4])}")
    table.add_row("split", facts["split"] or "the field's, whole")
    table.add_row("left out", str(len(facts["left_out"])))
    Console().print(table)
    if done is None:
        typer.echo("Nothing was written.")
        return
    for note in done.notes:
        typer.secho(note, fg="yellow")
    name, folder = request.source.name, done.prepared.folder
    where = "" if folder.parent.name == "datasets" else f" --data-root {folder}"
    typer.echo(f"Prepared {len(done.prepared.record.cases)} cases in {folder}. Next: cfrbench run --dataset {name}"
               f"{where} --ssl mt --labels 1")  # fmt: skip

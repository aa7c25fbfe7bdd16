"""`cfrbench data info`, `check` and `show`: what a data set is, whether it is right, how it looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cfrbench.cli.common import DEFAULT_STORE, JsonOption, StoreOption, parse_names, parse_set

if TYPE_CHECKING:
    from cfrbench.contracts import DataSource
    from cfrbench.prepared.inspection import CaseRow, Inspection

INFO_EXAMPLES = """
Examples:

    cfrbench data info la

    cfrbench data info la --data-root DIR
"""
CHECK_EXAMPLES = """
Examples:

    cfrbench data check la --data-root DIR

    cfrbench data check mine --json
"""
SHOW_EXAMPLES = """
Examples:

    cfrbench data show la --data-root DIR -o la.png

    cfrbench data show mine --cases a,b -o two.png
"""
NameArgument = Annotated[str, typer.Argument(help="A data set: built in, of a guest, or imported into the store.")]
RootOption = Annotated[Path | None, typer.Option("--data-root", help="Folder of the data set.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. data.phantom.seed=1.")]
_COLOURS = {"error": "red", "note": "yellow", "ok": "green"}


def info(
    name: NameArgument, data_root: RootOption = None, set_: SetOption = None, store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Say what a data set is and where to get it; with its files, a table of its cases and their class volumes."""
    from cfrbench import registry
    from cfrbench.prepared import inspection

    cls = registry.load("data", name) if name in registry.names("data") else None
    if cls is not None and data_root is None and not cls.synthetic:
        _tell(about(cls), as_json)
        return
    source = _source(name, data_root, set_, store)
    with _bar(len(_listed(source)), as_json) as advance:
        rows = inspection.rows_of(source, advance)
    facts = about(source) | {"name": name, **_split_facts(source)}
    if as_json:
        typer.echo(json.dumps(facts | {"cases": [_plain(row, source) for row in rows]}))
        return
    _tell(facts, as_json=False)
    Console().print(_volumes(rows, source))


def check(
    name: NameArgument, data_root: RootOption = None, set_: SetOption = None, store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Read every case and judge it: files, shapes, labels, intensities, copies, lists, orientation, crops."""
    from cfrbench.prepared.inspection import inspect

    source = _source(name, data_root, set_, store)
    with _bar(len(_listed(source)), as_json) as advance:
        found = inspect(source, advance)
    if as_json:
        typer.echo(json.dumps(_checked(source, found)))
    else:
        _show_check(source, found)
    if found.broken:
        raise typer.Exit(1)


def show(
    name: NameArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG or PDF to write.")],
    cases: Annotated[str | None, typer.Option(help="These cases, comma-separated.  [default: the first 12]")] = None,
    data_root: RootOption = None, set_: SetOption = None, store: StoreOption = DEFAULT_STORE,
) -> None:  # fmt: skip
    """Draw the slice of each case with most labelled voxels, a coloured line around each class."""
    from cfrbench import montage
    from cfrbench.report.pictures import checked_path

    source = _source(name, data_root, set_, store)
    drawn = montage.draw_cases(source, parse_names(cases), checked_path(output))
    typer.echo(f"{output}: {', '.join(drawn)}")


# ---------------------------------------------------------------------------------------------------------------------


def about(source: Any) -> dict[str, Any]:
    """What a data set, as a class or opened, says of itself."""
    return {"name": source.name, "title": source.title, "modality": source.modality,
            "classes": list(source.class_names), "budgets": dict(source.budgets), "origin": source.origin,
            "licence": source.licence, "synthetic": source.synthetic}  # fmt: skip


def imported(folder: Path) -> dict[str, Any]:
    """What an imported set says of itself."""
    from cfrbench.prepared.reading import PreparedSet

    record = PreparedSet.open(folder).record
    return {"name": record.name, "title": record.title, "modality": record.modality,
            "classes": list(record.class_names), "budgets": record.budgets, "origin": record.origin,
            "licence": record.licence, "synthetic": False}  # fmt: skip


def _source(name: str, root: Path | None, pairs: list[str] | None, store: Path) -> DataSource:
    from cfrbench.recipes import find_source

    return find_source(name, root.expanduser() if root else None, parse_set(pairs), store)


def _listed(source: DataSource) -> Sequence[str]:
    from cfrbench.errors import DataError

    try:
        split = source.split()
    except DataError:
        return ()  # what is wrong with it will be told
    return (*split.train, *split.val, *split.test)


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("reading", total=total)
        yield lambda case: bars.update(task, advance=1, description=f"reading {case}")


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key:<12} {_in_words(value)}")


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none of its own"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _split_facts(source: DataSource) -> dict[str, Any]:
    split = source.split()
    return {"train": len(split.train), "val": len(split.val), "test": len(split.test), "split": split.sha256,
            "split_note": split.note}  # fmt: skip


def _plain(row: CaseRow, source: DataSource) -> dict[str, Any]:
    volumes = dict(zip(source.class_names[1:], row.millilitres(), strict=False))
    return {**vars(row), "millilitres": volumes}


def _checked(source: DataSource, found: Inspection) -> dict[str, Any]:
    findings = [{"level": f.level, "message": f.message, "cases": list(f.cases)} for f in found.findings]
    counts = {role: sum(row.role == role for row in found.rows) for role in ("train", "val", "test")}
    return {**counts, "verdict": "error" if found.broken else "ok", "findings": findings,
            "cases": [_plain(row, source) for row in found.rows]}  # fmt: skip


def _sides(values: Sequence[float]) -> str:
    return "x".join(f"{value:g}" for value in values) if any(values) else "–"


def _show_check(source: DataSource, found: Inspection) -> None:
    """A line for each case, then what was found, worst first."""
    if found.rows:
        table = Table("case", "list", "shape", "mm", "file axes", "low / median / high", "sd", "labelled ml", "verdict",
                      box=None)  # fmt: skip
        for row in found.rows:
            read = any(row.shape)
            table.add_row(row.case, row.role, _sides(row.shape), _sides(row.spacing_mm), row.orientation or "–",
                          f"{row.low:.4g} / {row.median:.4g} / {row.high:.4g}" if read else "–",
                          f"{row.deviation:.4g}" if read else "–", f"{sum(row.millilitres()):.4g}",
                          f"[{_COLOURS[row.verdict]}]{row.verdict}")  # fmt: skip
        Console(width=None if Console().is_terminal else 140).print(table)
    counts = [f"{sum(row.role == role for row in found.rows)} {role}" for role in ("train", "val", "test")]
    typer.echo(f"{source.title}: {', '.join(counts)} cases")
    for finding in sorted(found.findings, key=lambda finding: finding.level):
        typer.secho(f"{finding.level}: {finding.message}", fg=_COLOURS[finding.level])
    typer.echo(f"{len(found.findings)} findings" if found.findings else "nothing wrong found")


def _volumes(rows: Sequence[CaseRow], source: DataSource) -> Table:
    table = Table("case", "list", "shape", "mm", *(f"{name} (ml)" for name in source.class_names[1:]), box=None)
    for row in rows:
        volumes = [f"{value:.4g}" for value in row.millilitres()] or ["–"] * (source.num_classes - 1)
        table.add_row(row.case, row.role, _sides(row.shape), _sides(row.spacing_mm), *volumes)
    return table

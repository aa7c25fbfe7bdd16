"""`cfrbench report RUN --format html -o DIR`: gathers everything a page shows and writes it as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfrbench import __version__
from cfrbench.archive.cells import manifests
from cfrbench.config import write_toml
from cfrbench.files import storage_errors, write_atomic
from cfrbench.pages import figures, observatory, viewer
from cfrbench.pages.material import Group, Material
from cfrbench.report import findings, frames, writers
from cfrbench.report.tables import MISSING, Table, number
from cfrbench.reporting import remember

TEMPLATES = Path(__file__).parent / "templates"
PAGE, CASES = "index.html", "cases.csv"


@dataclass(frozen=True)
class Written:
    """A finished page: its size, whether it holds the viewer, and what it had to leave out."""

    path: Path
    bytes: int
    volumes: int
    figures: int
    notes: tuple[str, ...]


def write_page(
    reference: str, store: Path, folder: Path, *, label_tests: bool = True, say: Callable[[str], None] = lambda _: None
) -> Written:
    """Write ``folder``/index.html and the scores behind it as cases.csv.

    ``label_tests`` lets the fine-tuned model label the test cases for the viewer; the store keeps what it says.
    ``say`` is told what is being done. Without the data set there are no volumes and no pictures, and the page says so.
    """
    material = Material.of(reference, store)
    with storage_errors("make the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    groups = material.groups(label_tests=label_tests, say=say)
    context = _context(material, groups, say)
    page = _render(context).encode()
    write_atomic(folder / PAGE, page)
    write_atomic(folder / CASES, material.result.cases.to_csv(index=False).encode())
    count = sum(len(context[name]) for name in ("results_figures", "case_figures", "pseudo_figures"))
    return Written(folder / PAGE, len(page), len(context["volumes"]), count, tuple(material.notes))


def _context(material: Material, groups: list[Group], say: Callable[[str], None]) -> dict[str, Any]:
    result = material.result
    shown = bool(groups) and material.source is not None
    script = viewer.niivue_script() if shown else None
    if shown and script is None:
        material.notes.append("There is no volume viewer, but a picture of each case: install "
                              f"cfrbench[{viewer.EXTRA}] for it.")  # fmt: skip
    say("volumes" if script else "pictures")
    volumes, left_out = viewer.payloads(material, groups) if script else ([], [])
    if left_out:
        material.notes.append(f"Too large for one page, and so not in the viewer: {', '.join(left_out)}.")
    say("figures")
    case_figures = list(figures.telling_cases(material, groups)) if shown else []
    montages = (
        [figures.montage(material, groups[0], case) for case in material.test_cases] if shown and not script else []
    )
    seen = observatory.observe(material)
    return {
        "title": f"{result.facts['title']}: {result.name}", "run": result.name, "facts": result.facts,
        "version": __version__, "notes": material.notes, "results": _tables(material),
        "results_figures": [*figures.results(material), *figures.sweep(material)],
        "cases": writers.to_html(_case_table(result.cases, result.facts)),
        "case_figures": case_figures, "montages": montages, "groups": [_group(group) for group in groups],
        "class_count": len(result.facts["classes"]), "volumes": volumes,
        "niivue": script[0] if script else "", "niivue_from": script[1] if script else "",
        "observatory": [writers.to_html(table) for table in (observatory.by_class(seen), observatory.by_case(seen))]
        if seen else [],
        "pseudo_figures": list(figures.pseudo_cases(material)),
        "request": write_toml(result.config.model_copy(update={"data_root": None})),
        "protocol": str(result.facts["protocol"]).split("; "), "stages": writers.to_html(_stage_table(material)),
        "recipes": list(_recipes(material)), "environments": _environments(material), "seconds": result.seconds,
    }  # fmt: skip


def _render(context: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    return environment.get_template("report.html").render(context)


def _tables(material: Material) -> list[str]:
    run = remember(material.result.name, material.home.root)
    return [writers.to_html(table) for table in findings.tables_of(run.cases, run.facts, run.costs, findings.TABLES)]


def _group(group: Group) -> dict[str, Any]:
    return {"title": group.title, "layers": [{"key": layer.key, "name": layer.name} for layer in group.layers]}


# ---------------------------------------------------------------------------------------------------------------------
# tables of a page


def _case_table(cases: Any, facts: Mapping[str, Any]) -> Table:
    """Every score, one row per cell, case and class."""
    keys = ["title", "variant", "labels", "seed", "case", "class", "empty"]
    wide = cases.pivot_table(index=keys, columns="metric", values="value", sort=False, dropna=False, aggfunc="first")
    wide = wide.dropna(how="all").reset_index().reindex(columns=[*keys, *frames.METRICS])
    rows = [
        (row["title"] + " + CFR" * (row["variant"] == "cfr"), row["variant"], str(row["labels"]), str(row["seed"]),
         row["case"], row["class"], *(number(row[metric]) for metric in frames.METRICS), row["empty"])
        for row in wide.to_dict("records")
    ]  # fmt: skip
    unit = facts["unit"]
    columns = ("Method", "Variant", "Labelled", "Seed", "Case", "Class", "Dice (%)", "Jaccard (%)", f"ASD ({unit})",
               f"95HD ({unit})", "Empty")  # fmt: skip
    return Table("Every score", columns, tuple(rows), ("Empty: which of the two masks was.",))


def _stage_table(material: Material) -> Table:
    """Every stage behind the numbers: how long it took, on what."""
    rows = tuple(
        (manifest["title"], manifest["stage"], f"{manifest['seconds']:.1f}", _short(manifest["peak_mib"]),
         str(manifest["attempts"]), str(manifest["environment"]["accelerator"] or manifest["environment"]["cpu"]),
         manifest["key"][:12])
        for manifest in manifests(material.record, material.home)
    )  # fmt: skip
    columns = ("Stage", "Kind", "Seconds", "Peak memory (MiB)", "Attempts", "Ran on", "Key")
    notes = ("Seconds and memory of the process that ran it; longer where other work shared the machine.",)
    return Table("Every stage", columns, rows, notes)


def _short(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def _recipes(material: Material) -> Iterator[tuple[str, str]]:
    """Title and JSON of each stage's recipe; lists of cases are told by their length."""
    for manifest in manifests(material.record, material.home):
        recipe = {name: f"{len(value)} cases" if name in ("labelled", "unlabelled", "test") else value
                  for name, value in manifest["recipe"].items()}  # fmt: skip
        yield manifest["title"], json.dumps(recipe, indent=1, ensure_ascii=False)


def _environments(material: Material) -> list[dict[str, Any]]:
    """Every different environment that a stage ran in."""
    found = {json.dumps(manifest["environment"], sort_keys=True): manifest["environment"]
             for manifest in manifests(material.record, material.home)}  # fmt: skip
    return list(found.values())

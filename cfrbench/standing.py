"""Where a run stands, read from the files of its store alone: from any machine, and after its launcher has died.

No torch here, and no walk through the store: `standing` lists two folders and reads the logs of unfinished stages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cfrbench import leases
from cfrbench.artifact import BEGIN, FAILED, LENGTH, LOG, MANIFEST
from cfrbench.cells import Cell
from cfrbench.errors import UsageError
from cfrbench.files import read_json, read_log
from cfrbench.store import SERVICE_FOLDERS, Store

State = Literal["done", "running", "failed", "stopped", "waiting"]
STATES: tuple[State, ...] = ("running", "failed", "stopped", "waiting", "done")

#: how long the silence of a lease is borne before `status` calls its holder gone
SILENCE_SECONDS = 4 * leases.BEAT_SECONDS


@dataclass(frozen=True)
class StageState:
    """An unfinished stage that was begun. ``left_seconds``: at its pace; None before there is one."""

    stage: str
    key: str
    state: State
    host: str = ""
    since: float = 0.0  # seconds since 1970, of the machine that runs it
    step: int = 0
    total: int = 0
    left_seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class CellState:
    """One cell: its number in the table, its words, its state; ``stage`` is what runs, failed or stopped."""

    number: int
    words: str
    state: State
    stage: StageState | None = None


@dataclass(frozen=True)
class Standing:
    """A whole run. ``seconds`` is None as long as no launcher has come to the end of it."""

    name: str
    seconds: float | None
    cancelled: bool
    cells: tuple[CellState, ...]

    def count(self, state: State) -> int:
        """How many cells are in this state."""
        return sum(cell.state == state for cell in self.cells)


def standing(home: Store, record: Mapping[str, Any]) -> Standing:
    """Where the run of ``record`` stands."""
    scored = set(_listing(home.root / "score"))
    begun = {name.rpartition("-")[2]: name for name in _listing(home.root / "partial")}
    now = _now(home)
    known: dict[str, StageState] = {}
    cells = []
    for number, cell in enumerate(record["cells"], 1):
        if cell["score"] in scored:
            cells.append(CellState(number, words(cell), "done"))
            continue
        for key in cell["keys"]:
            if key in begun and key not in known:
                known[key] = _stage(home, begun[key], now)
        stages = [known[key] for key in cell["keys"] if key in known]
        chosen = min(stages, key=lambda stage: STATES.index(stage.state), default=None)
        cells.append(CellState(number, words(cell), chosen.state if chosen else "waiting", chosen))
    return Standing(record["name"], record["seconds"], home.cancel_mark(record["name"]).exists(), tuple(cells))


def words(cell: Mapping[str, Any]) -> str:
    """What a person calls a cell of a record."""
    return Cell(**{f.name: cell[f.name] for f in fields(Cell) if f.name in cell}).words


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _now(home: Store) -> float:
    """The time by the clock that dates the store's files, which may be another machine's."""
    probe = home.root / "locks" / "probe"
    try:
        probe.touch()
    except OSError:  # somebody else's store, or a full disk
        return time.time()
    return probe.stat().st_mtime


def _stage(home: Store, name: str, now: float) -> StageState:
    stage, _, key = name.rpartition("-")
    events = read_log(home.root / "partial" / name / LOG)
    starts = [index for index, event in enumerate(events) if event["event"] == BEGIN]
    attempt = events[starts[-1] :] if starts else events
    lease = home.lease(key)
    holder = leases.read(lease) or {}
    state: State = "stopped"
    if holder and now - lease.stat().st_mtime < SILENCE_SECONDS:
        state = "running"
    elif attempt and attempt[-1]["event"] == FAILED:
        state = "failed"
    total = next((event["total"] for event in attempt if event["event"] == LENGTH), 0)
    steps = [event for event in attempt if event["event"] == "step"]
    return StageState(
        stage, key, state, str(holder.get("host", "")), attempt[0]["time"] if attempt else 0.0,
        steps[-1]["step"] if steps else 0, total, _left(steps, total),
        attempt[-1]["error"] if state == "failed" else "",
    )  # fmt: skip


def _left(steps: list[dict[str, Any]], total: int) -> float | None:
    if len(steps) < 2 or steps[-1]["step"] == steps[0]["step"]:
        return None
    pace = (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"])
    return float(pace * (total - steps[-1]["step"]))


# ---------------------------------------------------------------------------------------------------------------------
# one cell


def find_cell(record: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    """The cell that ``reference`` names: its number, the beginning of a stage's key, or a part of its words."""
    cells: list[Mapping[str, Any]] = record["cells"]
    if reference.isdigit() and 1 <= int(reference) <= len(cells):
        return cells[int(reference) - 1]
    hits = [cell for cell in cells if reference.lower() in words(cell).lower()]
    hits = hits or [cell for cell in cells if any(key.startswith(reference) for key in cell["keys"])][:1]
    if len(hits) == 1:
        return hits[0]
    some = "; ".join(words(cell) for cell in hits[:5]) or "none"
    raise UsageError(f"'{reference}' names {len(hits) or 'no'} cells of {record['name']} ({some}). Give the number "
                     "that `cfrbench status --all` shows, more of its words, or the beginning of a stage's "
                     "key.")  # fmt: skip


def logs(home: Store, cell: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Of each stage of a cell that was begun, needs first: its name with its state, and its log."""
    finished = [folder for folder in _listing(home.root) if folder not in SERVICE_FOLDERS]
    begun = {name.rpartition("-")[2]: name for name in _listing(home.root / "partial")}
    for key in cell["keys"]:
        if key in begun:
            yield f"{begun[key].rpartition('-')[0]}, unfinished", home.root / "partial" / begun[key] / LOG
            continue
        for stage in finished:
            folder = home.root / stage / key
            if (folder / MANIFEST).is_file():
                seconds = read_json(folder / MANIFEST)["seconds"]
                yield f"{stage}, finished in {seconds:.1f} s", folder / LOG

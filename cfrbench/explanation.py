"""Why a stage is reused or not: its recipe against the nearest one in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfrbench.artifact import MANIFEST
from cfrbench.config import RunConfig
from cfrbench.contracts import StageTask
from cfrbench.errors import UsageError
from cfrbench.files import read_json
from cfrbench.store import Store
from cfrbench.sweep import Plan, plan


def explain(config: RunConfig, store: Path, wanted: Mapping[str, Any]) -> Iterator[str]:
    """Lines about every stage of every cell that matches ``wanted`` (ssl, labels, seed, variant)."""
    planned = plan(config, store)
    cells = [cell for cell in planned.chains if all(getattr(cell, k) == v for k, v in wanted.items())]
    if not cells:
        raise UsageError(f"No cell matches {dict(wanted)}. The run has: {choices(planned)}.")
    home = Store(store)
    for cell in cells:
        yield cell.words
        for task in planned.chains[cell]:
            yield from _stage(home, task)


def choices(planned: Plan) -> str:
    """The cells of a plan in a few words."""
    where = {c: f", fold {c.fold}" * bool(c.fold) + f", choice {c.choice}" * bool(c.choice) for c in planned.chains}
    return "; ".join(f"{c.ssl} {c.variant}, {c.labels} labels, seed {c.seed}{where[c]}" for c in planned.chains)


def _stage(home: Store, task: StageTask) -> Iterator[str]:
    artifact = home.find(task.stage, task.key)
    if artifact:
        yield f"  {task.stage:<8} {task.key[:12]}  reused: made {artifact.manifest['created']}"
        return
    nearest = _nearest(home, task)
    if nearest is None:
        yield f"  {task.stage:<8} {task.key[:12]}  to run: the store has no other {task.stage} stage"
        return
    key, differences = nearest
    yield f"  {task.stage:<8} {task.key[:12]}  to run: differs from {key[:12]} in"
    for path, (before, now) in list(differences.items())[:8]:
        yield f"             {path}: {before!r} there, {now!r} here"


def _nearest(home: Store, task: StageTask) -> tuple[str, dict[str, tuple[Any, Any]]] | None:
    folder = home.root / task.stage
    candidates = []
    for manifest in folder.glob(f"*/{MANIFEST}") if folder.is_dir() else []:
        recipe = read_json(manifest)["recipe"]
        candidates.append((manifest.parent.name, difference(recipe, task.recipe)))
    return min(candidates, key=lambda found: len(found[1]), default=None)


def difference(before: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves at which two JSON values differ, by dotted path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*before, *now}):
            found |= difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        before, now = list(before), list(now)
    return {} if before == now else {path: (before, now)}

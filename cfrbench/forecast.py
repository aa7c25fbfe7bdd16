"""Time, memory and disk that stages will take here, from what finished stages took on this machine.

A stage's time is a start plus so many units: optimiser steps, or volumes. Both are read from the manifest and log of a
finished stage that does the same work (plug-ins, options and settings equal; cases, seed and number of steps may
differ). Without one, a stage that differs in the SSL method alone stands in. Without that, `probe` runs a chain in
miniature in a store of its own.
"""

from __future__ import annotations

import heapq
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from cfrbench.agenda import Agenda
from cfrbench.artifact import LOG, Artifact
from cfrbench.config import digest
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError
from cfrbench.files import read_log
from cfrbench.machine import environment
from cfrbench.recipes import task
from cfrbench.stages import STAGES, StageWork
from cfrbench.store import Store
from cfrbench.wording import duration

#: optimiser steps and volumes of a probe
PROBE_STEPS, PROBE_CASES = 3, 2
#: finished stages of each sort that are looked at, however large a store has grown
LOOKED_AT = 500
#: how a cost is marked that was learned of a stage with another SSL method
ANOTHER = "another method"
#: stages whose files grow with the number of volumes
VOLUMES = ("pseudo", "predict")
#: what makes two machines take different times
MACHINE = ("cpu", "cores", "torch", "accelerator")


@dataclass(frozen=True)
class Rate:
    """What one kind of stage costs here: seconds to start, seconds for each unit, highest memory, files it leaves.

    disk_mib: of the whole artifact, or of each volume for stages that label volumes (`VOLUMES`).
    """

    start_seconds: float
    unit_seconds: float
    peak_mib: float
    disk_mib: float
    gpu_mib: float | None = None  # None where none was used


@dataclass(frozen=True)
class Cost:
    """One stage's forecast; ``like`` says of what it was learned: the same work, another method's, or a probe."""

    seconds: float
    peak_mib: float
    disk_mib: float
    like: str
    gpu_mib: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a list of stages needs; ``unknown`` counts those of which nothing is known."""

    work_seconds: float
    wall_seconds: float
    peak_mib: float
    disk_mib: float
    jobs: int
    unknown: int
    sources: tuple[str, ...]


Lookup = Callable[[str], Mapping[str, Any] | None]


@dataclass
class Rates:
    """Rates by the kind of work, exact and with any SSL method."""

    exact: dict[str, Rate] = field(default_factory=dict)
    loose: dict[str, Rate] = field(default_factory=dict)
    probed: set[str] = field(default_factory=set)

    def learn(self, home: Store, *, probed: bool = False) -> None:
        """Take in what the newest stages of a store that this machine has computed say of kinds not known yet."""
        here = {name: environment()[name] for name in MACHINE if name != "accelerator"}
        whole = _newest(home)
        recipes = {artifact.key: artifact.manifest["recipe"] for artifact in whole}
        for artifact in whole:
            if {name: artifact.manifest["environment"].get(name) for name in here} != here:
                continue
            try:
                kinds = kind_of_work(artifact.stage, artifact.manifest["recipe"], recipes.get)
                count = units(artifact.stage, artifact.manifest["recipe"], recipes.get)
            except KeyError:  # what it stands on was removed, or its recipe is of another version
                continue
            new = [(known, kind) for known, kind in zip((self.exact, self.loose), kinds, strict=True)
                   if kind not in known]  # fmt: skip
            if not new:
                continue
            rate = _rate(artifact, count)  # reads the whole log
            for known, kind in new:
                known[kind] = rate
                if probed:
                    self.probed.add(kind)

    def cost(self, stage: StageTask, recipes: Lookup) -> Cost | None:
        """The forecast of one stage; None if nothing is known of its kind."""
        exact, loose = kind_of_work(stage.stage, stage.recipe, recipes)
        kind = exact if exact in self.exact else loose
        rate = self.exact.get(exact) or self.loose.get(loose)
        if rate is None:
            return None
        like = "a probe" if kind in self.probed else "the same work" if kind == exact else ANOTHER
        count = units(stage.stage, stage.recipe, recipes)
        disk_mib = rate.disk_mib * (count if stage.stage in VOLUMES else 1)
        return Cost(rate.start_seconds + rate.unit_seconds * count, rate.peak_mib, disk_mib, like, rate.gpu_mib)


def _newest(home: Store) -> list[Artifact]:
    """The `LOOKED_AT` finished stages of each sort that were completed last, the latest first."""
    found = []
    for stage in STAGES:
        folder = home.root / stage
        entries = [(entry.stat().st_mtime, entry.name) for entry in os.scandir(folder)] if folder.is_dir() else []
        found += [home.find(stage, key) for _, key in heapq.nlargest(LOOKED_AT, entries)]
    return sorted((a for a in found if a is not None), key=lambda a: str(a.manifest["created"]), reverse=True)


def kind_of_work(stage: str, recipe: Mapping[str, Any], recipes: Lookup) -> tuple[str, str]:
    """Two hashes of what decides a stage's time apart from the number of units: exact, and with any SSL method."""
    settings = deepcopy(recipe["settings"])
    for section in ("tuning", "training"):
        settings.get(section, {}).pop("steps", None)
    work = {"stage": stage, "data": recipe["data"], "settings": settings}
    work |= {name: recipe[name] for name in ("concat", "model", "tune", "net", "ssl") if name in recipe}
    if stage == "train":
        guidance = recipe.get("guidance", {})
        work["online"] = guidance.get("stage") == "tune" and kind_of_work("tune", _at(recipes, guidance), recipes)[0]
    elif stage == "pseudo":
        work["from"] = kind_of_work("tune", _at(recipes, recipe["from"]), recipes)[0]
    elif stage == "predict":  # the method is gone by then, the network is not
        trained = _at(recipes, recipe["from"])
        work["net"] = [trained["net"], trained["settings"]["grid"], trained["settings"]["compute"]]
    # The windows are in a training's settings only where a method labels whole volumes itself.
    others = {"settings": {name: value for name, value in settings.items() if stage != "train" or name != "inference"}}
    return digest(work), digest({name: value for name, value in (work | others).items() if name != "ssl"})


def units(stage: str, recipe: Mapping[str, Any], recipes: Lookup) -> int:
    """Optimiser steps of a training, volumes of anything else."""
    if stage in ("tune", "train"):
        return int(recipe["settings"]["tuning" if stage == "tune" else "training"]["steps"])
    if stage == "score":
        return units(recipe["from"]["stage"], _at(recipes, recipe["from"]), recipes)
    return len(recipe["unlabelled" if stage == "pseudo" else "test"])


def _at(recipes: Lookup, link: Mapping[str, str]) -> Mapping[str, Any]:
    found = recipes(link["key"])
    if found is None:
        raise KeyError(link["key"])
    return found


def _rate(artifact: Artifact, count: int) -> Rate:
    """From the log's moments where there are enough; what is not a step belongs to the start."""
    seconds, peak = float(artifact.manifest["seconds"]), float(artifact.manifest["peak_mib"])
    disk = sum(file["bytes"] for file in artifact.manifest["files"].values()) / 2**20
    disk /= max(count, 1) if artifact.stage in VOLUMES else 1
    moments = [event["time"] for event in read_log(artifact.folder / LOG) if event["event"] == "step"]
    gpu = artifact.manifest.get("peak_gpu_mib")
    if len(moments) < 3 or not count:
        return Rate(0.0, seconds / max(count, 1), peak, disk, gpu)
    unit = statistics.median(b - a for a, b in pairwise(moments))
    return Rate(max(0.0, seconds - unit * count), unit, peak, disk, gpu)


# ---------------------------------------------------------------------------------------------------------------------
# probes


def probe(rates: Rates, chains: Iterable[Sequence[StageTask]], data_root: Path | None) -> None:
    """Learn the rates of stages of which nothing is known by running one chain with such a stage in miniature.

    One chain for all of them where it can be: the longest first. A chain that fails teaches nothing.
    """
    waiting = sorted(chains, key=len, reverse=True)
    for chain in waiting:
        by_key = {stage.key: stage.recipe for stage in chain}
        if all(rates.cost(stage, by_key.get) for stage in chain):
            continue
        with tempfile.TemporaryDirectory(prefix="cfrbench-probe-") as folder:
            work = StageWork(Path(folder), data_root)
            try:
                for stage in miniature(chain):
                    work(stage)
            except CfrbenchError:
                continue
            rates.learn(Store(Path(folder)), probed=True)


def miniature(chain: Sequence[StageTask]) -> list[StageTask]:
    """The chain with a few steps and volumes, its links kept."""
    made: dict[str, StageTask] = {}
    for stage in chain:
        recipe = deepcopy(dict(stage.recipe))
        for name in ("unlabelled", "test"):
            if name in recipe:
                recipe[name] = recipe[name][:PROBE_CASES]
        for name in {"tune": ["tuning"], "train": ["training"]}.get(stage.stage, []):
            recipe["settings"][name]["steps"] = min(PROBE_STEPS, recipe["settings"][name]["steps"])
        for link in ("from", "guidance"):
            if link in recipe:
                recipe[link]["key"] = made[recipe[link]["key"]].key
        needs = tuple(made[key].key for key in stage.needs)
        made[stage.key] = task(stage.stage, f"probe: {stage.title}", recipe, needs)
    return list(made.values())


# ---------------------------------------------------------------------------------------------------------------------
# a list of stages


def forecast(rates: Rates, stages: Sequence[StageTask], recipes: Lookup, jobs: int) -> Forecast:
    """Time, memory and disk of ``stages`` (needs first), ``jobs`` at a time, as the local executor begins them."""
    costs = {stage.key: rates.cost(stage, recipes) for stage in stages}
    known = [cost for cost in costs.values() if cost is not None]
    side_by_side = sorted((cost.peak_mib for cost in known), reverse=True)[:jobs]
    wall = wall_seconds(stages, {key: cost.seconds if cost else 0.0 for key, cost in costs.items()}, jobs)
    return Forecast(sum(cost.seconds for cost in known), wall, sum(side_by_side), sum(cost.disk_mib for cost in known),
                    jobs, len(stages) - len(known), tuple(sorted({cost.like for cost in known})))  # fmt: skip


def ahead(
    store: Path, chains: Sequence[Sequence[StageTask]], todo: Sequence[StageTask], jobs: int, *,
    data_root: Path | None = None, probing: bool = False,
) -> Forecast:  # fmt: skip
    """`forecast` of the stages ``todo`` of ``chains`` from what ``store`` knows; ``probing`` times what it does not."""
    rates = Rates()
    if todo:
        rates.learn(Store(store))
    if probing:
        missing = {stage.key for stage in todo}
        probe(rates, [chain for chain in chains if missing & {stage.key for stage in chain}], data_root)
    recipes = {stage.key: stage.recipe for chain in chains for stage in chain}
    return forecast(rates, todo, recipes.get, jobs)


def sentence(cost: Forecast, count: int) -> str:
    """What ``count`` stages to run will take, in one line."""
    if cost.unknown == count:
        return "time and memory: not known, for no stage of this kind was computed here yet; --probe times a few steps"
    line = (f"about {duration(cost.wall_seconds)} with {cost.jobs} at a time, {cost.peak_mib / 1024:.1f} GiB at most "
            f"(learned from {', '.join(cost.sources)})")  # fmt: skip
    rest = f"; and {cost.unknown} stages of which nothing is known (--probe times a few steps)"
    return line + rest * bool(cost.unknown)


def wall_seconds(stages: Sequence[StageTask], seconds: Mapping[str, float], jobs: int) -> float:
    """When the last stage ends: whenever one of ``jobs`` is free, the first that can start of the longest chain does.

    Those are the executor's own choices (`cfrbench.agenda.Agenda`); what it spends between two stages is not counted.
    """
    agenda, now = Agenda(stages), 0.0
    busy: list[tuple[float, str, StageTask]] = []
    while True:
        while len(busy) < jobs and (stage := agenda.take()) is not None:
            heapq.heappush(busy, (now + seconds[stage.key], stage.key, stage))
        if not busy:
            return now
        now = busy[0][0]
        while busy and busy[0][0] == now:  # all that end at once are known before the next choice
            agenda.finish(heapq.heappop(busy)[2], None)

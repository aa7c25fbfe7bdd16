"""Names to objects, matrix to plan, plan to execution: what `cfrbench run` and `cfrbench.run()` do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import registry
from cfrbench.config import PRESET_WORDS, RunConfig, Settings, Triple, digest, validate
from cfrbench.contracts import Executor, StageTask
from cfrbench.errors import CfrbenchError, Skipped
from cfrbench.matrix import Repeat, cells_of, labelled_total, repeats_of, split_facts, split_words
from cfrbench.prepared.leaks import SIGNATURES, Looking, refuse_leaks, unseen
from cfrbench.recipes import Cell, Study, study_of, with_data_root
from cfrbench.results import Result as Result
from cfrbench.results import gather_cases as gather_cases
from cfrbench.results import of_record
from cfrbench.results import read_config as read_config
from cfrbench.results import recall as recall
from cfrbench.store import Store

if TYPE_CHECKING:
    from cfrbench.forecast import Rates

#: memory, and GPU memory, of a stage of which nothing is known yet: LiteMedSAM and small volumes, or SAM ViT-B at 1024
JOB_GIB = {"quick": 3.0, "paper": 12.0}


@dataclass(frozen=True)
class Plan:
    """What a request needs: its cells in table order, the stages to run in order, how many are already there."""

    study: Study
    chains: dict[Cell, list[StageTask]]  # every stage of each cell in table order; the last one is its score
    todo: tuple[StageTask, ...]
    reused: int
    name: str
    store: Path
    repeats: tuple[Repeat, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What the record of the run and its tables say about it."""
        return facts(self.study, self.repeats or repeats_of(self.study))


def run(
    config: RunConfig | None = None, *, store: str | Path = "cfrbench-store", executor: str = "local", jobs: int = 1,
    observer: object | None = None, **fields: Any,
) -> Result:  # fmt: skip
    """Run a request given as a RunConfig or as its fields: ``run(ssl=["mt"], labels=[1, 4], preset="smoke")``.

    Raises CfrbenchError for wrong use; failed cells are in ``Result.failures`` and missing from the table.
    """
    start = (config or RunConfig()).model_dump()
    request = validate(RunConfig, start | fields, "the arguments of cfrbench.run")
    return execute(plan(request, Path(store)), executor=executor, jobs=jobs, observer=observer)


def plan(config: RunConfig, store: Path, looking: Looking = unseen) -> Plan:
    """Work out cells and stages; the store says what is already done. Nothing is computed.

    Images of which no signature is known are read once, to find copies between lists; ``looking`` hears of each.
    """
    study = study_of(with_data_root(config, store))
    repeats = repeats_of(study)
    refuse_leaks(study.source, [r.split for r in repeats], study.fingerprint, store / SIGNATURES, looking)
    chains = {cell: own.chain(cell) for cell, own in cells_of(repeats).items()}
    return plan_chains(study, chains, _run_name(study.config), store, repeats)


def plan_chains(
    study: Study, chains: dict[Cell, list[StageTask]], name: str, store: Path, repeats: tuple[Repeat, ...] = ()
) -> Plan:
    """The plan of these cells, each with its chain of stages; its record will be called ``name``."""
    todo, reused = missing(chains.values(), Store(store))
    return Plan(study, chains, todo, reused, name, store, repeats)


def missing(chains: Iterable[Sequence[StageTask]], home: Store) -> tuple[tuple[StageTask, ...], int]:
    """The stages to run for all ``chains``, each once and needs first, and how many finished ones they stand on."""
    todo: dict[str, StageTask] = {}
    reused: set[str] = set()
    for chain in chains:
        _need(chain, home, todo, reused)
    return _in_order(todo), len(reused)


def _need(chain: Sequence[StageTask], home: Store, todo: dict[str, StageTask], reused: set[str]) -> None:
    """Add to ``todo`` what is missing for the last stage of ``chain``; a stage nobody misses is not looked for."""
    by_key = {task.key: task for task in chain}
    wanted = [chain[-1].key]
    while wanted:
        task = by_key[wanted.pop()]
        if task.key in todo or task.key in reused:
            continue
        if home.find_verified(task.stage, task.key):
            reused.add(task.key)
        else:
            todo[task.key] = task
            wanted += task.needs


def _in_order(todo: dict[str, StageTask]) -> tuple[StageTask, ...]:
    """Needs before what stands on them, otherwise as found."""
    done: dict[str, StageTask] = {}

    def visit(task: StageTask) -> None:
        for key in task.needs:
            if key in todo and key not in done:
                visit(todo[key])
        done.setdefault(task.key, task)

    for task in todo.values():
        visit(task)
    return tuple(done.values())


def _run_name(config: RunConfig) -> str:
    methods = "-".join(config.ssl)[:40]
    # A request that does not ask for them is named as before there were any.
    unasked = {name for name in ("folds", "fold_seed", "label_seeds") if not getattr(config, name)}
    named = config.model_dump(mode="json", exclude=unasked)
    named["set"] = {key: value for key, value in named["set"].items() if not key.startswith("executor.")}
    return f"{config.dataset}-{methods}-{digest(named)[:8]}".replace(":", ".").replace("/", ".")


def execute(
    planned: Plan,
    *,
    executor: str = "local",
    jobs: int = 1,
    observer: object | None = None,
    observers: tuple[str, ...] = (),
) -> Result:
    """Run what is missing, write the run's record, gather the scores.

    ConfigError or PluginError, before anything is written, for a device that is not here, a package that is missing, or
    a name nobody knows.
    """
    began = time.monotonic()
    runner = _runner(planned, executor, jobs, observers)
    _record(planned, runner, {}, None)  # from now on `clean` leaves alone what this run has finished
    Store(planned.store).cancel_mark(planned.name).unlink(missing_ok=True)
    if observer is not None:
        registry.WATCHERS.register(observer)
    try:
        registry.WATCHERS.hook.run_planned(plan=planned.todo, reused=planned.reused)
        failures = _run_stages(planned, runner, observers)
        record = _record(planned, runner, failures, time.monotonic() - began)
        registry.WATCHERS.hook.run_finished(name=planned.name, seconds=record["seconds"])
    finally:
        if observer is not None:
            registry.WATCHERS.unregister(observer)
    return of_record(planned.name, record, Store(planned.store))


def _runner(planned: Plan, executor: str, jobs: int, observers: tuple[str, ...]) -> Executor:
    """The executor with its options; find out now what every stage would find out."""
    cls: type[Executor] = registry.load("executor", executor)
    for name in observers:
        registry.find("observer", name)
    if planned.todo and cls.name == "local":  # another one may run stages on another machine
        from cfrbench.compute import find_device

        find_device(planned.study.settings.compute.device)
    options = planned.study.settings.options.get(f"executor.{cls.name}", {}) | ({"jobs": jobs} if jobs != 1 else {})
    return cls(validate(cls.Config, options, f"the options of executor.{cls.name}"), planned.store.absolute())


def default_jobs(planned: Plan, executor: str = "local", rates: Rates | None = None) -> int:
    """Stages to run side by side: as many as GPUs, cores and memory have room for, for those of one GPU share it well.

    What each takes is told by ``rates``, or else by the store. One for ``smoke``, whose stages are shorter than the
    start of a process. 1 leaves the choice to any other executor: what this machine has room for says nothing of a
    cluster.
    """
    preset = planned.study.config.preset
    if executor != "local" or preset == "smoke" or len(planned.todo) < 2:
        return 1
    from cfrbench.forecast import Rates
    from cfrbench.sharing import jobs_here

    if rates is None:
        rates = Rates()
        rates.learn(Store(planned.store))
    recipes = {task.key: task.recipe for chain in planned.chains.values() for task in chain}
    compute = planned.study.settings.compute
    return jobs_here(planned.todo, recipes.get, rates, device=compute.device, threads=compute.threads,
                     unknown_gib=JOB_GIB[preset])  # fmt: skip


def _run_stages(planned: Plan, runner: Executor, observers: tuple[str, ...]) -> dict[str, CfrbenchError]:
    if not planned.todo:
        return {}
    from cfrbench.stages import StageWork  # scipy and the whole pipeline, which a finished run need not load

    seconds = planned.study.settings.training.checkpoint_seconds
    content = digest(dict(planned.study.fingerprint))
    root = planned.study.config.data_root
    return runner.run(
        planned.todo, StageWork(planned.store.absolute(), root, seconds, observers, content, planned.name)
    )


def _record(
    planned: Plan, runner: Executor, failures: dict[str, CfrbenchError], seconds: float | None
) -> dict[str, Any]:
    """Write what was asked and which keys answer it; ``seconds`` is None as long as the run goes on."""
    study = planned.study
    words = {task.key: task.title for task in planned.todo}
    config = study.config
    record = {
        "config": config.model_dump(mode="json"),
        "names": {"dataset": config.dataset, "concat": config.concat, "model": config.model_name, "tune": config.tune,
                  "net": config.net},
        "cells": [
            asdict(cell) | {"score": chain[-1].key, "keys": [task.key for task in chain]}
            for cell, chain in planned.chains.items()
        ],
        # What was only skipped has its cause in this list too.
        "failures": {words[key]: str(error) for key, error in failures.items() if not isinstance(error, Skipped)},
        "facts": planned.facts(),
        "executor": {"name": runner.name, "options": runner.config.model_dump(mode="json")},
        "seconds": seconds,
        "trained": len(planned.todo) - len(failures),
        "reused": planned.reused,
    }  # fmt: skip
    Store(planned.store).write_run(planned.name, record)
    return record


def facts(study: Study, repeats: Sequence[Repeat]) -> dict[str, Any]:
    """What a table must say about itself: data set, split, preset, protocol, notes of the weights."""
    config, settings = study.config, study.settings
    model = registry.load("model", config.model_name)
    return {
        "dataset": config.dataset,
        "title": study.source.title,
        "synthetic": study.source.synthetic,
        "split": split_words(study, repeats),
        "splits": split_facts(repeats),
        "train_cases": len(repeats[0].split.train),
        "labelled_cases": labelled_total(repeats),
        "test_cases": len(study.split.test)
        if not config.folds
        else sum(len(split.test) for split in {repeat.fold: repeat.split for repeat in repeats}.values()),
        "classes": list(study.source.class_names),
        "preset": config.preset,
        "preset_words": PRESET_WORDS[config.preset],
        "model": config.model_name,
        "model_title": model.title,
        "model_note": model.note,
        "tune": config.tune,
        "unit": settings.scoring.unit,
        "protocol": "; ".join(protocol(settings).values()),
    }


def protocol(settings: Settings, crop: Triple | None = None) -> dict[str, str]:
    """What makes the numbers of a table comparable: by subject, in words; ``crop`` is the training patch by default."""
    training, scoring, inference = settings.training, settings.scoring, settings.inference
    grid = "" if settings.grid.downsample == 1 else f" on a grid {settings.grid.downsample} times coarser"
    return {
        "crops": f"crops {'x'.join(map(str, crop or training.patch))}{grid}",
        "training": f"{training.steps} steps, batch {training.labelled_batch}+{training.unlabelled_batch}",
        "checkpoint": "last checkpoint, student network",
        "tuning": f"fine-tuning {settings.tuning.steps} steps",
        "pseudo": f"pseudo-labels per {'volume' if settings.pseudo.mode == 'volume' else 'crop (online)'}",
        "guidance": f"guidance weight {training.guidance_weight:g} ({training.guidance_schedule})",
        "windows": f"window strides {inference.stride_xy}/{inference.stride_z}",
        "scoring": f"scored on the original grid, distances in {scoring.unit}",
        "empty": f"empty masks: {scoring.empty}",
        "postprocess": f"post-processing: {scoring.postprocess}",
        "precision": settings.compute.precision,
    }


def referenced(home: Store) -> set[str]:
    """Keys of every stage that the runs of a store stand on, finished or not."""
    return {key for record in home.runs() for cell in record["cells"] for key in cell["keys"]}

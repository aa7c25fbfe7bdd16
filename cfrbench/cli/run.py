"""`cfrbench run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfrbench.cli import app
from cfrbench.cli.common import (
    DEFAULT_STORE,
    ExecutorOption,
    StoreOption,
    parse_labels,
    parse_names,
    parse_seeds,
    parse_set,
)
from cfrbench.config import PresetName, RunConfig, validate

if TYPE_CHECKING:
    from cfrbench.results import Result
    from cfrbench.sweep import Plan

EXAMPLES = """
Examples:

    cfrbench run --ssl mt,acmt --labels 1,2,4,16

    cfrbench run --dataset la --data-root DIR --ssl mt --labels 1 --seeds 3

    cfrbench run --ssl mt --labels 1 --label-seeds 5

    cfrbench run --dataset mine --ssl mt --labels 4 --folds 5

    cfrbench run --ssl mt --labels 1 --set training.steps=1800 --dry-run

    cfrbench run --ssl mt --labels 1 --executor slurm --set executor.slurm.partition=gpu
"""


@app.command(epilog=EXAMPLES)
def run(
    ssl: Annotated[str | None, typer.Option(help="SSL methods, comma-separated.  [default: mt]")] = None,
    labels: Annotated[str | None, typer.Option(help="Labelled cases: N,..., scarce, moderate.  [default: 1]")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set.  [default: phantom]")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    concat: Annotated[str | None, typer.Option(help="Concatenation strategy.  [default: grid]")] = None,
    tune: Annotated[str | None, typer.Option(help="Fine-tuner.  [default: lora]")] = None,
    model: Annotated[str | None, typer.Option(help="Foundation model.  [default: the preset's]")] = None,
    net: Annotated[str | None, typer.Option(help="Segmenter.  [default: the data set's, mostly vnet]")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds: 0 .. N-1.  [default: 1]")] = None,
    seed_list: Annotated[str | None, typer.Option(help="These seeds, comma-separated.")] = None,
    label_seeds: Annotated[int | None, typer.Option(min=1, help="Draw labelled cases with seeds 0 .. N-1.")] = None,
    folds: Annotated[int | None, typer.Option(help="Cross-validate in N folds; 0: the official split.")] = None,
    fold_seed: Annotated[int | None, typer.Option(help="Of the folds.  [default: 0]")] = None,
    preset: Annotated[PresetName | None, typer.Option(help="smoke, quick or paper.  [default: quick]")] = None,
    config: Annotated[str | None, typer.Option(help="A TOML file or a RUN to start from; options win.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. training.steps=1800.")] = None,
    store: StoreOption = DEFAULT_STORE,
    pseudo: Annotated[str | None, typer.Option(help="volume (once, the default) or online (each crop).")] = None,
    guidance_weight: Annotated[float | None, typer.Option(help="Weight of the CFR term.  [default: 1]")] = None,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Only CFR rows.")] = False,
    no_bounds: Annotated[bool, typer.Option("--no-bounds", help="No supervised bounds.")] = False,
    scoring: Annotated[str | None, typer.Option(help="native, or medpy (extra `medpy`).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; part of what makes numbers equal.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, fp32-fast, bf16, fp16.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Stages at a time.  [default: what fits here]")] = None,
    max_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB for all stages at a time.")] = None,
    executor: ExecutorOption = "local",
    log: Annotated[str | None, typer.Option(help="More observers, comma-separated, e.g. tensorboard.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, run nothing.")] = False,
    probing: Annotated[bool, typer.Option("--probe", help="--dry-run: time a few steps of the unknown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Train every method with and without CFR guidance at every budget, and print the table of gains."""
    from cfrbench import results
    from cfrbench.cli import progress

    request = _request(results.read_config(config, store) if config else RunConfig(), ssl=parse_names(ssl),
                       labels=parse_labels(labels), dataset=dataset, concat=concat, tune=tune, model=model, net=net,
                       preset=preset, seeds=parse_seeds(seeds, seed_list), folds=folds, fold_seed=fold_seed,
                       label_seeds=parse_seeds(label_seeds, None), baseline=False if no_baseline else None,
                       bounds=False if no_bounds else None, data_root=data_root and data_root.expanduser().absolute(),
                       set={**parse_set(set_), "pseudo.mode": pseudo, "training.guidance_weight": guidance_weight,
                            "scoring.backend": scoring, "compute.device": device, "compute.threads": threads,
                            "compute.precision": precision})  # fmt: skip
    if dry_run:
        progress.show_plan(_plan(request, store), as_json, jobs=jobs, probing=probing)
    else:
        _answer(request, store, executor, jobs, max_memory, parse_names(log) or (), as_json)


def _answer(
    request: RunConfig, store: Path, executor: str, jobs: int | None, max_memory: float | None,
    observers: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Show the result of a request: of the run that has answered it already, or else of planning and running it."""
    from cfrbench import finished, registry

    registry.find("executor", executor)
    state = finished.state_of(request, store)
    result = None if observers else finished.recall(state, store)
    if result is not None:
        _show_again(result, as_json)
        return
    planned = _plan(request, store)
    side_by_side = _side_by_side(planned, executor, jobs, max_memory)
    result = _execute(planned, executor, side_by_side, observers, as_json)
    if not result.failures:
        finished.remember(result.name, state, store)
    _show(result, as_json)
    if result.failures:
        raise typer.Exit(1)


def _plan(request: RunConfig, store: Path) -> Plan:
    """The plan, a bar shown while images are read that nobody has looked at."""
    from cfrbench import sweep
    from cfrbench.cli import progress

    with progress.looking() as look:
        return sweep.plan(request, store, look)


def _side_by_side(planned: Plan, executor: str, jobs: int | None, max_memory: float | None) -> int:
    """Stages at a time: as asked or as this machine has room for, fewer if they need more than ``max_memory`` GiB."""
    from cfrbench import sweep

    wanted = jobs or sweep.default_jobs(planned, executor)
    if max_memory is None:
        return wanted
    from cfrbench.memory_budget import jobs_within

    return jobs_within(planned, wanted, max_memory)


def _execute(planned: Plan, executor: str, jobs: int, observers: tuple[str, ...], as_json: bool) -> Result:
    from cfrbench import sweep
    from cfrbench.cli import progress

    if not as_json:
        progress.header(planned.facts())
    with progress.watch(quiet=as_json) as observer:
        return sweep.execute(planned, executor=executor, jobs=jobs, observer=observer, observers=observers)


def _show_again(result: Result, as_json: bool) -> None:
    from cfrbench.cli import progress

    if not as_json:
        progress.header(result.facts)
        typer.echo(f"0 stages to run, {result.reused} reused", err=True)
    _show(result, as_json)


def _show(result: Result, as_json: bool) -> None:
    from cfrbench.cli import progress

    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))
    else:
        progress.show_result(result)


def _request(start: RunConfig, **asked: Any) -> RunConfig:
    """``start`` with everything that was asked for; None means not asked."""
    values = start.model_dump() | {k: v for k, v in asked.items() if v is not None}
    values["set"] = {**start.set, **{k: v for k, v in asked["set"].items() if v is not None}}
    return validate(RunConfig, values, "the command line")

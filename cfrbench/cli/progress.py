"""What a person sees while stages run: nested bars with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cfrbench.hookspecs import LOST, hookimpl

if TYPE_CHECKING:
    from cfrbench.contracts import StageTask
    from cfrbench.results import Result
    from cfrbench.sweep import Plan


class Remarks:
    """What is said once however many stages meet it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said_padding = False

    def remark(self, task: StageTask, values: Mapping[str, Any]) -> None:
        """Say of the first stage in which volumes were padded that they were."""
        if values.get("padded") and not self.said_padding:
            self.said_padding = True
            self.console.print(f"  {task.title}: {values['padded']} volumes are smaller than the crop and were padded "
                               "with zeros, as the field does", markup=False)  # fmt: skip


class LiveBars(Remarks):
    """A bar for the stages of the run, and one for the steps of each stage at work, with loss or Dice."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self.run = self.bars.add_task("stages", total=None, note="")
        self.stages: dict[str, TaskID] = {}
        self.lost = _Lost()

    @hookimpl
    def run_planned(self, plan: Sequence[StageTask], reused: int) -> None:
        """Set the length of the outer bar."""
        self.bars.update(self.run, total=len(plan), note=f"{reused} reused")

    @hookimpl
    def stage_waiting(self, task: StageTask) -> None:
        """Say why nothing moves."""
        self.bars.console.print(f"  {task.title}: another process works on it, waiting")

    @hookimpl
    def stage_started(self, task: StageTask, folder: str, total_steps: int) -> None:
        """Begin a bar."""
        self.stages[task.key] = self.bars.add_task(task.title, total=total_steps, note="")

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        """Advance the stage's bar; the note shows what the step says."""
        self.bars.update(self.stages[task.key], completed=step, note=_note(values))
        for warning in self.lost.warnings(task, step, values):
            self.bars.console.print(f"  {warning}", style="yellow", markup=False)

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        """Take the stage's bar away and advance the run's."""
        if task.key in self.stages:  # not where another process did the work
            self.bars.remove_task(self.stages.pop(task.key))
        self.bars.advance(self.run)
        self.remark(task, values)
        if task.stage == "score":
            self.bars.console.print(f"  {task.title.removeprefix('score ')}: Dice {values.get('dice', 0.0):.2f}")


class PlainLines(Remarks):
    """One line per stage and one every ten seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.total = self.started = 0
        self.paces: dict[str, Pace] = {}
        self.lost = _Lost()

    @hookimpl
    def run_planned(self, plan: Sequence[StageTask], reused: int) -> None:
        """Say how much there is to do."""
        self.total = len(plan)
        self.console.print(f"{len(plan)} stages to run, {reused} reused")

    @hookimpl
    def stage_waiting(self, task: StageTask) -> None:
        """Say why nothing moves."""
        self.console.print(f"{task.title}: another process works on it, waiting", markup=False)

    @hookimpl
    def stage_started(self, task: StageTask, folder: str, total_steps: int) -> None:
        """Name the stage."""
        self.started += 1
        self.paces[task.key] = Pace(total_steps, time.monotonic())
        self.console.print(f"[{self.started}/{self.total}] {task.title}", markup=False)

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        """A line now and then, with the time this stage still needs; a warning at once."""
        for warning in self.lost.warnings(task, step, values):
            self.console.print(f"    {warning}", markup=False)
        pace = self.paces[task.key]
        left = pace.left_seconds(step, time.monotonic())
        if left is not None:
            self.console.print(f"    {self._who(task)}{step}/{pace.length}  {_note(values)}  ETA {left:.0f} s",
                               markup=False)  # fmt: skip

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        """Say how long it took; a score says its Dice."""
        dice = f", Dice {values['dice']:.2f}" if task.stage == "score" else ""
        self.console.print(f"    {self._who(task)}done in {seconds:.1f} s{dice}", markup=False)
        self.remark(task, values)
        self.paces.pop(task.key, None)

    def _who(self, task: StageTask) -> str:
        """The stage's title, where several are at work."""
        return f"{task.title}: " if len(self.paces) > 1 else ""


class _Lost:
    """Turns the classes that a step calls lost into warnings, each once until it has been found again."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {}

    def warnings(self, task: StageTask, step: int, values: Mapping[str, float]) -> list[str]:
        """What to print of this step."""
        names = {name for name in values if name.startswith(LOST)}
        new = sorted(names - self._known.get(task.key, set()))
        self._known[task.key] = names
        return [f"warning: {task.title}: class '{name.removeprefix(LOST)}' has collapsed, at step {step} none of its "
                "voxels is found in labelled crops" for name in new]  # fmt: skip


class Pace:
    """When a stage may speak again, and how long it still takes."""

    def __init__(self, length: int, now: float) -> None:
        self.length = length
        self.first_step = 0
        self.began = self.last = now

    def left_seconds(self, step: int, now: float) -> float | None:
        """What is left of the stage at its pace since it began or was resumed; None within ten seconds of the last."""
        self.first_step = self.first_step or step
        if now - self.last < 10 or step == self.first_step:
            return None
        self.last = now
        return (self.length - step) * (now - self.began) / (step - self.first_step + 1)


def _note(values: Mapping[str, float]) -> str:
    for name in ("dice", "loss"):
        if name in values:
            return f"{name} {values[name]:.3f}"
    return ""


@contextmanager
def watch(*, quiet: bool) -> Iterator[object | None]:
    """An observer for this terminal; everything goes to standard error, so that results alone are on output."""
    console = Console(stderr=True)
    if quiet:
        yield PlainLines(console) if not console.is_terminal else None
    elif console.is_terminal:
        display = LiveBars(console)
        with display.bars:
            yield display
    else:
        yield PlainLines(console)


@contextmanager
def looking() -> Iterator[Callable[[int, int], None]]:
    """A bar, on a terminal, while images are read that nobody has looked at; it goes when all are known."""
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bars:
        tasks: list[TaskID] = []

        def show(done: int, total: int) -> None:
            tasks[:] = tasks or [bars.add_task("looking for copies of test images", total=total)]
            bars.update(tasks[0], completed=done)

        yield show


def show_plan(plan: Plan, as_json: bool, *, jobs: int | None = None, probing: bool = False) -> None:
    """Print cells and stages of a dry run, and what they will take; ``probing`` times kinds that the store lacks."""
    from cfrbench import forecast, sweep

    cost = forecast.ahead(plan.store, list(plan.chains.values()), plan.todo, jobs or sweep.default_jobs(plan),
                          data_root=plan.study.config.data_root, probing=probing)  # fmt: skip
    if as_json:
        stages = [{"stage": t.stage, "key": t.key, "title": t.title} for t in plan.todo]
        typer.echo(json.dumps({"cells": len(plan.chains), "todo": stages, "reused": plan.reused,
                               "forecast": asdict(cost)}))  # fmt: skip
        return
    header(plan.facts())
    typer.echo(f"{len(plan.chains)} cells, {len(plan.todo)} stages to run, {plan.reused} reused")
    for task in plan.todo:
        typer.echo(f"  {task.stage:<8} {task.key[:12]}  {task.title}")
    if plan.todo:
        typer.echo(forecast.sentence(cost, len(plan.todo)))


def header(about: Mapping[str, Any]) -> None:
    """One line each for preset, data and split, from the facts of a run; to standard error."""
    what = f"{about['title']} (synthetic)" if about["synthetic"] else about["title"]
    counts = f"{about['train_cases']} training, {about['test_cases']} test cases"
    typer.echo(f"preset {about['preset']}: {about['preset_words']}", err=True)
    typer.echo(f"data: {what}, {counts}. {about['split']}".rstrip(), err=True)
    typer.echo(f"protocol: {about['protocol']}", err=True)


def show_result(result: Result) -> None:
    """Print the table, failures, and where the record is."""
    from cfrbench.report import ablations, writers

    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in [] if result.cases.empty else ablations.all_tables(result.cases, result.facts):
        console.print(writers.to_rich(table))
    for title, reason in result.failures.items():
        typer.secho(f"failed: {title}: {reason}", err=True, fg=typer.colors.RED)
    typer.echo(f"{result.trained} stages run, {result.reused} reused, {result.seconds:.1f} s. Run: {result.name}")

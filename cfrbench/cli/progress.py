"""What a person sees while stages run: nested bars with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cfrbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from cfrbench.contracts import StageTask
    from cfrbench.sweep import Plan, Result


class LiveBars:
    """Two bars: stages of the run, steps of the stage, with loss or Dice."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self.run = self.bars.add_task("stages", total=None, note="")
        self.stage = self.bars.add_task("", total=None, note="", visible=False)

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
        """Begin the inner bar anew."""
        self.bars.reset(self.stage, total=total_steps, description=task.title, visible=True, note="")

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        """Advance the inner bar; the note shows what the step says."""
        self.bars.update(self.stage, completed=step, note=_note(values))

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        """Advance the outer bar."""
        self.bars.advance(self.run)
        if task.stage == "score":
            self.bars.console.print(f"  {task.title.removeprefix('score ')}: Dice {values.get('dice', 0.0):.2f}")


class PlainLines:
    """One line per stage and one every ten seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total, self.done, self.length = 0, 0, 0
        self.began = self.last = time.monotonic()
        self.first_step = 0

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
        self.length, self.first_step = total_steps, 0
        self.began = self.last = time.monotonic()
        self.console.print(f"[{self.done + 1}/{self.total}] {task.title}", markup=False)

    @hookimpl
    def step_done(self, task: StageTask, step: int, values: Mapping[str, float]) -> None:
        """A line now and then, with the time this stage still needs."""
        now = time.monotonic()
        self.first_step = self.first_step or step
        if now - self.last < 10 or step == self.first_step:
            return
        self.last = now
        pace = (now - self.began) / (step - self.first_step + 1)
        left = (self.length - step) * pace
        self.console.print(f"    {step}/{self.length}  {_note(values)}  ETA {left:.0f} s", markup=False)

    @hookimpl
    def stage_finished(self, task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
        """Count the stage; a score says its Dice."""
        self.done += 1
        dice = f", Dice {values['dice']:.2f}" if task.stage == "score" else ""
        self.console.print(f"    done in {seconds:.1f} s{dice}")


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


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print cells and stages of a dry run."""
    if as_json:
        stages = [{"stage": t.stage, "key": t.key, "title": t.title} for t in plan.todo]
        typer.echo(json.dumps({"cells": len(plan.chains), "todo": stages, "reused": plan.reused}))
        return
    header(plan)
    typer.echo(f"{len(plan.chains)} cells, {len(plan.todo)} stages to run, {plan.reused} reused")
    for task in plan.todo:
        typer.echo(f"  {task.stage:<8} {task.key[:12]}  {task.title}")


def header(plan: Plan) -> None:
    """One line each for preset, data and split; to standard error."""
    from cfrbench.sweep import facts

    about = facts(plan.study)
    what = f"{about['title']} (synthetic)" if about["synthetic"] else about["title"]
    counts = f"{about['train_cases']} training, {about['test_cases']} test cases"
    typer.echo(f"preset {about['preset']}: {about['preset_words']}", err=True)
    typer.echo(f"data: {what}, {counts}. {about['split']}", err=True)
    typer.echo(f"protocol: {about['protocol']}", err=True)


def show_result(result: Result) -> None:
    """Print the table, failures, and where the record is."""
    from cfrbench.report import tables

    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables.all_tables(result.cases, result.facts):
        console.print(tables.to_rich(table))
    for title, reason in result.failures.items():
        typer.secho(f"failed: {title}: {reason}", err=True, fg=typer.colors.RED)
    typer.echo(f"{result.trained} stages run, {result.reused} reused, {result.seconds:.1f} s. Run: {result.name}")

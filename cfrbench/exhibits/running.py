"""Runs what an exhibit still needs and gathers the scores; what is finished is never computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cfrbench import sweep
from cfrbench.artifact import Artifact
from cfrbench.exhibits.planning import Exhibit, Part
from cfrbench.recipes import Cell
from cfrbench.store import Store


@dataclass(frozen=True)
class Finished:
    """A part that has a plan, with the scores of its finished cells (they may be few, or none)."""

    part: Part
    plan: sweep.Plan
    result: sweep.Result

    @property
    def home(self) -> Store:
        """The store of everything."""
        return Store(self.plan.store)

    def cells(self, **wanted: Any) -> list[Cell]:
        """The cells with these attributes, in the order of the table."""
        return [cell for cell in self.plan.chains if all(getattr(cell, k) == v for k, v in wanted.items())]

    def artifact(self, stage: str, cell: Cell) -> Artifact | None:
        """The finished stage of this name in a cell's chain."""
        return self.home.find_any(stage, [task.key for task in self.plan.chains[cell] if task.stage == stage])

    @property
    def first_seed(self) -> int:
        """The seed that pictures show."""
        return self.part.config.seeds[0]


def finish(
    exhibit: Exhibit, *, compute: bool = True, executor: str = "local", jobs: int | None = None,
    observer: object | None = None,
) -> list[Finished]:  # fmt: skip
    """Run the missing stages of every part, one part after the other, and gather; without ``compute`` only gather.

    A part is planned anew if an earlier one may have finished stages of it.
    """
    found = []
    for part in exhibit.parts:
        if part.plan is None:
            continue
        todo, reused = sweep.missing(part.plan.chains.values(), Store(part.plan.store))
        plan = replace(part.plan, todo=todo if compute else (), reused=reused)
        side_by_side = jobs or sweep.default_jobs(plan, executor)
        result = sweep.execute(plan, executor=executor, jobs=side_by_side, observer=observer)
        found.append(Finished(part, plan, result))
    return found


def failures(finished: Sequence[Finished]) -> dict[str, str]:
    """What failed in any part, by the title of the stage."""
    return {title: reason for one in finished for title, reason in one.result.failures.items()}

"""What making exhibits would cost: cells, what is finished of them, time and memory on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfrbench import sweep
from cfrbench.contracts import StageTask
from cfrbench.exhibits.planning import Exhibit
from cfrbench.forecast import Forecast, Rates, forecast, probe
from cfrbench.store import Store


@dataclass(frozen=True)
class Outlook:
    """One exhibit: its cells with the stages each still needs, and what its own stages cost.

    A stage that an exhibit before it needs too is that one's: here it counts as ``shared``.
    """

    name: str
    cells: dict[str, int]
    todo: tuple[StageTask, ...]
    shared: int
    cost: Forecast

    @property
    def finished(self) -> int:
        """Cells with nothing left to compute."""
        return sum(count == 0 for count in self.cells.values())


def outlooks(
    exhibits: Sequence[Exhibit], store: Path, *, jobs: int | None = None, probing: bool = True
) -> list[Outlook]:
    """An outlook for each exhibit, in the order in which they would be made."""
    rates = Rates()
    rates.learn(Store(store))
    taken: set[str] = set()
    found = []
    for exhibit in exhibits:
        missing = {task.key: task for plan in exhibit.planned for task in plan.todo}
        todo = tuple(task for task in missing.values() if task.key not in taken)
        recipes = {t.key: t.recipe for plan in exhibit.planned for chain in plan.chains.values() for t in chain}
        if probing:
            for plan in exhibit.planned:
                unknown = [c for c in plan.chains.values() if any(t.key in missing and t.key not in taken for t in c)]
                probe(rates, unknown, plan.study.config.data_root)
        side_by_side = jobs or max(sweep.default_jobs(plan, rates=rates) for plan in exhibit.planned)
        cells = {f"{cell.words}, {plan.study.config.dataset}": sum(t.key in missing for t in chain)
                 for plan in exhibit.planned for cell, chain in plan.chains.items()}  # fmt: skip
        found.append(Outlook(exhibit.name, cells, todo, len(missing) - len(todo),
                             forecast(rates, todo, recipes.get, side_by_side)))  # fmt: skip
        taken |= set(missing)
    return found

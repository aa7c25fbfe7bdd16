"""`cfrbench run --max-memory`: how many stages at a time stay below so much memory, and what cannot be run in it.

What a stage needs is learned from finished stages of its kind (`cfrbench.forecast`); of an unknown one nothing is known
but a guess, so it is never refused.
"""

from __future__ import annotations

from cfrbench.config import Settings
from cfrbench.contracts import StageTask
from cfrbench.errors import UsageError
from cfrbench.forecast import Cost, Rates
from cfrbench.headroom import labelling_advice, prediction_advice, training_advice, tuning_advice
from cfrbench.sharing import MIB, side_by_side
from cfrbench.store import Store
from cfrbench.sweep import JOB_GIB, Plan


def jobs_within(planned: Plan, jobs: int, gib: float) -> int:
    """At most ``jobs``: the number of stages that may run at once, whichever they are; at least 1.

    UsageError, before anything runs, for a stage whose kind is known to need more than ``gib`` alone.
    """
    rates = Rates()
    rates.learn(Store(planned.store))
    recipes = {stage.key: stage.recipe for chain in planned.chains.values() for stage in chain}
    costs = [(stage, rates.cost(stage, recipes.get)) for stage in planned.todo]
    for stage, cost in costs:
        if cost is not None and cost.peak_mib > MIB * gib:
            raise UsageError(_refusal(planned, stage, cost, gib))
    guess_mib = MIB * min(gib, JOB_GIB.get(planned.study.config.preset, 1.0))
    needs_mib = [cost.peak_mib if cost else guess_mib for _, cost in costs]
    return min(jobs, side_by_side(needs_mib, MIB * gib, margin=0.0))


def _refusal(planned: Plan, stage: StageTask, cost: Cost, gib: float) -> str:
    study = planned.study
    options = study.make("model", study.config.model_name).config
    ways = advice(stage.stage, study.settings, study.config.model_name, options)
    return (f"The stage '{stage.title}' needs {cost.peak_mib / MIB:.1f} GiB (learned from {cost.like}), more than "
            f"--max-memory {gib:g}. {ways}")  # fmt: skip


def advice(stage: str, settings: Settings, model: str, options: object) -> str:
    """What lowers the memory of a stage of this kind; ``options`` are those of the foundation model."""
    if stage == "tune":
        return tuning_advice(settings, model, options)
    if stage == "pseudo":
        return labelling_advice(settings, model, options)
    return training_advice(settings) if stage == "train" else prediction_advice(settings)

"""From a recipe to plans: the data it will really run on, budgets that exist there, what is missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfrbench import ablation, matrix, registry, sweep
from cfrbench.ablation import Ablation, AblationPlan
from cfrbench.config import PresetName, RunConfig, digest, validate
from cfrbench.contracts import StageTask
from cfrbench.errors import CfrbenchError, UsageError
from cfrbench.exhibits.recipe import Experiment, Recipe, load
from cfrbench.exhibits.recipe import names as recipe_names
from cfrbench.recipes import Cell, Study, study_of, task, with_data_root

#: in place of an SSL method: the fine-tuned model itself, scored on the test cases
FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Overrides:
    """What is laid over a recipe. In both mappings the key "" stands for every data set that is not named."""

    datasets: Mapping[str, str] = field(default_factory=dict)  # the recipe's data set -> the one to use
    data_roots: Mapping[str, Path] = field(default_factory=dict)  # the data set that is used -> its folder
    preset: PresetName | None = None
    labels: tuple[int | str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    set: Mapping[str, Any] = field(default_factory=dict)

    def dataset(self, name: str) -> str:
        """The data set used in place of ``name``."""
        return self.datasets.get(name, self.datasets.get("", name))

    def data_root(self, name: str) -> Path | None:
        """The folder of a data set that is used."""
        return self.data_roots.get(name, self.data_roots.get(""))


@dataclass(frozen=True)
class Row:
    """One row that a table should have; ``reason`` says why its cell will not be computed, "" that it is planned."""

    ssl: str
    title: str
    variant: str  # as in frames.VARIANTS; an ablation's rows are known by their title alone
    labels: int | str
    unlabelled: int | None
    reason: str = ""

    @property
    def words(self) -> str:
        """``MT + CFR (1)``."""
        return f"{self.title}{' + CFR' * (self.variant == 'cfr')} ({self.labels})"


@dataclass(frozen=True)
class Part:
    """One experiment, ready to run; without a plan if it cannot be run, then ``reason`` says why."""

    experiment: Experiment
    config: RunConfig
    plan: sweep.Plan | None = None
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    budgets: tuple[int | None, ...] = ()  # labelled cases, in the place of each of the labels; None: no such budget

    @property
    def missing(self) -> list[str]:
        """Rows that will not be computed, those of one reason together."""
        found = []
        for reason in dict.fromkeys(row.reason for row in self.rows if row.reason):
            names = dict.fromkeys(row.words for row in self.rows if row.reason == reason)
            found.append(f"{', '.join(names)}. {reason}")
        return found


@dataclass(frozen=True)
class Exhibit:
    """A recipe with everything planned; at least one part has a plan."""

    name: str
    recipe: Recipe
    parts: tuple[Part, ...]

    @property
    def planned(self) -> list[sweep.Plan]:
        """The plans, in the order of the experiments."""
        return [part.plan for part in self.parts if part.plan is not None]

    @property
    def missing(self) -> list[str]:
        """What will not be computed, one sentence each."""
        whole = [f"{part.config.dataset}. {part.reason}" for part in self.parts if part.reason]
        return list(dict.fromkeys([*whole, *(words for part in self.parts if part.plan for words in part.missing)]))


def prepare(name: str, recipe: Recipe, asked: Overrides, store: Path) -> Exhibit:
    """Plan every experiment of a recipe; UsageError if none of them can be run. Nothing is computed."""
    parts = tuple(_part(name, recipe, experiment, asked, store) for experiment in _distinct(recipe, asked))
    if all(part.plan is None for part in parts):
        reasons = " ".join(dict.fromkeys(part.reason for part in parts))
        raise UsageError(f"{recipe.title} cannot be made here. {reasons} `--dataset phantom` stands in for any data.")
    return Exhibit(name, recipe, parts)


def prepare_all(names: Sequence[str], asked: Overrides, store: Path) -> tuple[list[Exhibit], dict[str, str]]:
    """Plan exhibits by name, ``all`` for every recipe there is; and the reason for each that cannot be made.

    UsageError for an unknown name, and if none of those asked for can be made.
    """
    wanted = list(dict.fromkeys(n for name in names for n in (recipe_names() if name == "all" else [name])))
    found, refused = [], {}
    for name in wanted:
        try:
            found.append(prepare(name, load(name), asked, store))
        except CfrbenchError as error:
            if len(wanted) == 1 or name.rpartition(":")[2] not in recipe_names():
                raise
            refused[name] = str(error)
    if not found:
        raise UsageError(" ".join(dict.fromkeys(refused.values())))
    return found, refused


def _distinct(recipe: Recipe, asked: Overrides) -> list[Experiment]:
    """The experiments on the data sets that are used, each once: two data sets may have become one."""
    found: dict[str, Experiment] = {}
    for experiment in recipe.experiment:
        used = experiment.model_copy(update={"dataset": asked.dataset(experiment.dataset)})
        found.setdefault(digest(used.model_copy(update={"paper_labels": ()})), used)
    return list(found.values())


def _part(name: str, recipe: Recipe, experiment: Experiment, asked: Overrides, store: Path) -> Part:
    values = {"dataset": experiment.dataset, "data_root": asked.data_root(experiment.dataset), "net": experiment.net,
              "seeds": asked.seeds or recipe.seeds, "preset": asked.preset or recipe.preset,
              "labels": asked.labels or experiment.labels, "set": {**experiment.set, **asked.set}}  # fmt: skip
    config = validate(RunConfig, values, f"the recipe {name}")
    if experiment.kind != "sweep" and len(config.labels) > 1:
        raise UsageError(f"{recipe.title} compares under one budget, so --labels takes one number there.")
    make = _sweep if experiment.kind == "sweep" else _ablation
    try:
        config = with_data_root(config, store)
        return make(name, experiment, study_of(config), asked.labels is None, store)
    except CfrbenchError as error:
        return Part(experiment, config, reason=str(error))


def _run_name(name: str, kind: str, config: RunConfig, experiment: Experiment) -> str:
    """``table-3-la-1a2b3c4d``, and the kind where it is an ablation."""
    words = [name, *([kind] if kind != "sweep" else []), config.dataset, digest([config, experiment])[:8]]
    return "-".join(words).replace(":", ".").replace("/", ".")


# ---------------------------------------------------------------------------------------------------------------------
# sweeps


@dataclass(frozen=True)
class Budget:
    """A number of labelled cases; ``count`` is None where the data have no such budget, then ``reason`` says why."""

    label: int | str
    count: int | None
    reason: str = ""


def _sweep(name: str, experiment: Experiment, study: Study, own_labels: bool, store: Path) -> Part:
    budgets, notes = _budgets(experiment, study, own_labels)
    rows, cells = [], []
    for seed in dict.fromkeys(study.config.seeds):
        for row, cell in _rows(experiment, study, budgets, seed):
            rows.append(row)
            cells += [] if cell is None else [cell]
    counts = tuple(budget.count for budget in budgets)
    if not cells or all(count is None for count in counts):  # an upper bound alone would answer nothing
        return Part(experiment, study.config, rows=_once(rows), notes=notes, reason=_why(rows))
    if experiment.guided:
        matrix.check_pair(study)
    methods = tuple(dict.fromkeys(cell.ssl for cell in cells if cell.ssl not in ("none", FINE_TUNED)))
    there = tuple(dict.fromkeys(count for count in counts if count is not None))
    bounds = {"bounds": bool(experiment.bounds), "baseline": not experiment.twins_only}
    config = study.config.model_copy(update={"ssl": methods, "labels": there, **bounds})
    study, run = study.vary(config), _run_name(name, "sweep", config, experiment)
    plan = sweep.plan_chains(study, {cell: _chain(study, cell) for cell in cells}, run, store)
    return Part(experiment, config, plan, _once(rows), notes, budgets=counts)


def _once(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(dict.fromkeys(rows))


def _why(rows: Sequence[Row]) -> str:
    return " ".join(dict.fromkeys(row.reason for row in rows if row.reason)) or "Nothing is asked for."


def _budgets(experiment: Experiment, study: Study, own_labels: bool) -> tuple[list[Budget], tuple[str, ...]]:
    """The budget in the place of each label, and what differs from the paper's."""
    found, notes = [], []
    for place, label in enumerate(study.config.labels):
        try:
            budget = Budget(label, matrix.budget(study, label))
        except CfrbenchError as error:
            budget = Budget(experiment.paper_budget(place) if own_labels else label, None, str(error))
        found.append(budget)
        paper = experiment.paper_budget(place) if own_labels else budget.count
        if budget.count is not None and paper not in (budget.count, label):
            notes.append(f"Budget '{label}': {budget.count} labelled cases here, {paper} in the paper.")
    return found, tuple(notes)


def _rows(
    experiment: Experiment, study: Study, budgets: Sequence[Budget], seed: int
) -> Iterator[tuple[Row, Cell | None]]:
    """Every row that the recipe asks for with its cell, in the order of tables; no cell where it cannot be."""
    total = len(study.split.train)
    one = partial(_row, study, seed=seed)
    budgets = list({(b.count, b.label if b.count is None else ""): b for b in budgets}.values())
    if "lower" in experiment.bounds:
        yield from (one(matrix.SUPERVISED, "baseline", budget) for budget in budgets)
    if "upper" in experiment.bounds:
        yield one(matrix.SUPERVISED, "baseline", Budget(total, total))
    for method in experiment.methods:
        twin = method in experiment.guided
        variants = ["baseline"] * (not (twin and experiment.twins_only)) + ["cfr"] * twin
        yield from (one(method, variant, budget) for budget in budgets for variant in variants)
    if experiment.tuned:
        yield from (one(FINE_TUNED, "baseline", budget) for budget in budgets)
    if experiment.guided:
        yield from (one("none", "pseudo-label", budget) for budget in budgets)


def _row(study: Study, ssl: str, variant: str, budget: Budget, *, seed: int) -> tuple[Row, Cell | None]:
    """A row and its cell; no cell, and a reason, where budget or method are missing."""
    total, whole = len(study.split.train), matrix.Repeat(study, study)
    if budget.count is None:
        return Row(ssl, _title(ssl, study), variant, budget.label, None, budget.reason), None
    if variant == "pseudo-label" or ssl == FINE_TUNED:
        pseudo = matrix.pseudo_cell(study, budget.count, total, seed, whole)
        tested = replace(pseudo, ssl=FINE_TUNED, variant=variant, title=f"{pseudo.title}, on test cases")
        cell = pseudo if variant == "pseudo-label" else tested
    else:
        try:
            cell = matrix.make_cell(ssl, variant, budget.count, total, seed, whole)
        except CfrbenchError as error:
            return Row(ssl, _title(ssl, study), variant, budget.count, total - budget.count, str(error)), None
    row = Row(ssl, cell.title, variant, cell.labels, cell.unlabelled)
    if ssl != matrix.SUPERVISED and budget.count == total:
        reason = f"With {total} of {total} training cases labelled, nothing is left unlabelled."
        return Row(row.ssl, row.title, variant, row.labels, 0, reason), None
    return row, cell


def _title(ssl: str, study: Study) -> str:
    """How tables call a method, as far as it is known."""
    if ssl in ("none", FINE_TUNED):
        return study.config.model_name
    try:
        return str(registry.load("ssl", ssl).title)
    except CfrbenchError:
        return ssl


def _chain(study: Study, cell: Cell) -> list[StageTask]:
    """A cell's stages; the fine-tuned model itself is scored on the test cases, which it labels as if unlabelled."""
    if cell.ssl != FINE_TUNED:
        return study.chain(cell)
    labelled = labels_of(study, cell.labels, cell.seed, study.split.test)
    usual = study.score(replace(cell, variant="pseudo-label"))
    recipe = {**usual.recipe, "from": {"stage": "pseudo", "key": labelled.key}}
    score = task("score", f"score {cell.words}", recipe, (labelled.key,))
    return [study.tune(cell.labels, cell.seed), labelled, score]


def labels_of(study: Study, labels: int, seed: int, cases: Sequence[str]) -> StageTask:
    """The stage in which the fine-tuned model labels these cases, whichever they are; no network learns from it."""
    usual = study.pseudo(labels, seed)
    recipe = {**usual.recipe, "unlabelled": study.cases(cases)}
    return task("pseudo", f"{usual.title}, {len(cases)} test cases", recipe, usual.needs)


# ---------------------------------------------------------------------------------------------------------------------
# ablations


def _ablation(name: str, experiment: Experiment, study: Study, own_labels: bool, store: Path) -> Part:
    (budget,), notes = _budgets(experiment, study, own_labels)
    if budget.count is None:
        return Part(experiment, study.config, notes=notes, reason=budget.reason)
    base = study.config.model_copy(update={"labels": (budget.count,)})
    lost = {row.label: reason for row in experiment.variants if (reason := _absent(row))}
    variants = tuple(row for row in experiment.variants if row.label not in lost)
    if experiment.variants and not variants:
        return Part(experiment, base, notes=notes, reason=" ".join(lost.values()))
    plan = ablation.plan(Ablation(kind=experiment.kind, base=base, rows=variants), store)
    plan = _renamed(plan, _run_name(name, experiment.kind, base, experiment))
    asked = [row.label for row in experiment.variants] or [*(row["label"] for row in plan.about), *plan.refused]
    reasons = {**lost, **plan.refused}
    rows = tuple(Row("none", label, "pseudo-label", budget.count, None, reasons.get(label, "")) for label in asked)
    return Part(experiment, base, plan, rows, notes)


def _absent(row: ablation.Row) -> str:
    """Why a variant cannot be asked for: the plug-in that it names and nobody has; "" otherwise."""
    try:
        for kind in ("concat", "tune", "model"):
            if (name := getattr(row, kind)) is not None:
                registry.find(kind, name)
    except CfrbenchError as error:
        return str(error)
    return ""


def _renamed(plan: AblationPlan, name: str) -> AblationPlan:
    return replace(plan, name=name)

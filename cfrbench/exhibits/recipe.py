"""What a recipe says: which experiments a table or figure of a paper rests on, and how they are shown.

A recipe is a TOML file found through an entry point ``recipe.NAME`` (`cfrbench.registry.load_recipe`), data alone.
Methods, data sets and fine-tuners that it names need not be installed: what is missing is shown as missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from cfrbench import registry
from cfrbench.ablation import Row
from cfrbench.config import Frozen, PresetName, validate
from cfrbench.errors import PluginError, UsageError, suggest

#: metrics in the order of tables
Metric = Literal["dice", "jaccard", "asd", "hd95"]
ExperimentKind = Literal["sweep", "concat", "scale", "tune"]
TableKind = Literal["comparison", "by-class", "gains", "ranking", "paper", "costs", "ablation", "stages"]
FigureKind = Literal[
    "budgets", "methods", "variants", "scales", "parameters", "curves", "quality", "ranks", "predictions", "pseudo"
]
#: figure -> the kinds of experiments it can be drawn of
DRAWN_OF: dict[str, tuple[str, ...]] = {
    "budgets": ("sweep",), "methods": ("sweep",), "curves": ("sweep",), "quality": ("sweep",), "ranks": ("sweep",),
    "predictions": ("sweep",), "pseudo": ("sweep", "concat", "tune"), "variants": ("concat", "tune"),
    "scales": ("scale",), "parameters": ("tune",),
}  # fmt: skip
#: table -> the kinds of experiments it can be made of
MADE_OF: dict[str, tuple[str, ...]] = {
    "comparison": ("sweep",), "by-class": ("sweep",), "gains": ("sweep",), "ranking": ("sweep",), "paper": ("sweep",),
    "costs": ("sweep",), "stages": ("sweep",), "ablation": ("concat", "scale", "tune"),
}  # fmt: skip


class Experiment(Frozen):
    """Trainings that share a data set: a sweep over methods and budgets, or an ablation of one thing.

    ``sweep``: ``methods`` without guidance, those of ``guided`` with their CFR twin too, and the supervised ``bounds``.
    ``concat``, ``tune``: the pseudo-labels of ``variants``. ``scale``: those of n x n slices for growing n.
    """

    dataset: str
    kind: ExperimentKind = "sweep"
    labels: tuple[int | str, ...] = Field(("scarce",), min_length=1, description="numbers, or the data set's own words")
    paper_labels: tuple[int, ...] = Field((), description="what ``labels`` are in the paper; () = the same numbers")
    net: str = "vnet"
    methods: tuple[str, ...] = ()
    guided: tuple[str, ...] = ()
    twins_only: bool = Field(False, description="leave out the unguided form of the guided methods")
    tuned: bool = Field(False, description="score the fine-tuned model itself on the test cases too")
    bounds: tuple[Literal["lower", "upper"], ...] = ()
    variants: tuple[Row, ...] = ()
    set: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _makes_sense(self) -> Experiment:
        if stray := [name for name in self.guided if name not in self.methods]:
            raise ValueError(f"guided names {', '.join(stray)}, which methods does not")
        if self.kind == "sweep" and (self.variants or not (self.methods or self.bounds)):
            raise ValueError("a sweep has methods or bounds, and no variants")
        if self.kind != "sweep" and (self.methods or self.bounds or self.tuned):
            raise ValueError(f"an experiment of kind {self.kind} has no methods, bounds or tuned")
        if self.kind in ("concat", "tune") and not self.variants:
            raise ValueError(f"an experiment of kind {self.kind} needs variants")
        if self.kind != "sweep" and len(self.labels) != 1:
            raise ValueError(f"an experiment of kind {self.kind} has one budget of labels")
        if self.paper_labels and len(self.paper_labels) != len(self.labels):
            raise ValueError("paper_labels has one number for each of labels")
        return self

    def paper_budget(self, place: int) -> int | str:
        """The budget that stands at ``place`` in the paper."""
        return self.paper_labels[place] if self.paper_labels else self.labels[place]


class TableSpec(Frozen):
    """One table, made of each experiment it can be made of (``stages``: one table of them all)."""

    kind: TableKind = "comparison"
    metrics: tuple[Metric, ...] = ("dice", "jaccard", "asd", "hd95")


class FigureSpec(Frozen):
    """One figure, drawn of each experiment it can be drawn of."""

    kind: FigureKind
    methods: tuple[str, ...] = Field((), description="predictions: which, in this order; () = all")


class Recipe(Frozen):
    """One table or figure of a paper."""

    title: str
    about: str = Field(description="one sentence: what the paper shows there")
    notes: tuple[str, ...] = Field((), description="what the paper does not say, and what was assumed in its place")
    preset: PresetName = "quick"
    seeds: tuple[int, ...] = (0,)
    experiment: tuple[Experiment, ...] = Field(min_length=1)
    table: tuple[TableSpec, ...] = Field(min_length=1)
    figure: tuple[FigureSpec, ...] = ()

    @model_validator(mode="after")
    def _can_be_shown(self) -> Recipe:
        kinds = {experiment.kind for experiment in self.experiment}
        wanted: list[tuple[str, str, tuple[str, ...]]] = [("table", t.kind, MADE_OF[t.kind]) for t in self.table]
        wanted += [("figure", f.kind, DRAWN_OF[f.kind]) for f in self.figure]
        for what, kind, needs in wanted:
            if kinds.isdisjoint(needs):
                raise ValueError(f"the {what} '{kind}' needs an experiment of kind {' or '.join(needs)}")
        if any(table.kind == "stages" for table in self.table) and not any(e.tuned for e in self.experiment):
            raise ValueError("the table 'stages' needs an experiment with tuned = true")
        return self


@dataclass(frozen=True)
class Listed:
    """One line of the list: a recipe, or the reason why it cannot be read."""

    name: str
    distribution: str
    recipe: Recipe | None
    reason: str = ""


def load(name: str) -> Recipe:
    """The recipe called ``name``; UsageError for an unknown one, PluginError that names the file of a broken one."""
    known = names()
    if name.rpartition(":")[2] not in known:
        raise UsageError(f"No recipe called '{name}'. {suggest(name, [*known, 'all'])} "
                         "`cfrbench reproduce --list` says what each shows.")  # fmt: skip
    path, values = registry.load_recipe(name)
    try:
        return validate(Recipe, values, str(path))
    except UsageError as error:
        raise PluginError(f"The recipe '{name}' is broken. {error} Repair or uninstall it.") from error


def names() -> list[str]:
    """All names, tables before figures, numbers in order; those of guests after them."""
    return sorted(registry.names("recipe"), key=_place)


def _place(name: str) -> tuple[int, str, int, str]:
    kind, _, number = name.partition("-")
    if kind in ("table", "figure") and number.isdigit():
        return (kind == "figure", "", int(number), name)
    return (2, name, 0, name)


def listing() -> list[Listed]:
    """Every recipe, the broken ones with their reason."""
    found = []
    for plugin in sorted((p for p in registry.discover() if p.kind == "recipe"), key=lambda p: _place(p.name)):
        try:
            found.append(Listed(plugin.name, plugin.distribution, load(plugin.qualified)))
        except PluginError as error:
            found.append(Listed(plugin.name, plugin.distribution, None, str(error)))
    return found

"""What each stage's key is the hash of: every input that can change its result, and nothing else.

A recipe is plain JSON: plug-ins with versions and options, case ids with fingerprints, the settings the stage reads,
and the keys of the stages it stands on. `cfrbench.stages` runs a stage from its recipe alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cfrbench import registry
from cfrbench.config import RunConfig, Settings, digest, override, validate
from cfrbench.contracts import DataSource, StageTask
from cfrbench.errors import PluginError
from cfrbench.volume import Split

#: raised when the code of a stage changes its numbers
STAGE_VERSIONS = {"tune": 1, "pseudo": 1, "train": 1, "predict": 1, "score": 1}

Recipe = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One row group of the table: a method with or without guidance at one budget and seed."""

    ssl: str
    title: str
    variant: str  # baseline, cfr, pseudo-label
    labels: int
    unlabelled: int
    seed: int

    @property
    def words(self) -> str:
        """``MT + CFR · 1 label · seed 0``."""
        name = f"{self.title} + CFR" if self.variant == "cfr" else self.title
        return f"{name} · {self.labels} label{'s' if self.labels != 1 else ''} · seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """The objects behind a request: data, settings, split, and the recipes they lead to."""

    config: RunConfig
    settings: Settings
    source: DataSource
    split: Split
    fingerprint: Mapping[str, str]
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def _once(self, make: Callable[[], T], *key: Any) -> T:
        """What ``make`` gives, asked once: cells share most of their stages."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def plugin(self, kind: str, name: str) -> Recipe:
        """Name, version and full options of a plug-in, as they enter keys."""
        return self._once(lambda: self._plugin(kind, name), "plugin", kind, name)

    def _plugin(self, kind: str, name: str) -> Recipe:
        cls = registry.load(kind, name)
        values = self.settings.options.get(f"{kind}.{cls.name}", {})
        options = validate(cls.Config, values, f"the options of {kind}.{cls.name}").model_dump(mode="json")
        return {"name": name, "version": registry.version(kind, name), "options": options}

    def cases(self, names: Sequence[str]) -> list[list[str]]:
        """Case ids with their fingerprints, in order."""
        return [[name, self.fingerprint[name]] for name in names]

    def sections(self, *names: str) -> Recipe:
        """The named sections of the settings; wall-clock values are left out, they change no number."""
        chosen = {name: getattr(self.settings, name).model_dump(mode="json") for name in names}
        chosen.get("training", {}).pop("checkpoint_seconds", None)
        return chosen

    def tune(self, labels: int, seed: int) -> StageTask:
        """Fine-tune the foundation model on the first ``labels`` cases."""
        return self._once(lambda: self._tune(labels, seed), "tune", labels, seed)

    def _tune(self, labels: int, seed: int) -> StageTask:
        foundation = self.plugin("model", self.config.model_name)
        model = registry.load("model", self.config.model_name)
        options = validate(model.Config, foundation["options"], "the model's options")
        training = self.settings.training
        recipe = self._base() | {
            "seed": seed,
            "labelled": self.cases(self.split.labelled(labels)),
            "concat": self.plugin("concat", self.config.concat),
            "model": foundation | {"identity": model(options).identity()},
            "tune": self.plugin("tune", self.config.tune),
            "settings": self.sections("grid", "tuning", "compute")
            | {"training": {"patch": training.patch, "rotflip": training.rotflip}},
        }
        return task(
            "tune", f"fine-tune {self.config.model_name} · {labels} label{'s' * (labels != 1)} · seed {seed}", recipe
        )

    def pseudo(self, labels: int, seed: int) -> StageTask:
        """Label the unlabelled volumes with the fine-tuned model."""
        return self._once(lambda: self._pseudo(labels, seed), "pseudo", labels, seed)

    def _pseudo(self, labels: int, seed: int) -> StageTask:
        tuned = self.tune(labels, seed)
        recipe = self._base() | {
            "unlabelled": self.cases(self.split.unlabelled(labels)),
            "from": {"stage": "tune", "key": tuned.key},
            "settings": {"pseudo": {"stride_fraction": self.settings.pseudo.stride_fraction}},
        }
        title = tuned.title.replace("fine-tune", "pseudo-labels of")
        return task("pseudo", title, recipe, (tuned.key,))

    def train(self, cell: Cell) -> StageTask:
        """Train one method, guided if the cell is a CFR twin."""
        method = registry.load("ssl", cell.ssl)
        recipe = self._base() | {
            "seed": cell.seed,
            "labelled": self.cases(self.split.labelled(cell.labels)),
            "unlabelled": self.cases(self.split.unlabelled(cell.labels)) if method.uses_unlabelled else [],
            "ssl": self.plugin("ssl", cell.ssl),
            "net": self.plugin("net", self.config.net),
            "settings": self.sections("grid", "training", "compute"),
        }
        guidance = {k: recipe["settings"]["training"].pop(k) for k in ("guidance_weight", "guidance_schedule")}
        needs: tuple[str, ...] = ()
        if cell.variant == "cfr":
            online = self.settings.pseudo.mode == "online"
            teacher = (self.tune if online else self.pseudo)(cell.labels, cell.seed)
            recipe["guidance"] = guidance | {"stage": teacher.stage, "key": teacher.key}
            needs = (teacher.key,)
        return task("train", f"train {cell.words}", recipe, needs)

    def predict(self, cell: Cell) -> StageTask:
        """Predict the test volumes with a trained network."""
        trained = self.train(cell)
        recipe = self._base() | {
            "test": self.cases(self.split.test),
            "from": {"stage": "train", "key": trained.key},
            "settings": self.sections("inference"),
        }
        return task("predict", f"predict {cell.words}", recipe, (trained.key,))

    def score(self, cell: Cell) -> StageTask:
        """Score a cell's label maps: test predictions, or pseudo-labels of the unlabelled volumes."""
        masks = self.pseudo(cell.labels, cell.seed) if cell.variant == "pseudo-label" else self.predict(cell)
        recipe = self._base() | {
            "from": {"stage": masks.stage, "key": masks.key},
            "settings": self.sections("scoring", "grid"),
        }
        return task("score", f"score {cell.words}", recipe, (masks.key,))

    def chain(self, cell: Cell) -> list[StageTask]:
        """Every stage of a cell, needs first, its score last."""
        if cell.variant == "pseudo-label":
            return [self.tune(cell.labels, cell.seed), self.pseudo(cell.labels, cell.seed), self.score(cell)]
        guided = []
        if cell.variant == "cfr":
            guided = [self.tune(cell.labels, cell.seed)]
            if self.settings.pseudo.mode == "volume":
                guided.append(self.pseudo(cell.labels, cell.seed))
        return [*guided, self.train(cell), self.predict(cell), self.score(cell)]

    def _base(self) -> Recipe:
        return {"data": self.plugin("data", self.config.dataset), "classes": list(self.source.class_names)}


def task(stage: str, title: str, recipe: Recipe, needs: tuple[str, ...] = ()) -> StageTask:
    """A stage with its key: the hash of stage name, stage version and recipe."""
    key = digest({"stage": stage, "version": STAGE_VERSIONS[stage], "recipe": recipe})
    return StageTask(stage, key, title, needs, recipe)


def open_source(name: str, root: Path | None, values: Mapping[str, Any]) -> DataSource:
    """The data set called ``name`` with its own options among the dotted ``values``."""
    cls = registry.load("data", name)
    options = override(Settings(), values).options.get(f"data.{cls.name}", {})
    source: DataSource = cls(validate(cls.Config, options, f"the options of data.{cls.name}"), root)
    return source


def study_of(config: RunConfig) -> Study:
    """Turn the names of a request into objects; every wrong name, setting or case list is found here."""
    from cfrbench.datasets import refuse_duplicates

    source = open_source(config.dataset, config.data_root, config.set)
    settings = config.settings(source.protocol(config.preset))
    _check_options(settings)
    split = source.split()
    fingerprint = source.fingerprint()
    refuse_duplicates(fingerprint)
    study = Study(config, settings, source, split, fingerprint)
    for kind, name in (("concat", config.concat), ("tune", config.tune), ("net", config.net)):
        study.plugin(kind, name)
    return study


def _check_options(settings: Settings) -> None:
    """Options for a plug-in nobody knows are a mistake, not a preparation."""
    for name in settings.options:
        kind, _, plugin = name.partition(".")
        registry.find(kind, plugin)


def check_fit(tuner: Any, model: Any) -> None:
    """Refuse a fine-tuner and a foundation model that do not fit, with the fine-tuner's reason."""
    reason = tuner.refuses(model)
    if reason:
        raise PluginError(f"The fine-tuner '{tuner.name}' cannot be used on '{model.name}': {reason}")

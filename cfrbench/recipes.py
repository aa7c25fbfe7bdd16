"""What each stage's key is the hash of: every input that can change its result, and nothing else.

A recipe is plain JSON: plug-ins with versions and options, case ids with fingerprints, the settings the stage reads,
and the keys of the stages it stands on. `cfrbench.stages` runs a stage from its recipe alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cfrbench import registry
from cfrbench.artifact import SCORES as SCORES
from cfrbench.cells import Cell as Cell
from cfrbench.compute import HALF
from cfrbench.config import RunConfig, Settings, Triple, digest, override, validate
from cfrbench.contracts import ConcatStrategy, DataSource, FineTuner, FoundationModel, Segmenter, StageTask
from cfrbench.errors import ConfigError, PluginError, suggest
from cfrbench.prepared.source import imported_folder, imported_names, is_prepared
from cfrbench.volume import Split

#: raised when the code of a stage changes its numbers
STAGE_VERSIONS = {"tune": 1, "pseudo": 1, "train": 3, "predict": 2, "score": 1}

#: files of finished stages
WEIGHTS, WORKING, STORED = "weights.safetensors", "working.npz", "labels.npz"

#: settings of training that only a guided one reads
GUIDANCE = ("guidance_weight", "guidance_schedule")

Recipe = dict[str, Any]
T = TypeVar("T")


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

    def make(self, kind: str, name: str) -> Any:
        """An instance of a plug-in with its options."""
        cls = registry.load(kind, name)
        return cls(cls.Config.model_validate(self.plugin(kind, name)["options"]))

    def vary(self, config: RunConfig) -> Study:
        """This study with other plug-ins and settings on the same data."""
        config = _with_net(config, self.source)
        return _checked(replace(self, config=config, settings=_settings(config, self.source), _made={}))

    def on(self, split: Split) -> Study:
        """This study on other lists of the same cases."""
        return replace(self, split=split, _made={})

    @property
    def crop(self) -> Triple:
        """The crop that is laid out on one canvas."""
        return self.settings.tuning.patch or self.settings.training.patch

    def _plugin(self, kind: str, name: str) -> Recipe:
        cls = registry.load(kind, name)
        values = _with_named(cls, self.settings.options.get(f"{kind}.{cls.name}", {}))
        options = validate(cls.Config, values, f"the options of {kind}.{cls.name}").model_dump(mode="json")
        return {"name": name, "version": registry.version(kind, name), "options": options}

    def cases(self, names: Sequence[str]) -> list[list[str]]:
        """Case ids with their fingerprints, in order; recipes share the list, so nobody may change it."""
        return self._once(lambda: [[name, self.fingerprint[name]] for name in names], "cases", *names)

    def sections(self, *names: str) -> Recipe:
        """The named sections of the settings; recipes share them, so nobody may change them."""
        return {name: self._once(partial(self._section, name), "section", name) for name in names}

    def _section(self, name: str) -> Recipe:
        """A section as it enters keys: wall-clock values are left out, they change no number."""
        chosen: Recipe = getattr(self.settings, name).model_dump(mode="json")
        if name == "training":
            chosen.pop("checkpoint_seconds", None)
        return chosen

    def tune(self, labels: int, seed: int) -> StageTask:
        """Fine-tune the foundation model on the first ``labels`` cases."""
        return self._once(lambda: self._tune(labels, seed), "tune", labels, seed)

    def _tune(self, labels: int, seed: int) -> StageTask:
        foundation = self.plugin("model", self.config.model_name)
        model = self.make("model", self.config.model_name)
        training = self.settings.training
        recipe = self._base() | {
            "seed": seed,
            "labelled": self.cases(self.split.labelled(labels)),
            "concat": self._once(self._concat, "concat"),
            "model": foundation | {"identity": model.identity()},
            "tune": self.plugin("tune", self.config.tune),
            "settings": self.sections("grid", "tuning", "compute")
            | {"training": {"patch": training.patch, "rotflip": training.rotflip}},
        }
        return task(
            "tune", f"fine-tune {self.config.model_name} · {labels} label{'s' * (labels != 1)} · seed {seed}", recipe
        )

    def _concat(self) -> Recipe:
        """The strategy, with the hash of the files that it reads, if it reads any; UsageError if the crop does not fit.

        Also in fine-tuning, and ConfigError if the model does not take the input that the strategy asks for.
        """
        strategy: ConcatStrategy = self.make("concat", self.config.concat)
        tuning = self.settings.tuning
        if self.make("tune", self.config.tune).takes == "canvas":
            strategy.plan(self.crop, tuning.canvas, overflow=tuning.overflow)
            strategy.plan_training(self.crop, tuning.canvas, overflow=tuning.overflow)
            model: FoundationModel = self.make("model", self.config.model_name)
            model.resized(strategy.input_side(self.crop, model.input_size))
        identity = strategy.identity()
        return self.plugin("concat", self.config.concat) | ({"identity": identity} if identity else {})

    def pseudo(self, labels: int, seed: int, cases: int | None = None) -> StageTask:
        """Label the unlabelled volumes, or the first ``cases`` of them, with the fine-tuned model."""
        return self._once(lambda: self._pseudo(labels, seed, cases), "pseudo", labels, seed, cases)

    def _pseudo(self, labels: int, seed: int, cases: int | None) -> StageTask:
        tuned = self.tune(labels, seed)
        recipe = self._base() | {
            "unlabelled": self.cases(self.split.unlabelled(labels)[:cases]),
            "from": {"stage": "tune", "key": tuned.key},
            "settings": {"pseudo": {"stride_fraction": self.settings.pseudo.stride_fraction}},
        }
        title = tuned.title.replace("fine-tune", "pseudo-labels of")
        return task("pseudo", title, recipe, (tuned.key,))

    def train(self, cell: Cell) -> StageTask:
        """Train one method, guided if the cell is a CFR twin."""
        return self._once(lambda: self._train(cell), "train", cell)

    def _train(self, cell: Cell) -> StageTask:
        method = registry.load("ssl", cell.ssl)
        settings = self.settings
        check_patch(self.make("net", str(self.config.net)), settings.training.patch, settings.compute.precision)
        recipe = self._base() | {
            "seed": cell.seed,
            "labelled": self.cases(self.split.labelled(cell.labels)),
            "unlabelled": self.cases(self.split.unlabelled(cell.labels)) if method.uses_unlabelled else [],
            "ssl": self.plugin("ssl", cell.ssl),
            "net": self.plugin("net", str(self.config.net)),
            # a method that labels whole volumes slides its network over them while it trains
            "settings": self.sections("grid", "training", "compute", *["inference"] * method.relabels),
        }
        whole: Recipe = recipe["settings"]["training"]
        guidance = {k: whole[k] for k in GUIDANCE}
        recipe["settings"]["training"] = self._once(
            lambda: {k: value for k, value in whole.items() if k not in GUIDANCE}, "section", "training", "unguided"
        )
        needs: tuple[str, ...] = ()
        if cell.variant == "cfr":
            online = self.settings.pseudo.mode == "online"
            teacher = (self.tune if online else self.pseudo)(cell.labels, cell.seed)
            recipe["guidance"] = guidance | {"stage": teacher.stage, "key": teacher.key}
            needs = (teacher.key,)
        return task("train", f"train {cell.words}", recipe, needs)

    def predict(self, cell: Cell) -> StageTask:
        """Predict the test volumes with a trained network."""
        return self._once(lambda: self._predict(cell), "predict", cell)

    def _predict(self, cell: Cell) -> StageTask:
        trained = self.train(cell)
        recipe = self._base() | {
            "test": self.cases(self.split.test),
            "from": {"stage": "train", "key": trained.key},
            "settings": self.sections("inference"),
        }
        return task("predict", f"predict {cell.words}", recipe, (trained.key,))

    def score(self, cell: Cell) -> StageTask:
        """Score a cell's label maps: test predictions, or pseudo-labels of the unlabelled volumes."""
        scores_pseudo = cell.variant == "pseudo-label"
        masks = self.pseudo(cell.labels, cell.seed, cell.cases) if scores_pseudo else self.predict(cell)
        recipe = self._base() | {
            "from": {"stage": masks.stage, "key": masks.key},
            "settings": self.sections("scoring", "grid"),
        }
        return task("score", f"score {cell.words}", recipe, (masks.key,))

    def chain(self, cell: Cell) -> list[StageTask]:
        """Every stage of a cell, needs first, its score last."""
        if cell.variant == "pseudo-label":
            masks = self.pseudo(cell.labels, cell.seed, cell.cases)
            return [self.tune(cell.labels, cell.seed), masks, self.score(cell)]
        guided = []
        if cell.variant == "cfr":
            guided = [self.tune(cell.labels, cell.seed)]
            if self.settings.pseudo.mode == "volume":
                guided.append(self.pseudo(cell.labels, cell.seed))
        return [*guided, self.train(cell), self.predict(cell), self.score(cell)]

    def _base(self) -> Recipe:
        return self._once(lambda: {"data": self._data(), "classes": list(self.source.class_names)}, "base")

    def _data(self) -> Recipe:
        """The data set as `_plugin` says it of others; for an imported one its options hold what its manifest says."""
        name = _data_plugin(self.config.dataset, self.config.data_root)
        return {"name": name, "version": registry.version("data", name),
                "options": self.source.config.model_dump(mode="json")}  # fmt: skip


def _with_named(cls: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The named options that ``config=NAME`` asks a method for, under those that ``values`` set one by one."""
    name = values.get("config")
    if name is None:
        return values
    known: Mapping[str, Mapping[str, Any]] = getattr(cls, "configs", {})
    if name not in known:
        raise ConfigError(f"'{cls.name}' has no options called '{name}'. {suggest(str(name), known)} "
                          f"`cfrbench ssl show {cls.name}` lists them.")  # fmt: skip
    return {**known[name], **{key: value for key, value in values.items() if key != "config"}}


def task(stage: str, title: str, recipe: Recipe, needs: tuple[str, ...] = ()) -> StageTask:
    """A stage with its key: the hash of stage name, stage version and recipe."""
    key = digest({"stage": stage, "version": STAGE_VERSIONS[stage], "recipe": recipe})
    return StageTask(stage, key, title, needs, recipe)


def open_source(name: str, root: Path | None, values: Mapping[str, Any]) -> DataSource:
    """The data set called ``name`` with its own options among the dotted ``values``."""
    cls = registry.load("data", _data_plugin(name, root))
    options = override(Settings(), values).options.get(f"data.{cls.name}", {})
    source: DataSource = cls(validate(cls.Config, options, f"the options of data.{cls.name}"), root)
    return source


def find_source(name: str, root: Path | None, values: Mapping[str, Any], store: Path) -> DataSource:
    """The data set called ``name``: a plug-in, or one that was imported into the ``store``; PluginError if neither."""
    config = with_data_root(validate(RunConfig, {"dataset": name, "data_root": root}, "the command line"), store)
    return open_source(name, config.data_root, values)


def _data_plugin(name: str, root: Path | None) -> str:
    """The plug-in behind the name of a data set: the one of imported sets if ``root`` is such a set and no other is."""
    known = name.rpartition(":")[2] in registry.names("data")
    return "nifti" if not known and is_prepared(root) else name


def with_data_root(config: RunConfig, store: Path) -> RunConfig:
    """The request, with the folder in the ``store`` if that holds the data set; PluginError if there is none."""
    if config.data_root is not None:
        return config
    folder = imported_folder(store.absolute(), config.dataset)
    if is_prepared(folder):
        return config.model_copy(update={"data_root": folder})
    known = registry.names("data")
    if config.dataset.rpartition(":")[2] in known:
        return config
    raise PluginError(f"No data set called '{config.dataset}', neither built in nor imported into {store}. "
                      f"{suggest(config.dataset, [*known, *imported_names(store)])} Import your own with "
                      f"`cfrbench data import DIR --name NAME`.")  # fmt: skip


def study_of(config: RunConfig) -> Study:
    """Turn the names of a request into objects; every wrong name, setting or case list is found here."""
    from cfrbench.datasets import refuse_duplicates

    source = open_source(config.dataset, config.data_root, config.set)
    config = _with_net(config, source)
    settings = _settings(config, source)
    fingerprint = source.fingerprint()
    refuse_duplicates(fingerprint)
    return _checked(Study(config, settings, source, source.split(), fingerprint))


def _with_net(config: RunConfig, source: DataSource) -> RunConfig:
    """The request with the data set's segmenter if it asks for none."""
    return config if config.net is not None else config.model_copy(update={"net": source.segmenter})


def _settings(config: RunConfig, source: DataSource) -> Settings:
    """All settings of a request, the precision decided for this machine."""
    from cfrbench.compute import settled

    settings = config.settings({**source.protocol(config.preset), **_tuner(config).protocol()})
    return settings.model_copy(update={"compute": settled(settings.compute)})


def _tuner(config: RunConfig) -> FineTuner:
    """The fine-tuner with its own options among the dotted values; ConfigError if it would not use the strategy."""
    cls = registry.load("tune", config.tune)
    options = override(Settings(), config.set).options.get(f"tune.{cls.name}", {})
    tuner: FineTuner = cls(validate(cls.Config, options, f"the options of tune.{cls.name}"))
    if tuner.takes != "canvas" and config.concat != RunConfig().concat:
        raise ConfigError(f"The fine-tuner '{tuner.name}' takes all slices of a crop, not canvases, so the strategy "
                          f"'{config.concat}' would not be used. Leave --concat away.")  # fmt: skip
    return tuner


def _checked(study: Study) -> Study:
    """The study, if every plug-in that it or its settings name is known and takes its options."""
    for name in study.settings.options:  # options for a plug-in nobody knows are a mistake, not a preparation
        kind, _, plugin = name.partition(".")
        registry.find(kind, plugin)
    config = study.config
    for kind, name in (("concat", config.concat), ("tune", config.tune), ("net", str(config.net))):
        study.plugin(kind, name)
    return study


def check_fit(tuner: Any, model: Any) -> None:
    """Refuse a fine-tuner and a foundation model that do not fit, with the fine-tuner's reason."""
    reason = tuner.refuses(model)
    if reason:
        raise PluginError(f"The fine-tuner '{tuner.name}' cannot be used on '{model.name}': {reason}")


def check_patch(segmenter: Segmenter, patch: Triple, precision: str) -> None:
    """Refuse a patch that the segmenter cannot halve, or not in half precision; ConfigError says what fits."""
    if any(side % segmenter.divisor for side in patch):
        raise ConfigError(f"The training patch {patch} has sides that are not multiples of {segmenter.divisor}, which "
                          f"'{segmenter.name}' needs. Set training.patch accordingly.")  # fmt: skip
    # Measured with torch 2.14.1 on a CPU: the weight gradient of a bf16 3x3x3 convolution is wrong, and not always
    # infinite, where the first spatial side is 2 (sides 1, 3, 4 and 5 are right). It gets there by halving.
    if precision in HALF and patch[0] <= 2 * segmenter.divisor:
        raise ConfigError(f"The patch {patch} is halved to a first side of 2 inside '{segmenter.name}', where "
                          f"gradients in {precision} are wrong. Use --precision fp32, a larger patch, or fewer "
                          f"halvings (net.{segmenter.name}.depth).")  # fmt: skip

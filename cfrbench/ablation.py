"""Ablations: variants of one request, each a chain of stages from the same store, compared under one protocol.

A variant is a request of its own (another strategy, fine-tuner, setting) on the same data, split, seeds and budget of
steps, so `cfrbench run` with the same settings finds its stages and the other way round. A variant that cannot be is
listed with its reason; the others go on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from cfrbench import registry, sweep
from cfrbench.config import Frozen, RunConfig, digest, parse_value, validate
from cfrbench.contracts import ConcatStrategy, FineTuner, FoundationModel, StageTask
from cfrbench.errors import CfrbenchError, ConfigError, UsageError
from cfrbench.layouts import contents, slices_per_step
from cfrbench.matrix import budget
from cfrbench.prepared.leaks import SIGNATURES, refuse_leaks
from cfrbench.recipes import Cell, Study, check_fit, study_of, with_data_root
from cfrbench.store import Store

Kind = Literal["concat", "scale", "pseudo", "tune"]
#: fine-tuning steps under a preset where none are asked for: all strategies on the phantom in minutes
STEPS = {"quick": 100}
SCALES = (2, 4)
SCALED = "scaled"
#: pseudo-label mode and guidance schedule, as tables call them
GUIDANCE = {
    f"{mode}, {words}": {"pseudo.mode": mode, "training.guidance_schedule": schedule}
    for mode in ("volume", "online")
    for schedule, words in (("constant", "constant weight"), ("linear-decay", "decaying weight"))
}
UNGUIDED = "no guidance"
VERBS = {"tune": "fine-tune", "pseudo": "pseudo-labels of"}


class Row(Frozen):
    """A variant spelled out: its name in the table, and what it has in place of the base's; None = the base's own."""

    label: str
    concat: str | None = None
    tune: str | None = None
    model: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class Ablation(Frozen):
    """One request: ``base`` says everything that the variants share."""

    kind: Kind
    base: RunConfig = RunConfig()
    #: strategies or fine-tuners: ``NAME`` or ``NAME:OPTION=VALUE:...``; None = all that are built in
    names: tuple[str, ...] | None = None
    #: n of n x n slices on a canvas, for the strategy `scaled`; None = `SCALES`, or the sweep of `sweep_scales`
    scales: tuple[int, ...] | None = None
    cases: int | None = Field(None, ge=1, description="score the first so many unlabelled cases; None = all")
    #: variants that differ in several things at once, in place of those that the kind has
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: its name there, and the request that makes it."""

    label: str
    config: RunConfig
    scale: int | None = None
    baseline: bool = False


@dataclass(frozen=True)
class VariantCell(Cell):
    """A cell that says which plug-ins it stands on; ``title`` is the variant's label."""

    concat: str = ""
    tune: str = ""
    model: str = ""

    @property
    def words(self) -> str:
        """``shuffled · 1 label · seed 0``."""
        return f"{self.title} · {self.labels} label{'s' * (self.labels != 1)} · seed {self.seed}"


@dataclass(frozen=True)
class AblationPlan(sweep.Plan):
    """The plan of all variants together; ``refused`` are those that cannot be, with their reasons."""

    request: Ablation = field(kw_only=True)
    about: tuple[Mapping[str, Any], ...] = field(kw_only=True)
    refused: Mapping[str, str] = field(kw_only=True)

    def facts(self) -> dict[str, Any]:
        """Facts of the run with what was planned and measured of each variant."""
        home = Store(self.store)
        rows = [{**row, **_measured(home, [c for cell, c in self.chains.items() if cell.title == row["label"]])}
                for row in self.about]  # fmt: skip
        request = self.request
        ablation = {"kind": request.kind, "labels": _budget(self.study), "crop": list(self.study.crop), "rows": rows,
                    "refused": dict(self.refused)}  # fmt: skip
        return super().facts() | {"ablation": ablation, "protocol": "; ".join(_protocol(request.kind, self.study))}


def ablate(
    kind: Kind, *, store: str | Path = "cfrbench-store", executor: str = "local", jobs: int = 1,
    observer: object | None = None, names: Sequence[str] | None = None, scales: Sequence[int] | None = None,
    cases: int | None = None, steps: int | None = None, **fields: Any,
) -> sweep.Result:  # fmt: skip
    """Run an ablation: ``ablate("concat", names=["grid", "shuffled"], seeds=[0, 1])``; ``fields`` are RunConfig's.

    Raises CfrbenchError for wrong use; a failed variant is in ``Result.failures``, a refused one in ``Result.facts``.
    """
    base = validate(RunConfig, fields, "the arguments of cfrbench.ablate")
    request = request_of(kind, base, names=names, scales=scales, cases=cases, steps=steps)
    return sweep.execute(plan(request, Path(store)), executor=executor, jobs=jobs, observer=observer)


def request_of(
    kind: Kind, base: RunConfig, *, names: Sequence[str] | None = None, scales: Sequence[int] | None = None,
    cases: int | None = None, steps: int | None = None,
) -> Ablation:  # fmt: skip
    """The request with its budget of fine-tuning steps: ``steps``, else the base's own, else `STEPS`."""
    # Re-training follows here, so its pseudo-labels are to be those of `cfrbench run`.
    default = None if kind == "pseudo" else STEPS.get(base.preset)
    budget = steps or base.set.get("tuning.steps", default)
    if budget is not None:
        base = base.model_copy(update={"set": base.set | {"tuning.steps": budget}})
    values = {"kind": kind, "base": base, "names": names, "scales": scales, "cases": cases}
    return validate(Ablation, {k: v for k, v in values.items() if v is not None}, f"cfrbench ablate {kind}")


def plan(request: Ablation, store: Path) -> AblationPlan:
    """Work out variants, cells and stages; ConfigError or UsageError if no variant can be. Nothing is computed."""
    request = request.model_copy(update={"base": with_data_root(request.base, store)})
    if request.base.folds or request.base.label_seeds:
        raise UsageError("`cfrbench ablate` compares variants on the official split. Leave folds and label_seeds away, "
                         "or give each variant to `cfrbench run` with them.")  # fmt: skip
    study = study_of(request.base)
    refuse_leaks(study.source, [study.split], study.fingerprint, store / SIGNATURES)
    _check_cases(request, study)
    chains: dict[Cell, list[StageTask]] = {}
    about, refused = [], {}
    budget = {"tuning.steps": study.settings.tuning.steps}  # whatever a fine-tuner's own settings would say
    for variant in {variant.label: variant for variant in variants(request, study)}.values():
        own = study.vary(_with(variant.config, budget))
        try:
            about.append(_about(own, variant))
        except CfrbenchError as error:
            refused[variant.label] = str(error)
            continue
        for seed in dict.fromkeys(request.base.seeds):
            cell = _cell(request, own, variant, seed)
            chains[cell] = own.chain(cell)
    if not chains:
        reasons = " ".join(dict.fromkeys(refused.values()))
        raise UsageError(f"None of the variants of `cfrbench ablate {request.kind}` can be run. {reasons}")
    chains = _titled(chains)
    todo, reused = sweep.missing(chains.values(), Store(store))
    name = f"{request.base.dataset}-ablate-{request.kind}-{digest(request)[:8]}".replace(":", ".").replace("/", ".")
    return AblationPlan(study, chains, todo, reused, name, store, request=request, about=tuple(about), refused=refused)


def _protocol(kind: Kind, study: Study) -> list[str]:
    """What the variants share; what they differ in, or do not have, is left out."""
    if kind == "pseudo":
        words = sweep.protocol(study.settings)
        return [text for subject, text in words.items() if subject not in ("pseudo", "guidance")]
    words, tuning = sweep.protocol(study.settings, study.crop), study.settings.tuning
    words["tuning"] += f" of batch {tuning.batch_size} on canvases of {tuning.canvas} pixels"
    shared = ("crops", "tuning", "scoring", "empty", "postprocess", "precision")
    return [words[subject] for subject in shared]


# ---------------------------------------------------------------------------------------------------------------------
# variants


def variants(request: Ablation, study: Study) -> list[Variant]:
    """Every variant that is asked for, in table order; unknown names are errors."""
    if request.rows:
        return [_spelled_out(request.base, row) for row in request.rows]
    if request.kind == "concat":
        return [v for name in request.names or built_in("concat") for v in _strategies(request, name)]
    if request.kind == "scale":
        scales = request.scales or sweep_scales(study.crop[2])
        return [Variant("grid", _with(request.base, concat="grid")), *_scaled(request.base, SCALED, scales)]
    if request.kind == "tune":
        return [_tuner(request.base, name) for name in request.names or built_in("tune")]
    guided = [Variant(label, _with(request.base, values)) for label, values in GUIDANCE.items()]
    return [Variant(UNGUIDED, request.base, baseline=True), *guided]


def _spelled_out(base: RunConfig, row: Row) -> Variant:
    choices = {kind: name for kind in ("concat", "tune", "model") if (name := getattr(row, kind)) is not None}
    for kind, name in choices.items():
        registry.find(kind, name)
    return Variant(row.label, _with(base, row.set, **choices))


def built_in(kind: str) -> list[str]:
    """Names of this package's own plug-ins of a kind, the paper's choice first."""
    own = [p.name for p in registry.discover() if p.kind == kind and p.distribution == "cfrbench"]
    first = RunConfig.model_fields[kind].default
    return sorted(own, key=lambda name: (name != first, name))


def sweep_scales(depth: int) -> list[int]:
    """n = 1, 2, 4, ... up to the smallest n x n that holds ``depth`` slices, which is the last."""
    whole = math.isqrt(depth - 1) + 1
    return [*(2**i for i in range(whole.bit_length()) if 2**i < whole), whole]


def _tuner(base: RunConfig, name: str) -> Variant:
    """A fine-tuner; one that takes slices or volumes has no use for another strategy than the default."""
    made = named(base, "tune", name)
    if registry.load("tune", made.config.tune).takes == "canvas":
        return made
    return replace(made, config=_with(made.config, concat=RunConfig().concat))


def _strategies(request: Ablation, name: str) -> Iterator[Variant]:
    plugin, options = _parts("concat", name)
    if plugin == SCALED and "n" not in options:
        yield from _scaled(request.base, name, request.scales or SCALES)
    else:
        yield named(request.base, "concat", name)


def _scaled(base: RunConfig, name: str, scales: Sequence[int]) -> Iterator[Variant]:
    for n in scales:
        made = named(base, "concat", f"{name}:n={n}")
        others = {k: v for k, v in _parts("concat", name)[1].items() if k != "n"}
        yield replace(made, label=_label(f"{SCALED} {n} x {n}", others), scale=n)


def named(base: RunConfig, kind: str, text: str) -> Variant:
    """``base`` with the plug-in that ``NAME`` or ``NAME:OPTION=VALUE:...`` means; PluginError for an unknown one."""
    name, options = _parts(kind, text)
    short = registry.find(kind, name).name
    values = {f"{kind}.{short}.{option}": value for option, value in options.items()}
    return Variant(_label(name, options), _with(base, values, **{kind: name}))


def _label(name: str, options: Mapping[str, Any]) -> str:
    return f"{name} ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else name


def _parts(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """``"scaled:n=2"`` -> ``("scaled", {"n": 2})``; what has no ``=`` belongs to the name (``DIST:name``)."""
    words = text.split(":")
    name = ":".join(word for word in words if "=" not in word)
    registry.find(kind, name)
    return name, {k: parse_value(v) for k, _, v in (word.partition("=") for word in words if "=" in word)}


def _with(base: RunConfig, values: Mapping[str, Any] | None = None, **choices: str) -> RunConfig:
    return base.model_copy(update={**choices, "set": {**base.set, **(values or {})}})


# ---------------------------------------------------------------------------------------------------------------------
# cells


def _check_cases(request: Ablation, study: Study) -> None:
    if request.kind == "pseudo" and not registry.load("ssl", request.base.ssl[0]).uses_unlabelled:
        raise ConfigError(f"'{request.base.ssl[0]}' trains on labelled cases alone, so pseudo-labels cannot change it. "
                          "Choose another --ssl.")  # fmt: skip
    labels, total = _budget(study), len(study.split.train)
    if labels == total:
        raise ConfigError(f"With {labels} of {total} training cases labelled, no unlabelled case is left whose "
                          "pseudo-labels could be scored. Ask for fewer labels.")  # fmt: skip
    if request.cases is not None and request.cases > total - labels:
        raise ConfigError(f"--cases {request.cases} asks for more than the {total - labels} unlabelled cases that "
                          f"{labels} labels leave of {total}. Choose at most {total - labels}.")  # fmt: skip


def _budget(study: Study) -> int:
    if len(study.config.labels) != 1:
        raise ConfigError(f"An ablation has one budget of labels, not {len(study.config.labels)}. Give one --labels.")
    return budget(study, study.config.labels[0])


def _cell(request: Ablation, study: Study, variant: Variant, seed: int) -> Cell:
    labels, config = _budget(study), study.config
    unlabelled = len(study.split.unlabelled(labels))
    ssl, kind = "none", "pseudo-label"
    if request.kind == "pseudo":
        ssl, kind = config.ssl[0], "baseline" if variant.baseline else "cfr"
    return VariantCell(ssl, variant.label, kind, labels, unlabelled, seed, request.cases, concat=config.concat,
                       tune=config.tune, model=config.model_name)  # fmt: skip


def _titled(chains: Mapping[Cell, list[StageTask]]) -> dict[Cell, list[StageTask]]:
    """The chains, each stage that belongs to one variant alone called by it."""
    owners = Counter(task.key for chain in chains.values() for task in chain)

    def titled(task: StageTask, cell: Cell) -> StageTask:
        if owners[task.key] > 1:
            return task
        return replace(task, title=f"{VERBS.get(task.stage, task.stage)} {cell.words}")

    return {cell: [titled(task, cell) for task in chain] for cell, chain in chains.items()}


# ---------------------------------------------------------------------------------------------------------------------
# what is known and measured of a variant


def _about(study: Study, variant: Variant) -> dict[str, Any]:
    """What a variant is before anything runs; CfrbenchError if it cannot be."""
    config, tuning, crop = study.config, study.settings.tuning, study.crop
    model: FoundationModel = study.make("model", config.model_name)
    tuner: FineTuner = study.make("tune", config.tune)
    strategy: ConcatStrategy = study.make("concat", config.concat)
    check_fit(tuner, model)
    on_canvases = tuner.takes == "canvas"
    if on_canvases and (side := strategy.input_side(crop, model.input_size)) != model.input_size:
        model.resized(side)
    layout = strategy.plan(crop, tuning.canvas, overflow=tuning.overflow) if on_canvases else None
    seen = slices_per_step(strategy, crop, tuning) if on_canvases else crop[2]
    steps = tuning.steps if tuner.trains else 0
    return {
        "label": variant.label,
        "concat": config.concat,
        "tune": config.tune,
        "scale": variant.scale,
        "steps": steps,
        "slices_seen": round(steps * tuning.accumulate * tuning.batch_size * seen),
        "canvases_per_crop": layout.count if layout else None,
        "slices_per_canvas": round(contents(strategy, layout).slices, 4) if layout else None,
    }


#: stage -> what its summary says of a variant, under the name it has in the facts
MEASURED = {
    "tune": ("parameters", "trainable_parameters", "tokens", "seconds_per_step", "peak_mib", "labelled_dice"),
    "pseudo": ("canvases_per_volume", "seconds_per_volume"),
}


def _measured(home: Store, chains: Sequence[Sequence[StageTask]]) -> dict[str, float | None]:
    """Means over seeds of what the finished stages of one variant measured; None where nothing was."""
    found: dict[str, list[float]] = {name: [] for names in MEASURED.values() for name in names}
    for task in (task for chain in chains for task in chain if task.stage in MEASURED):
        artifact = home.find(task.stage, task.key)
        summary = artifact.manifest["summary"] if artifact else {}
        for name in MEASURED[task.stage]:
            if summary.get(name) is not None:
                found[name].append(summary[name])
    return {name: fmean(values) if values else None for name, values in found.items()}

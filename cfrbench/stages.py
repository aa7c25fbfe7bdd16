"""Runs one stage from its recipe: locks its key, reads what it stands on, does the work, completes the artifact."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import pipeline, registry
from cfrbench.artifact import FAILED, LENGTH, Draft
from cfrbench.checkpoint import Checkpointer, Stop, graceful_stop
from cfrbench.compute import start
from cfrbench.config import Settings, canonical
from cfrbench.contracts import FoundationModel, SSLMethod, StageTask
from cfrbench.errors import Interrupted, StoreError, WeightsError
from cfrbench.formats import read_labels, read_metadata, read_tensors, write_labels, write_table, write_tensors
from cfrbench.gauges import Laps, counted_inputs, sizes
from cfrbench.headroom import lean_if_needed
from cfrbench.pipeline import Bench
from cfrbench.recipes import SCORES, STORED, WEIGHTS, WORKING, Recipe, check_fit, check_patch
from cfrbench.store import Store
from cfrbench.tuning import Labeller

if TYPE_CHECKING:
    from torch import nn

#: how often a stage looks whether its run was cancelled
CANCEL_SECONDS = 2.0

# Benches hold decoded volumes; one process keeps them for all its stages, by content of the data and by settings.
_BENCHES: dict[tuple[str, str], Bench] = {}


@dataclass(frozen=True)
class StageWork:
    """Runs any stage of a store; can be pickled and sent to another process."""

    store: Path
    data_root: Path | None
    checkpoint_seconds: float = 20.0
    observers: tuple[str, ...] = field(default=())
    content: str = ""  # hash of the data set's files: after they have changed, nothing of them is taken from memory
    run: str = ""  # name of the run it works for: `cfrbench cancel` stops it

    def __call__(self, task: StageTask) -> None:
        """Make sure the artifact of ``task`` exists; a second process waits for the first instead of working."""
        store = Store(self.store)
        hook, began = registry.WATCHERS.hook, time.monotonic()
        mark = store.cancel_mark(self.run) if self.run else None
        with graceful_stop() as stop, _heeding(mark, stop), registry.watching(self.observers):
            waited = False

            def waiting() -> None:
                nonlocal waited
                if not waited:
                    hook.stage_waiting(task=task)
                waited = True
                if stop.requested:
                    raise stop.interrupted("while another process computed the stage")

            artifact = store.ensure(task, lambda draft: self._work(store, task, draft), waiting)
            hook.stage_finished(task=task, seconds=time.monotonic() - began, values=artifact.manifest["summary"])

    def _work(self, store: Store, task: StageTask, draft: Draft) -> None:
        draft.log.write("stage_started", stage=task.stage, title=task.title)
        try:
            draft.summary.update(STAGES[task.stage](Run(self, store, task, draft)))
        except Interrupted:
            raise
        except Exception as error:
            with suppress(StoreError):  # the disk may be what failed
                draft.log.write(FAILED, error=str(error), kind=type(error).__name__)
            raise
        draft.log.write("stage_finished")


@contextmanager
def _heeding(mark: Path | None, stop: Stop) -> Iterator[None]:
    """Within the block a file ``mark`` wishes for a stop; Interrupted if it is there already."""
    if mark is None:
        yield
        return
    if mark.exists():
        raise Interrupted(f"{mark.stem} was cancelled. Give its command again to go on.")
    if threading.current_thread() is not threading.main_thread():  # no signal reaches its loops
        yield
        return
    left = threading.Event()

    def watch() -> None:
        while not left.wait(CANCEL_SECONDS):
            if mark.exists():
                # No signal: others who see the mark may send one too, and a second signal is an order.
                stop.ask("cfrbench cancel")
                return

    threading.Thread(target=watch, name="cancel", daemon=True).start()
    try:
        yield
    finally:
        left.set()


@dataclass(frozen=True)
class Run:
    """One stage in progress."""

    work: StageWork
    store: Store
    task: StageTask
    draft: Draft

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What the stage is made of."""
        return self.task.recipe

    def started(self, total: int) -> None:
        """Tell observers how many steps or cases to expect."""
        self.draft.log.write(LENGTH, total=total)
        registry.WATCHERS.hook.stage_started(task=self.task, folder=str(self.draft.folder), total_steps=total)

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step and tell observers."""
        self.draft.log.write("step", step=step, **values)
        registry.WATCHERS.hook.step_done(task=self.task, step=step, values=values)

    def checkpoints(self) -> Checkpointer:
        """Checkpoints in the persistent folder of this key."""
        return Checkpointer(self.draft.folder, self.work.checkpoint_seconds, self.draft.log)

    def upstream(self, link: Mapping[str, str]) -> Upstream:
        """The artifact a recipe's ``{"stage", "key"}`` points to; StoreError if it has gone."""
        artifact = self.store.find(link["stage"], link["key"])
        if artifact is None:
            raise StoreError(f"The {link['stage']} artifact {link['key'][:12]} that '{self.task.title}' needs has gone "
                             f"from {self.work.store}. Run the command again: it is made anew.")  # fmt: skip
        return Upstream(artifact.manifest["recipe"], artifact.path)

    def bench(self, *recipes: Mapping[str, Any]) -> Bench:
        """Data and settings of this stage laid over those it stands on."""
        merged: dict[str, Any] = {}
        for recipe in (*recipes, self.recipe):
            for name, section in recipe.get("settings", {}).items():
                merged[name] = merged.get(name, {}) | section
        settings = Settings.model_validate(merged)
        data = self.recipe["data"]
        content = self.work.content
        bench_key = content, canonical([data, merged, str(self.work.data_root)])
        if bench_key not in _BENCHES:
            source = make("data", data, self.work.data_root)
            bench = Bench.of(source, settings)
            for (held, _), other in _BENCHES.items():  # the same volumes on the same grid are decoded once
                if held == content and other.settings.grid == settings.grid and type(other.source) is type(source) \
                        and other.source.config == source.config and other.source.root == source.root:  # fmt: skip
                    bench.library.share(other.library)
            _BENCHES[bench_key] = bench
        bench = _BENCHES[bench_key]
        start(bench.settings.compute)
        return bench


@dataclass(frozen=True)
class Upstream:
    """A finished stage: its recipe and its files."""

    recipe: Mapping[str, Any]
    path: Callable[[str], Path]


def make(kind: str, plugin: Mapping[str, Any], *arguments: Any) -> Any:
    """An instance of a plug-in from its recipe entry."""
    cls = registry.load(kind, plugin["name"])
    return cls(cls.Config.model_validate(plugin["options"]), *arguments)


def ids(cases: list[list[str]]) -> list[str]:
    """Case ids of ``[[id, fingerprint], ...]``."""
    return [case for case, _ in cases]


def run_tune(run: Run) -> Mapping[str, Any]:
    """Fine-tune; keep what the fine-tuner exports."""
    recipe, bench = run.recipe, run.bench()
    tuner, foundation = make("tune", recipe["tune"]), make("model", recipe["model"])
    check_fit(tuner, foundation)
    run.started(bench.settings.tuning.steps)
    laps = Laps()

    def on_step(step: int, values: Mapping[str, float]) -> None:
        laps.lap()
        run.on_step(step, values)

    def fine_tune(model: FoundationModel) -> Labeller:
        return pipeline.fine_tune(
            bench, ids(recipe["labelled"]), make("concat", recipe["concat"]), model, tuner, recipe["seed"],
            checkpoints=run.checkpoints(), on_step=on_step,
        )  # fmt: skip

    # Blocks computed twice give the same bits; smaller batches of canvases or windows round differently.
    labeller = lean_if_needed(
        fine_tune, foundation, foundation.recomputing(), lambda why: run.draft.log.write("recomputing", reason=why)
    )
    tensors = tuner.export(labeller.network.model)
    write_tensors(run.draft.path(WEIGHTS), tensors, {"recipe": recipe})
    exported = sum(t.numel() for t in tensors.values())
    summary = sizes(labeller.network.model) | {
        "trained_parameters": exported, "seconds_per_step": laps.typical, "peak_mib": bench.compute.peak_mib()
    }  # fmt: skip
    if not tuner.trains:
        summary["labelled_dice"] = pipeline.prompted_dice(bench, labeller, ids(recipe["labelled"]))
    return summary


def tuned_labeller(run: Run, link: Mapping[str, str]) -> tuple[Labeller, Bench]:
    """The fine-tuned foundation model of a finished tune stage, merged and in evaluation mode."""
    upstream = run.upstream(link)
    bench = run.bench(upstream.recipe)
    return _restored(upstream.path(WEIGHTS), upstream.recipe, bench), bench


def open_tuned(weights: Path) -> Labeller:
    """The fine-tuned model in one file that `run_tune` wrote, wherever it lies now, ready to label crops.

    The file says what else it needs: plug-ins with their versions and options, the foundation model's weights by their
    hash. WeightsError if one of them is another here.
    """
    recipe = read_metadata(weights).get("recipe", {})
    if "tune" not in recipe:
        raise WeightsError(f"{weights} does not say what it was made of, so it is no fine-tuned model of this program. "
                           "Give the weights.safetensors of a stage 'tune'.")  # fmt: skip
    for kind in ("tune", "model", "concat"):
        name, needed = recipe[kind]["name"], recipe[kind]["version"]
        if (here := registry.version(kind, name)) != needed:
            raise WeightsError(f"{weights} was made with {kind}.{name} of {needed}, but {here} is installed. Install "
                               "that version to open it, or fine-tune again.")  # fmt: skip
    if make("model", recipe["model"]).identity() != recipe["model"]["identity"]:
        raise WeightsError(f"{weights} belongs to other weights of {recipe['model']['name']} than are installed here. "
                           f"Name those with SHA-256 {recipe['model']['identity']}.")  # fmt: skip
    bench = Bench.of(make("data", recipe["data"]), Settings.model_validate(recipe["settings"]))
    return _restored(weights, recipe, bench)


def _restored(weights: Path, recipe: Mapping[str, Any], bench: Bench) -> Labeller:
    """The model of a tune recipe with exported tensors put in, merged and in evaluation mode."""
    tuner, concat = make("tune", recipe["tune"]), make("concat", recipe["concat"])
    labeller, _ = pipeline.adapted(bench, concat, make("model", recipe["model"]), tuner, recipe["seed"])
    model = labeller.network.model
    tuner.restore(model, read_tensors(weights))
    tuner.merge(model)
    labeller.network.eval()
    return labeller


def run_pseudo(run: Run) -> Mapping[str, Any]:
    """Label the unlabelled volumes, one file each so that a kill loses at most one case."""
    labeller, bench = tuned_labeller(run, run.recipe["from"])
    cases = ids(run.recipe["unlabelled"])
    run.started(len(cases))

    laps = Laps()

    def label(case: str) -> dict[str, Any]:
        bench.library.image(case)  # reading it is not labelling it
        with laps.timed():
            found = pipeline.pseudo_label(bench, labeller, [case])
        return {"working": found.working[case], "stored": found.stored[case]}

    with counted_inputs(labeller.network) as batches:
        found = _case_by_case(run, cases, label)
    write_labels(run.draft.path(WORKING), {case: masks["working"] for case, masks in found.items()})
    write_labels(run.draft.path(STORED), {case: masks["stored"] for case, masks in found.items()})
    # Cases that an earlier attempt has labelled were neither timed nor counted here.
    canvases = sum(batches) / len(laps.seconds) if laps.seconds else None
    return {"cases": len(cases), "seconds_per_volume": laps.typical, "canvases_per_volume": canvases}


def _case_by_case(run: Run, cases: list[str], work: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    with graceful_stop() as stop:
        for number, case in enumerate(cases):
            file = run.draft.folder / f"case-{number:05d}.npz"
            if file.exists():
                found[case] = read_labels(file)
            else:
                found[case] = work(case)
                temporary = file.with_suffix(".tmp")
                write_labels(temporary, found[case])
                temporary.replace(file)  # a killed attempt leaves whole files or none
            run.on_step(number + 1, {})
            if stop.requested:
                raise stop.interrupted(f"after case {number + 1} of {len(cases)}")
    return found


def run_train(run: Run) -> Mapping[str, Any]:
    """Train one method; keep the network that is tested."""
    recipe, bench = run.recipe, run.bench()
    pseudo: Any = None
    if "guidance" in recipe:
        guidance = recipe["guidance"]
        section = bench.settings.training.model_copy(
            update={k: guidance[k] for k in ("guidance_weight", "guidance_schedule")}
        )
        bench = Bench(bench.source, bench.settings.model_copy(update={"training": section}), bench.compute,
                      bench.library)  # fmt: skip
        pseudo = _guide(run, guidance)
    run.started(bench.settings.training.steps)
    method = pipeline.retrain(
        bench, lambda: new_method(recipe, bench), ids(recipe["labelled"]), ids(recipe["unlabelled"]), pseudo,
        recipe["seed"], checkpoints=run.checkpoints(), on_step=run.on_step,
    )  # fmt: skip
    network = method.predictor()
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_tensors(run.draft.path(WEIGHTS), state, {"recipe": recipe})
    cases = [*ids(recipe["labelled"]), *ids(recipe["unlabelled"])]
    return {"parameters": sum(p.numel() for p in network.parameters()), "padded": smaller_than_crop(bench, cases)}


def smaller_than_crop(bench: Bench, cases: Sequence[str]) -> int:
    """How many volumes have a side shorter than the crop's, so that they are padded, as the field does."""
    crop = bench.settings.training.patch
    return sum(
        any(side < length for side, length in zip(bench.library.image(c).shape, crop, strict=True)) for c in cases
    )


def _guide(run: Run, guidance: Mapping[str, Any]) -> Any:
    if guidance["stage"] == "tune":
        return tuned_labeller(run, guidance)[0]
    return read_labels(run.upstream(guidance).path(WORKING))


def new_method(recipe: Mapping[str, Any], bench: Bench) -> SSLMethod:
    """The SSL method of a train recipe, freshly initialised."""
    segmenter = make("net", recipe["net"])
    check_patch(segmenter, bench.settings.training.patch, bench.settings.compute.precision)
    cls = registry.load("ssl", recipe["ssl"]["name"])
    config = cls.Config.model_validate(recipe["ssl"]["options"])
    classes = bench.source.num_classes
    method: SSLMethod = cls(lambda: segmenter.build(1, classes), classes, config)
    return method


def trained_network(recipe: Mapping[str, Any], weights: Path, bench: Bench) -> nn.Module:
    """The tested network of a finished train stage."""
    network = new_method(recipe, bench).predictor()
    network.load_state_dict(read_tensors(weights))
    return bench.compute.place(network)


def run_predict(run: Run) -> Mapping[str, Any]:
    """Predict whole test volumes."""
    upstream = run.upstream(run.recipe["from"])
    bench = run.bench(upstream.recipe)
    network = trained_network(upstream.recipe, upstream.path(WEIGHTS), bench)
    cases = ids(run.recipe["test"])
    run.started(len(cases))
    found = _case_by_case(run, cases, lambda case: pipeline.predict(bench, network, [case]))
    write_labels(run.draft.path(STORED), {case: masks[case] for case, masks in found.items()})
    return {"cases": len(cases), "padded": smaller_than_crop(bench, cases)}


def run_score(run: Run) -> Mapping[str, Any]:
    """Score label maps against the stored truth; the only stage that opens the labels of unlabelled cases."""
    import pandas as pd

    bench = run.bench()
    bare = bench.source.without_label()  # nothing can be said of their pseudo-labels
    found = read_labels(run.upstream(run.recipe["from"]).path(STORED))
    masks = {case: mask for case, mask in found.items() if case not in bare}
    run.started(len(masks))
    rows: list[Recipe] = []
    for number, (case, mask) in enumerate(masks.items()):
        rows += pipeline.score(bench, {case: mask})
        run.on_step(number + 1, {"dice": rows[-1]["dice"]})
    frame = pd.DataFrame(rows)
    write_table(run.draft.path(SCORES), frame)
    return {"dice": float(frame["dice"].mean())}


STAGES: dict[str, Callable[[Run], Mapping[str, Any]]] = {
    "tune": run_tune,
    "pseudo": run_pseudo,
    "train": run_train,
    "predict": run_predict,
    "score": run_score,
}

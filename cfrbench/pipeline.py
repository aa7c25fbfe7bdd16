"""The paper on one screen: concatenate and fine-tune, pseudo-label, re-train, predict, score.

Everything here takes objects, not names, and returns values; `cfrbench.stages` gives them keys and a store.

    bench = Bench.of(source, settings)
    labeller = fine_tune(bench, labelled, grid, foundation, lora, seed)
    pseudo = pseudo_label(bench, labeller, unlabelled)
    method = retrain(bench, make_method, labelled, unlabelled, pseudo.working, seed)
    cases = score(bench, predict(bench, method.predictor(), test))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from cfrbench import schedules
from cfrbench.checkpoint import Checkpointer
from cfrbench.compute import HALF, Compute, seed_torch, start
from cfrbench.config import ScoringSection, Settings, Triple
from cfrbench.contracts import ConcatStrategy, DataSource, FineTuner, FoundationModel, SSLMethod
from cfrbench.folding import folded
from cfrbench.headroom import labelling_advice, memory_advice, prediction_advice, training_advice, tuning_advice
from cfrbench.inference import predict_probabilities
from cfrbench.lean import halve_frozen
from cfrbench.losses import class_map
from cfrbench.metrics import Scores, largest_component, score_case, score_case_medpy
from cfrbench.prepare import Library, to_stored
from cfrbench.retraining import CropLabeller, RetrainingTrainee
from cfrbench.slices import WholeSlices
from cfrbench.training import Schedule, StepObserver, adamw, fit, sgd
from cfrbench.tuning import CanvasSegmenter, Labeller, TuningTrainee
from cfrbench.windows import cover, cut, mean

CaseObserver = Callable[[str], None]
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """What all stages share: the data, the settings, the machine."""

    source: DataSource
    settings: Settings
    compute: Compute
    library: Library

    @classmethod
    def of(cls, source: DataSource, settings: Settings) -> Bench:
        """Set up the process for ``settings``; volumes are read when they are first needed."""
        return cls(source, settings, start(settings.compute), Library(source, settings.grid))

    @property
    def tuning_patch(self) -> Triple:
        """The crop that is laid out on one canvas."""
        return self.settings.tuning.patch or self.settings.training.patch


def fine_tune(
    bench: Bench,
    labelled: Sequence[str],
    concat: ConcatStrategy,
    foundation: FoundationModel,
    tuner: FineTuner,
    seed: int,
    *,
    checkpoints: Checkpointer | None = None,
    on_step: StepObserver | None = None,
) -> Labeller:
    """Step 1: fine-tune ``foundation`` on canvases of the labelled volumes; the result labels crops."""
    section = bench.settings.tuning
    labeller, parameters = adapted(bench, concat, foundation, tuner, seed)
    cases = [bench.library.labelled(case) for case in labelled]
    rotflip = bench.settings.training.rotflip if section.rotflip is None else section.rotflip
    trainee = TuningTrainee(labeller, parameters, tuner, cases, bench.tuning_patch, rotflip, seed)

    def rate(step: int, total: int) -> float:
        return schedules.learning_rate("finetune", section.lr, step, total, warmup_steps=section.warmup_steps,
                                       power=section.poly_power)  # fmt: skip

    if tuner.trains:
        optimiser = adamw(parameters, section.lr, section.weight_decay)
        schedule = Schedule(section.steps, rate, parts=section.accumulate)
        _halve_frozen(bench, tuner, labeller)
        with memory_advice(lambda: tuning_advice(bench.settings, foundation.name, foundation.config)):
            fit(trainee, schedule, optimiser, seed=seed, checkpoints=checkpoints, on_step=on_step)
    return labeller


def _halve_frozen(bench: Bench, tuner: FineTuner, labeller: Labeller) -> None:
    """In half precision, hold the frozen weights of the image encoder in it, but none that is exported."""
    if dtype := HALF.get(bench.compute.precision):
        model = labeller.network.model
        exported = {name.removeprefix("image_encoder.").rpartition(".")[0] for name in tuner.export(model)}
        halve_frozen(model.image_encoder, dtype, keep=exported)


def adapted(
    bench: Bench, concat: ConcatStrategy, foundation: FoundationModel, tuner: FineTuner, seed: int
) -> tuple[Labeller, list[nn.Parameter]]:
    """The foundation model with fresh injections, and what of it trains."""
    together = tuner.takes != "canvas"
    concat = WholeSlices() if together else concat
    side = concat.input_side(bench.tuning_patch, foundation.input_size)
    if side != foundation.input_size:
        foundation = foundation.resized(side)
    seed_torch(seed, "tuning-init")
    model = tuner.build(foundation, bench.source.num_classes)
    parameters = tuner.adapt(model)
    network = CanvasSegmenter(model, foundation.input_size).to(bench.compute.device)
    return Labeller(network, foundation, concat, bench.settings.tuning, bench.compute, together), parameters


def prompted_dice(bench: Bench, labeller: Labeller, cases: Sequence[str]) -> float:
    """Mean Dice (percent) over cases and classes where prompts come from the cases' own labels: what SAM can do.

    Whole volumes on the working grid, cut into boxes of the tuning patch that overlap by half.
    """
    labeller.network.eval()
    scores = []
    for case in map(bench.library.labelled, cases):
        assert case.label is not None
        windows = cover(case.shape, bench.tuning_patch, 0.5)
        pairs = zip(cut(case.image, windows), cut(case.label, windows), strict=True)
        boxes = [labeller(image[None, None], label[None]).softmax(1)[0] for image, label in pairs]
        found = class_map(mean(torch.stack(boxes, dim=1), windows).unsqueeze(0))[0]
        for c in range(1, bench.source.num_classes):
            both, sizes = (found == c) & (case.label == c), (found == c).sum() + (case.label == c).sum()
            scores.append(100.0 * float(2 * both.sum() / sizes.clamp(min=1)))
    return fmean(scores)


@dataclass(frozen=True)
class PseudoLabels:
    """Hard labels by case: on the ``working`` grid for re-training, on the ``stored`` grid for scoring."""

    working: Masks
    stored: Masks


def pseudo_label(
    bench: Bench, labeller: Labeller, cases: Sequence[str], on_case: CaseObserver | None = None
) -> PseudoLabels:
    """Step 2, mode `volume`: label whole volumes once, averaging the probabilities of overlapping crops."""
    patch, fraction = bench.tuning_patch, bench.settings.pseudo.stride_fraction
    stride_xy = max(1, round(min(patch[:2]) * fraction))
    stride_z = max(1, round(patch[2] * fraction))
    labeller.network.eval()
    foundation = labeller.foundation
    result = PseudoLabels({}, {})
    for case in cases:
        image = bench.library.image(case)
        with memory_advice(lambda: labelling_advice(bench.settings, foundation.name, foundation.config)):
            probabilities = predict_probabilities(labeller, image, patch, stride_xy, stride_z, bench.source.num_classes)
        result.working[case] = to_stored(probabilities, _sides(image))
        result.stored[case] = to_stored(probabilities, bench.library[case].stored_shape)
        if on_case:
            on_case(case)
    return result


MethodFactory = Callable[[], SSLMethod]


def retrain(
    bench: Bench,
    make_method: MethodFactory,
    labelled: Sequence[str],
    unlabelled: Sequence[str],
    pseudo: Mapping[str, Tensor] | CropLabeller | None,
    seed: int,
    *,
    checkpoints: Checkpointer | None = None,
    on_step: StepObserver | None = None,
) -> SSLMethod:
    """Step 3: train an SSL method; with ``pseudo`` it is the CFR twin of the same method without."""
    section = bench.settings.training
    seed_torch(seed, "training-init")
    method = make_method()
    method.fit_to(section.patch)
    bench.compute.place(method)
    trainee = RetrainingTrainee(
        method,
        [bench.library.labelled(case) for case in labelled],
        {case: bench.library.image(case) for case in unlabelled},
        pseudo,
        section,
        bench.compute,
        seed,
        lambda network, image: probabilities_of(bench, network, image),
        bench.source.class_names,
    )

    def rate(step: int, total: int) -> float:
        return schedules.learning_rate(section.lr_policy, section.lr, step, total)

    parameters = trainee.parameters()
    optimiser = (
        sgd(parameters, section.lr, section.momentum, section.weight_decay)
        if section.optimiser == "sgd"
        else adamw(parameters, section.lr, section.weight_decay)
    )
    schedule = Schedule(section.steps, rate, method.phases())
    with memory_advice(lambda: training_advice(bench.settings)):
        fit(trainee, schedule, optimiser, seed=seed, checkpoints=checkpoints, on_step=on_step)
    return method


def predict(bench: Bench, network: nn.Module, cases: Sequence[str], on_case: CaseObserver | None = None) -> Masks:
    """Slide the network over whole volumes; uint8 label maps on the stored grid."""
    network = for_prediction(bench.compute, network)
    result = {}
    for case in cases:
        probabilities = probabilities_of(bench, network, bench.library.image(case))
        result[case] = to_stored(probabilities, bench.library[case].stored_shape)
        if on_case:
            on_case(case)
    return result


def for_prediction(compute: Compute, network: nn.Module) -> nn.Module:
    """The network, or in single precision on a CPU a copy of it with the same scores that takes less time.

    In half precision folding gains 2 to 8 % on windows of 112 x 112 x 80, and rounds otherwise: Dice of an LA volume
    moved by 0.05 and 0.07 instead of 0.01.
    """
    single = compute.device.type == "cpu" and compute.precision not in HALF
    return folded(network) if single else network


@torch.inference_mode()
def probabilities_of(bench: Bench, network: nn.Module, image: Tensor) -> Tensor:
    """Averaged softmax ``(C, h, w, d)`` of one working-grid image ``(h, w, d)``."""
    settings, compute = bench.settings, bench.compute
    network.eval()

    def forward(crops: Tensor) -> Tensor:
        with compute.autocast():
            logits: Tensor = network(compute.batch(crops))
        return logits

    stride = settings.inference
    with memory_advice(lambda: prediction_advice(settings)):
        return predict_probabilities(
            forward, image, settings.training.patch, stride.stride_xy, stride.stride_z, bench.source.num_classes
        )


def score(bench: Bench, predictions: Mapping[str, Tensor], on_case: CaseObserver | None = None) -> list[dict[str, Any]]:
    """Compare label maps with the stored truth: one row per case and class, by the protocol of the settings."""
    rows: list[dict[str, Any]] = []
    for case, prediction in predictions.items():
        truth = bench.library.truth(case)
        rows += score_mask(case, prediction.numpy(), truth.label.numpy(), truth.spacing_mm, bench.source.class_names,
                           bench.settings.scoring)  # fmt: skip
        if on_case:
            on_case(case)
    return rows


def score_mask(
    case: str, mask: Any, truth: Any, spacing_mm: tuple[float, float, float], class_names: Sequence[str],
    section: ScoringSection,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one case, one per class: a label map ``(H, W, D)`` against the truth on the same grid, both uint8."""
    compare = {"native": score_case, "medpy": score_case_medpy}[section.backend]
    if section.postprocess == "largest-component":
        mask = _largest_components(mask, len(class_names))
    spacing = spacing_mm if section.unit == "mm" else (1.0, 1.0, 1.0)
    found = compare(mask, truth, len(class_names), spacing, section.empty)
    return [_row(case, class_names[c], scores) for c, scores in found.items()]


def _largest_components(mask: Any, num_classes: int) -> Any:
    """Each class reduced to its largest connected component."""
    kept = mask * 0
    for c in range(1, num_classes):
        kept[largest_component(mask == c)] = c
    return kept


def _row(case: str, class_name: str, scores: Scores) -> dict[str, Any]:
    return {"case": case, "class": class_name, "dice": scores.dice, "jaccard": scores.jaccard, "asd": scores.asd,
            "hd95": scores.hd95, "empty": scores.empty}  # fmt: skip


def _sides(image: Tensor) -> Triple:
    height, width, depth = image.shape
    return height, width, depth

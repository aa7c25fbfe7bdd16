"""ACMT by its four criteria, CPCL, and confident learning, against what the official statements gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench.confident_learning import Pruning, calibrated_joint, confident_joint, confident_thresholds, label_issues
from cfrbench.contracts import SSLMethod
from cfrbench.losses import class_map, entropy_map, one_hot
from cfrbench.prototypes import (
    class_prototypes,
    cosine_similarity,
    nearest_prototype,
    rectified_labels,
    spread,
    squared_distances,
)
from cfrbench.schedules import threshold_rampup
from cfrbench.uncertainty import deviation_and_features, mean_probability
from tests.golden.ssl_cases import (
    CASES,
    OFFICIAL,
    Stored,
    StoredBackbone,
    StoredInTurn,
    batch_of,
    book,
    cases_of,
    close,
    gradients_close,
    map_close,
    method,
    progress_at,
    progress_of,
    ramp_total,
    take,
    total,
)

PRUNING: dict[str, Pruning] = {"both": "both", "prune_by_class": "class", "prune_by_noise_rate": "noise-rate"}


class Passes(StoredBackbone):
    """Call k returns the k-th of several logits, and a map at half the sides with it."""

    def __init__(self, logits: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        super().__init__(logits[0])
        self.out_conv = StoredInTurn(logits)
        self.features = nn.ParameterList(features)
        self.calls = 0

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        first, _, *rest = super().decode(features)
        self.calls += 1
        return [first, self.features[min(self.calls, len(self.features)) - 1], *rest]


class ThenInTurn(Stored):
    """Returns stored logits at the first call, the next of several others at each later one."""

    def __init__(self, logits: Tensor, later: Sequence[Tensor]) -> None:
        super().__init__(logits)
        self.later = StoredInTurn(later)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(image) if self.calls == 1 else self.later(image)


def threshold_progress(case: str, group: str, start: float, stop: float, factor: float) -> Any:
    """The progress whose threshold, ramped from ``start`` to ``stop``, is that of the file."""
    key = f"{case}.{group}"
    step = int(take(f"{key}.iter_num" if book.has(f"{key}.iter_num") else f"{case}.base.iter_num"))
    threshold = float(take(f"{key}.threshold")) / factor
    length = ramp_total(step, threshold, start, stop)
    assert threshold_rampup(step, length, start, stop) == pytest.approx(threshold, rel=1e-6)
    return progress_at(step, length)


def totals_close(acmt: SSLMethod, output: Any, case: str, group: str, *, weight: float) -> None:
    """Supervised loss, weight, unweighted consistency, total and gradient, as far as the file holds them."""
    key = f"{case}.{group}"
    consistency = sum(loss for name, loss in output.losses.items() if name != "supervised")
    shared = f"{case}.{group.split('.')[0]}"
    close(output.losses["supervised"], f"{shared}.supervised_loss")
    if book.has(f"{key}.consistency_weight"):
        close(weight, f"{key}.consistency_weight")
    close(consistency / weight, f"{key}.consistency_loss")
    close(total(output), f"{key}.loss")
    if book.has(f"{key}.grad_student_logits"):
        student: Any = acmt.predictor()
        gradients_close(output, {f"{key}.grad_student_logits": getattr(student, "out_conv", student)})


@pytest.mark.parametrize(("case", "group"), cases_of("acmt_mu"))
def test_acmt_by_uncertainty(case: str, group: str) -> None:
    batch, mc_logits = batch_of(case), take(f"{case}.{group}.student_mc_logits")
    passes, _, classes = mc_logits.shape[:3]
    pairs = [mc_logits[i : i + 2].flatten(0, 1) for i in range(0, passes, 2)]
    student = ThenInTurn(take(f"{case}.acmt.student_logits"), pairs)
    options = {"criterion": "uncertainty", "passes": passes, **OFFICIAL}
    acmt: Any = method("acmt", classes, student, take(f"{case}.acmt.teacher_logits_noisy"), **options)
    progress = threshold_progress(case, group, 0.75, 0.9, math.log(classes))
    output = acmt.step(batch, progress)
    assert torch.equal(output.masks["consistency"], take(f"{case}.{group}.mask").bool())
    mean = mean_probability(StoredInTurn(pairs), batch.image[batch.labelled :], passes)
    map_close(entropy_map(mean, normalised=False), f"{case}.{group}.uncertainty")
    totals_close(acmt, output, case, group, weight=acmt.config.weight(progress))


@pytest.mark.parametrize(("case", "group"), cases_of("acmt_perr"))
def test_acmt_by_prototype(case: str, group: str) -> None:
    key, batch, progress = f"{case}.{group}", batch_of(case), progress_of(case)
    mc_logits, mc_features = take(f"{key}.mc_logits"), take(f"{key}.mc_features")
    passes, _, classes = mc_logits.shape[:3]
    clean = take(f"{case}.acmt.teacher_logits_clean")
    target = take(f"{case}.acmt.teacher_logits_noisy")
    teacher = Passes([target, clean, *mc_logits], [mc_features[0]] * 2 + list(mc_features))
    student = StoredBackbone(take(f"{case}.acmt.student_logits"))
    options = {"criterion": "prototype", "prototype_passes": passes, "entropy_term": "literal", **OFFICIAL}
    acmt: Any = method("acmt", classes, student, teacher, **options)
    output = acmt.step(batch, progress)
    assert torch.equal(output.masks["consistency"], take(f"{key}.noisy_mask"))
    assert torch.equal(~output.masks["consistency"], take(f"{key}.clean_mask").bool())
    weight = acmt.config.weight(progress)
    close(output.losses["entropy"] / weight, f"{key}.masked_entropy_term")
    totals_close(acmt, output, case, group, weight=weight)

    again = iter(zip(mc_logits, mc_features, strict=True))
    deviation, features = deviation_and_features(lambda image: next(again), target, passes)
    map_close(deviation, f"{key}.uncertainty_map")
    certain = take(f"{key}.certain_mask").bool()
    assert torch.equal(deviation < acmt.config.certain_below, certain)
    labels = rectified_labels(clean.softmax(dim=1), deviation, acmt.config.certain_below)
    assert torch.equal(labels.long(), take(f"{key}.rect_ema_output_onehot"))
    features = spread(features, clean.shape[2:])
    prototypes = class_prototypes(features, one_hot(labels, classes) * clean.softmax(dim=1))
    distances = squared_distances(features, prototypes)
    for c, word in enumerate(("bg", "obj")):
        map_close(prototypes[:, c], f"{key}.{word}_prototype")
        map_close(distances[:, c : c + 1], f"{key}.distance_f_{word}")
    assert torch.equal(nearest_prototype(distances), take(f"{key}.selection_mask").bool())


@pytest.mark.parametrize(("case", "group"), cases_of(*(f"acmt_serr.{pruning}" for pruning in PRUNING)))
def test_acmt_by_confident_learning(case: str, group: str) -> None:
    student, clean = take(f"{case}.acmt.student_logits"), take(f"{case}.acmt_serr.teacher_logits_clean")
    pruning = PRUNING[group.split(".")[1]]
    teacher = StoredInTurn([take(f"{case}.acmt.teacher_logits_noisy"), clean])
    options = {"criterion": "confident-learning", "pruning": pruning, **OFFICIAL}
    acmt: Any = method("acmt", student.shape[1], student, teacher, **options)
    batch, progress = batch_of(case), progress_of(case)
    output = acmt.step(batch, progress)
    expected = take(f"{case}.{group}.mask").bool()
    assert torch.equal(output.masks["consistency"].expand_as(expected), expected)
    found = label_issues(class_map(student[batch.labelled :]), clean.softmax(dim=1), pruning)
    assert torch.equal(found, expected[:, 0])
    totals_close(acmt, output, case, group, weight=acmt.config.weight(progress))


def test_confident_learning() -> None:
    labels, probabilities = take("cl.labels").long(), take("cl.pred_probs")
    thresholds = confident_thresholds(labels, probabilities.T)
    torch.testing.assert_close(thresholds.float(), take("cl.thresholds").float(), rtol=1e-5, atol=1e-6)
    joint = calibrated_joint(confident_joint(labels, probabilities.T), labels)
    assert torch.equal(joint, take("cl.confident_joint").long())
    assert book.keys("cl.mask_")
    for key in book.keys("cl.mask_"):
        pruning = PRUNING[key.removeprefix("cl.mask_")]
        assert torch.equal(label_issues(labels, probabilities, pruning), take(key)), key


class WithFeatures(StoredBackbone):
    """Stored logits, and stored features that a gradient reaches, at half the sides."""

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        super().__init__(logits)
        self.features = nn.Parameter(features.clone())

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        first, _, *rest = super().decode(features)
        return [first, self.features, *rest]


def cpcl_of(case: str, form: str) -> tuple[Any, WithFeatures]:
    """CPCL as the official loop ran it, and its student."""
    known = batch_of(case).labelled
    logits, teacher = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")[known:]
    student = WithFeatures(logits, take(f"{case}.cpcl.student_features"))
    features = take(f"{case}.cpcl.teacher_features_unlabeled")
    passes = Passes([take(f"{case}.cpcl.teacher_logits_stability"), teacher], [features, features])
    return method("cpcl", logits.shape[1], student, passes, form=form, **OFFICIAL), student


@pytest.mark.parametrize(("case", "group"), cases_of("cpcl"))
def test_cpcl(case: str, group: str) -> None:
    key, batch, progress = f"{case}.{group}", batch_of(case), progress_of(case)
    cpcl, student = cpcl_of(case, "loop")
    output = cpcl.step(batch, progress)
    weight, strong = cpcl.config.weight(progress), cpcl.config.weight(progress) * cpcl.config.prototype_weight
    close(weight, f"{key}.consistency_weight")
    close(strong, f"{key}.protoalign_weight")
    close(output.losses["supervised"], f"{key}.supervised_loss")
    close(output.losses["stability"] / weight, f"{key}.MT_stability_loss")
    close(output.losses["unlabelled-prototypes"] / strong, f"{key}.U2L_loss")
    assert ("labelled-prototypes" in output.losses) == bool(take(f"{key}.L2U_has_grad"))
    close(total(output) + weight * float(take(f"{key}.L2U_consistency_loss")), f"{key}.loss")
    gradients_close(output, {f"{key}.grad_student_logits": student.out_conv})
    expected = take(f"{key}.grad_student_features")
    assert student.features.grad is not None
    assert (student.features.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("case", "group"), cases_of("cpcl"))
def test_cpcl_as_released_trains_no_feature(case: str, group: str) -> None:
    cpcl, student = cpcl_of(case, "released")
    output = cpcl.step(batch_of(case), progress_of(case))
    gradients_close(output, {f"{case}.{group}.grad_student_logits": student.out_conv})
    assert student.features.grad is None


@pytest.mark.parametrize(("case", "group"), cases_of("cpcl"))
def test_prototypes_of_cpcl(case: str, group: str) -> None:
    key, batch = f"{case}.{group}", batch_of(case)
    known, sides = batch.labelled, batch.image.shape[2:]
    ours, theirs = take(f"{case}.base.student_logits")[:known], take(f"{case}.base.teacher_logits")[known:]
    classes = ours.shape[1]
    labelled = spread(take(f"{key}.student_features")[:known], sides)
    unlabelled = spread(take(f"{key}.teacher_features_unlabeled"), sides)
    of_labelled = class_prototypes(labelled, one_hot(batch.label, classes) * ours.softmax(dim=1))
    of_unlabelled = class_prototypes(unlabelled, one_hot(class_map(theirs), classes) * theirs.softmax(dim=1))
    map_close(of_labelled.transpose(0, 1), f"{key}.label_prototypes")
    map_close(of_unlabelled.transpose(0, 1), f"{key}.unlabel_prototypes")
    forward = (20.0 * cosine_similarity(unlabelled, of_labelled)).softmax(dim=1)
    backward = (20.0 * cosine_similarity(labelled, of_unlabelled)).softmax(dim=1)
    map_close(forward, f"{key}.labeltounlabel_pred")
    map_close(backward, f"{key}.unlabeltolabel_pred")
    close((forward - theirs.softmax(dim=1)).square().mean(), f"{key}.L2U_consistency_loss")


def test_every_case_has_cpcl() -> None:
    assert [case for case, _ in cases_of("cpcl")] == CASES

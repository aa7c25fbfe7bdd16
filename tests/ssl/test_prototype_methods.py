"""ACMT by its four criteria and CPCL: which passes they make, and their losses against plain spellings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.confident_learning import label_issues
from cfrbench.contracts import Batch, Progress
from cfrbench.errors import ConfigError, UsageError
from cfrbench.losses import ce_dice, class_map, entropy_map, softmax_mse
from cfrbench.prototypes import spread
from cfrbench.schedules import threshold_rampup
from tests.ssl.spy import SIDES, C, L, U, crops, halfway, make

FULL = {"consistency": 1.0, "ramp_length": 0, "noise_std": 0.0}
CLASSES = [2, 5, 14]


@pytest.fixture
def batch() -> Batch:
    return crops()


def contrary_teacher(method: Any) -> None:
    """Let the teacher be sure of other classes than the student; mere hesitation is no label issue."""
    method.teacher.net.conv.load_state_dict(method.student.conv.state_dict())
    method.teacher.net.conv.weight.data.mul_(-0.5)


def flat(maps: Tensor) -> Tensor:
    """``(B, C, ...)`` as ``(B, C, voxels)`` in double precision."""
    return maps.detach().double().flatten(2)


def acmt(criterion: str, num_classes: int = C, **options: Any) -> Any:
    method = make("acmt", num_classes, criterion=criterion, **{**FULL, **options})
    method.student.conv.weight.data.mul_(4.0)  # from unsure to sure
    return method


# ---------------------------------------------------------------------------------------------------------------------
# ACMT


@pytest.mark.parametrize(("criterion", "student", "teacher"), [
    ("entropy", [L + U], [U]), ("uncertainty", [L + U, 2 * U, 2 * U], [U]),
    ("prototype", [L + U], [U] * 5), ("confident-learning", [L + U], [U, U]),
])  # fmt: skip
def test_passes_of_each_criterion(batch: Batch, criterion: str, student: list[int], teacher: list[int]) -> None:
    method = acmt(criterion, passes=4, prototype_passes=3, noise_std=0.1)
    method.step(batch, halfway())
    assert [len(image) for image, _, _ in method.student.calls] == student
    assert [len(image) for image, _, _ in method.teacher.net.calls] == teacher
    assert all(training for _, training, _ in method.student.calls + method.teacher.net.calls)
    assert [grad for _, _, grad in method.student.calls] == [True] + [False] * (len(student) - 1)
    assert not any(grad for _, _, grad in method.teacher.net.calls)
    target, *clean = [image for image, _, _ in method.teacher.net.calls]
    assert not torch.equal(target, batch.image[L:]), "the target is that of noisy crops"
    assert all(torch.equal(image, batch.image[L:]) for image in clean)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("step", [0, 150])
def test_by_uncertainty(num_classes: int, step: int) -> None:
    batch, method = crops(num_classes), acmt("uncertainty", num_classes)
    output = method.step(batch, Progress(step, 200))
    logits = method.student.conv(batch.image[L:])
    # Without noise and dropout every pass is alike; the threshold is that of an entropy in nats.
    least = threshold_rampup(step, 200, 0.75, 0.9) * math.log(num_classes)
    mask = entropy_map(logits.softmax(1), normalised=False) >= least
    assert torch.equal(output.masks["consistency"], mask)
    assert 0 < int(mask.sum()) < mask.numel()
    distance = softmax_mse(logits, method.teacher.net.conv(batch.image[L:]))
    # The sum over the classes, not their mean, as the official mask has one channel.
    torch.testing.assert_close(output.losses["consistency"], (distance.sum(1, keepdim=True) * mask).sum() / mask.sum())


def plain_prototype_labels(logits: Tensor, features: Tensor) -> list[list[int]]:
    """Each voxel's nearest prototype, voxel by voxel; every class is certain, so labels are those of ``logits``."""
    answer = []
    for p, f in zip(flat(logits.softmax(1)), flat(features), strict=True):
        classes, labels = p.shape[0], p.argmax(0)
        prototypes = []
        for c in range(classes):
            weight = p[c] * (labels == c)
            prototypes.append((f * weight).sum(1) / (weight.sum() + 1e-5))
        distances = torch.stack([((f - q[:, None]) ** 2).sum(0) for q in prototypes])
        answer.append(distances.argmin(0).tolist())
    return answer


@pytest.mark.parametrize("num_classes", CLASSES)
def test_by_prototype(num_classes: int) -> None:
    batch, method = crops(num_classes), acmt("prototype", num_classes, entropy_term="none")
    image = batch.image[L:]
    student, teacher = method.student.conv(image), method.teacher.net.conv(image)
    features = spread(F.avg_pool3d(image, 2), SIDES)
    output = method.step(batch, halfway())
    expected = torch.tensor(plain_prototype_labels(teacher, features)).view(U, *SIDES)
    own, mask = student.argmax(1), output.masks["consistency"]
    nearest = torch.stack([expected == c for c in range(num_classes)], dim=1)
    told = torch.stack([own == c for c in range(num_classes)], dim=1)
    # A tie, as between two classes that the crop lacks, names no class; the plain spelling names the first.
    untied = (mask ^ told).any(dim=1, keepdim=True)
    assert untied.any()
    assert torch.equal(mask & untied, (nearest ^ told) & untied)
    assert mask.any()
    assert not mask.all()
    distance = softmax_mse(student, teacher)
    torch.testing.assert_close(output.losses["consistency"], distance[mask].mean())
    assert "entropy" not in output.losses


def test_by_prototype_uncertain_classes_are_not_labels(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no certain class every voxel is background: the other prototypes are zero vectors."""
    method = acmt("prototype", certain_below=0.0)
    labels = []
    monkeypatch.setattr("cfrbench_ssl.acmt.one_hot", lambda target, classes: labels.append(target) or F.one_hot(
        target.long(), classes).movedim(-1, 1).bool())  # fmt: skip
    method.step(batch, halfway())
    assert not labels[0].any()


@pytest.mark.parametrize("form", ["aligned", "literal"])
def test_the_entropy_of_the_other_voxels_is_a_loss_by_prototype(form: str) -> None:
    batch = crops(unlabelled=2)
    method = acmt("prototype", entropy_term=form)
    output = method.step(batch, halfway())
    p, clean = method.student.conv(batch.image[L:]).softmax(1), ~output.masks["consistency"]
    entropy = -(p * (p + 1e-6).log2()).sum(1)
    total = torch.zeros(())
    for crop in range(2):
        for c in range(C):
            total = total + (clean[crop, c] * entropy[crop if form == "aligned" else c]).sum()
    torch.testing.assert_close(output.losses["entropy"], total / clean.numel())
    assert ("entropy" in output.masks) == (form == "aligned")


def test_the_literal_entropy_term_needs_as_many_crops_as_classes(batch: Batch) -> None:
    with pytest.raises(UsageError, match=r"entropy_term=aligned"):
        acmt("prototype", entropy_term="literal").step(batch, halfway())


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("pruning", ["both", "class", "noise-rate"])
def test_by_confident_learning(num_classes: int, pruning: Any) -> None:
    batch, method = crops(num_classes), acmt("confident-learning", num_classes, pruning=pruning)
    contrary_teacher(method)
    output = method.step(batch, halfway())
    student, teacher = method.student.conv(batch.image[L:]), method.teacher.net.conv(batch.image[L:])
    mask = label_issues(class_map(student), teacher.softmax(1), pruning)
    assert torch.equal(output.masks["consistency"], mask[:, None])
    assert 0 < int(mask.sum()) < mask.numel()
    distance = softmax_mse(student, teacher).movedim(1, -1)[mask].mean()
    torch.testing.assert_close(output.losses["consistency"], distance)


def test_confident_learning_of_one_class_is_mean_teacher(batch: Batch) -> None:
    method = acmt("confident-learning")
    method.student.conv.bias.data.copy_(torch.tensor([100.0, -100.0]))
    output = method.step(batch, halfway())
    assert output.masks["consistency"].all()
    distance = softmax_mse(output.guided[0], method.teacher.net.conv(batch.image[L:]))
    torch.testing.assert_close(output.losses["consistency"], distance.mean())


@pytest.mark.parametrize(("criterion", "stop"), [("entropy", 0.95), ("uncertainty", 0.9)])
def test_thresholds_are_those_of_the_criterion(criterion: str, stop: float) -> None:
    method = acmt(criterion)
    assert method._threshold(Progress(0, 100)) == pytest.approx(0.75 + (stop - 0.75) * math.exp(-5))
    assert method._threshold(Progress(100, 100)) == pytest.approx(stop)
    falling = acmt(criterion, threshold_stop=0.6)
    assert falling._threshold(Progress(100, 100)) == pytest.approx(0.6)


def test_other_criteria_take_any_network_and_prototypes_one_with_levels() -> None:
    plugin, plain = registry.load("ssl", "acmt"), torch.nn.Conv3d
    assert plugin(lambda: plain(1, 2, 1), 2, plugin.Config(criterion="confident-learning"))
    with pytest.raises(ConfigError, match=r"'acmt'.*Backbone"):
        plugin(lambda: plain(1, 2, 1), 2, plugin.Config(criterion="prototype"))


# ---------------------------------------------------------------------------------------------------------------------
# CPCL


def cpcl(num_classes: int = C, **options: Any) -> Any:
    return make("cpcl", num_classes, **{**FULL, **options})


def plain_scores(features: Tensor, source: Tensor, labels: Tensor, p: Tensor) -> Tensor:
    """20 cosines, crop by crop and voxel by voxel, with prototypes of ``source`` where ``labels`` say."""
    answer = []
    for f, g, y, q in zip(flat(features), flat(source), labels.flatten(1), flat(p), strict=True):
        scores = []
        for c in range(q.shape[0]):
            weight = q[c] * (y == c)
            prototype = (g * weight).sum(1) / (weight.sum() + 1e-5)
            scores.append(F.cosine_similarity(f, prototype[:, None].expand_as(f), dim=0))
        answer.append(20.0 * torch.stack(scores))
    return torch.stack(answer)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize(("target", "plain"), [("teacher", False), ("student", True)])
def test_cpcl_is_its_formula(num_classes: int, target: str, plain: bool) -> None:
    batch = crops(num_classes, labelled=2, unlabelled=2)
    method = cpcl(num_classes, target=target, plain_cross_entropy=plain)
    output = method.step(batch, halfway())
    student, teacher = method.student.conv(batch.image), method.teacher.net.conv(batch.image)
    features = spread(F.avg_pool3d(batch.image, 2), SIDES)
    labelled, unlabelled = features[:2], features[2:]
    torch.testing.assert_close(output.losses["supervised"], ce_dice(student[:2], batch.label))
    torch.testing.assert_close(output.losses["stability"], (student - teacher).square().mean())
    forward = plain_scores(unlabelled, labelled, batch.label.long(), student[:2].softmax(1)).softmax(1)
    match = (teacher if target == "teacher" else student)[2:].softmax(1)
    expected = (forward - flat(match)).square().mean()
    torch.testing.assert_close(output.losses["labelled-prototypes"].double(), expected, rtol=1e-4, atol=1e-6)
    backward = plain_scores(labelled, unlabelled, teacher[2:].argmax(1), teacher[2:].softmax(1))
    expected = 10.0 * F.cross_entropy(backward if plain else backward.softmax(1), batch.label.flatten(1).long())
    torch.testing.assert_close(output.losses["unlabelled-prototypes"].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("form", "names", "passes"), [
    ("described", {"labelled-prototypes", "unlabelled-prototypes"}, 2),
    ("loop", {"unlabelled-prototypes"}, 2),
    ("released", set(), 1),
])  # fmt: skip
def test_forms_of_cpcl(batch: Batch, form: str, names: set[str], passes: int) -> None:
    method = cpcl(form=form)
    output = method.step(batch, halfway())
    assert output.losses.keys() == {"supervised", "stability"} | names
    assert len(method.student.calls) == 1
    assert [len(image) for image, _, _ in method.teacher.net.calls] == [L + U, U][:passes]


def test_cpcl_goes_through_the_shorter_half_again(batch: Batch) -> None:
    """With equal crops in the shorter half it does not matter which of them is met."""
    short = Batch(torch.cat([batch.image[:1], batch.image[L:]]), batch.label[:1])
    doubled = Batch(torch.cat([batch.image[:1]] * U + [batch.image[L:]]), torch.cat([batch.label[:1]] * U))
    one, many = (cpcl().step(shown, halfway()).losses["labelled-prototypes"] for shown in (short, doubled))
    torch.testing.assert_close(one, many)


def test_cpcl_needs_two_levels() -> None:
    net, plugin = registry.load("net", "vnet"), registry.load("ssl", "cpcl")
    with pytest.raises(ConfigError, match=r"'cpcl'.*net\.vnet\.depth"):
        plugin(lambda: net(net.Config(width=2, depth=1)).build(1, 2), 2, plugin.Config())

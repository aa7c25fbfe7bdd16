"""Self-training, FixMatch and entropy minimisation: what they show their network, and what they learn from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cfrbench.contracts import Batch, Progress
from cfrbench.losses import ce_dice, class_map
from cfrbench.volume import IGNORE
from tests.ssl.spy import SIDES, C, L, U, crops, halfway, make


@pytest.fixture
def batch() -> Batch:
    return crops()


def own_map(seed: int = 5, classes: int = C) -> Tensor:
    return torch.randint(classes, (U, *SIDES), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# self-training


def test_self_training_is_supervised_first(batch: Batch) -> None:
    method = make("self-training")
    assert [phase.name for phase in method.phases()] == ["supervised", "round 1", "round 2"]
    assert method.labeller(halfway(phase=0)) is None
    output = method.step(batch, halfway(phase=0))
    assert output.losses.keys() == {"supervised"}
    assert output.guided[0].shape[0] == U
    assert method.snapshot.calls == []


def test_self_training_learns_the_labels_of_whole_volumes(batch: Batch) -> None:
    method = make("self-training", weight=0.5)
    output = method.step(replace(batch, own=own_map()), halfway(phase=1))
    expected = 0.5 * ce_dice(method.student.conv(batch.image[L:]), own_map())
    torch.testing.assert_close(output.losses["self-training"], expected)
    assert method.snapshot.calls == [], "whole volumes were labelled before"


def test_the_snapshot_is_taken_as_a_round_begins_and_only_then() -> None:
    method = make("self-training")
    assert method.labeller(halfway(phase=1, phase_step=0)) is method.snapshot
    taken = method.snapshot.conv.weight.clone()
    assert torch.equal(taken, method.student.conv.weight)
    with torch.no_grad():
        method.student.conv.weight.neg_()
    assert method.labeller(halfway(phase=1, phase_step=1)) is method.snapshot
    assert torch.equal(method.snapshot.conv.weight, taken)
    method.labeller(halfway(phase=2, phase_step=0))
    assert torch.equal(method.snapshot.conv.weight, method.student.conv.weight)


def test_self_training_on_crops_asks_the_frozen_snapshot(batch: Batch) -> None:
    method = make("self-training", labels="crop", weight=0.5)
    assert method.labeller(halfway(phase=1, phase_step=0)) is None
    with torch.no_grad():
        method.student.conv.weight.neg_()
    output = method.step(batch, halfway(phase=1, phase_step=1))
    ((shown, training, grad),) = method.snapshot.calls
    assert torch.equal(shown, batch.image[L:])
    assert not training
    assert not grad
    own = class_map(method.snapshot.conv(batch.image[L:]))
    expected = 0.5 * ce_dice(method.student.conv(batch.image[L:]), own)
    torch.testing.assert_close(output.losses["self-training"], expected)


def test_a_fresher_snapshot_comes_every_so_many_steps() -> None:
    method = make("self-training", labels="crop", refresh_steps=3)
    fresh = []
    for step in range(7):
        with torch.no_grad():
            method.student.conv.weight.add_(1.0)
        method.after_update(halfway(phase=1, phase_step=step))
        fresh.append(bool(torch.equal(method.snapshot.conv.weight, method.student.conv.weight)))
    assert fresh == [False, False, True, False, False, True, False]


def test_a_round_may_start_from_scratch() -> None:
    method = make("self-training", start="scratch")
    learnt = method.student.conv.weight.clone()
    torch.manual_seed(1)
    method.labeller(halfway(phase=1, phase_step=0))
    assert torch.equal(method.snapshot.conv.weight, learnt)
    assert not torch.equal(method.student.conv.weight, learnt)


def test_voxels_below_the_threshold_teach_nothing(batch: Batch) -> None:
    method = make("self-training", threshold=0.9)
    sure = torch.tensor([[0.95, 0.05], [0.2, 0.8], [0.05, 0.95]]).view(3, 2, 1, 1, 1)
    assert method.own_labels(sure).flatten().tolist() == [0, IGNORE, 1]
    own = own_map()
    own[:, :2] = IGNORE
    output = method.step(replace(batch, own=own), halfway(phase=1))
    (grad,) = torch.autograd.grad(output.losses["self-training"], output.guided[0])
    assert not grad[:, :, :2].any()
    assert grad[:, :, 2:].any()
    torch.testing.assert_close(
        output.losses["self-training"], ce_dice(method.student.conv(batch.image[L:])[:, :, 2:], own[:, 2:])
    )


def test_the_weight_may_rise_within_a_round(batch: Batch) -> None:
    method, plain = make("self-training", ramp=0.5), make("self-training")
    shown = replace(batch, own=own_map())
    for step, factor in ((0, math.exp(-5)), (25, math.exp(-1.25)), (50, 1.0), (99, 1.0)):
        ratio = [m.step(shown, halfway(1, step)).losses["self-training"].item() for m in (method, plain)]
        assert ratio[0] / ratio[1] == pytest.approx(factor, rel=1e-5)


def test_self_training_has_as_many_rounds_as_asked_for() -> None:
    assert len(make("self-training", rounds=5).phases()) == 6


# ---------------------------------------------------------------------------------------------------------------------
# FixMatch


def test_fixmatch_shows_labelled_crops_weak_views_and_strong_views_at_once(batch: Batch) -> None:
    method = make("fixmatch")
    method.step(batch, halfway())
    ((shown, training, grad),) = method.net.calls
    assert torch.equal(shown[: L + U], batch.image)
    assert shown.shape == (L + 2 * U, 1, *SIDES)
    assert training
    assert grad
    assert not torch.isclose(shown[L + U :], batch.image[L:]).any(dim=(1, 2, 3, 4)).all()


@pytest.mark.parametrize("num_classes", [2, 5, 14])
def test_fixmatch_is_its_formula(num_classes: int) -> None:
    batch = crops(num_classes)
    threshold = 0.35 if num_classes > 2 else 0.7
    method = make("fixmatch", num_classes, weight=2.0, threshold=threshold)
    method.net.conv.weight.data.mul_(4.0)
    output = method.step(batch, halfway())
    weak = method.net.conv(batch.image[L:]).movedim(1, -1).reshape(-1, num_classes).double()
    strong = method.net.conv(method.net.calls[0][0][L + U :]).movedim(1, -1).reshape(-1, num_classes).double()
    terms = []
    for one, other in zip(weak, strong, strict=True):
        best, label = one.softmax(0).max(0)
        sure = best.item() >= threshold
        terms.append(-other.log_softmax(0)[label] if sure else other.sum() * 0.0)
    torch.testing.assert_close(output.losses["pseudo-label"].double(), 2.0 * torch.stack(terms).mean(), rtol=1e-5,
                               atol=1e-7)  # fmt: skip
    mask = output.masks["pseudo-label"]
    assert 0 < int(mask.sum()) < mask.numel()
    (grad,) = torch.autograd.grad(output.losses["pseudo-label"], output.guided[0], allow_unused=True)
    assert grad is None or not grad.any(), "labels are constants"


def test_fixmatch_with_dice_counts_the_confident_voxels_only(batch: Batch) -> None:
    method = make("fixmatch", loss="ce_dice", threshold=0.7)
    method.net.conv.weight.data.mul_(4.0)
    output = method.step(batch, halfway())
    strong, mask = method.net.conv(method.net.calls[0][0][L + U :]), output.masks["pseudo-label"][:, 0]
    own = class_map(output.guided[0])
    flat = strong.movedim(1, -1)[mask].T[None]
    torch.testing.assert_close(output.losses["pseudo-label"], ce_dice(flat, own[mask][None]))


def test_fixmatch_learns_nothing_from_voxels_of_which_none_is_sure(batch: Batch) -> None:
    output = make("fixmatch", threshold=1.0).step(batch, halfway())
    assert output.losses["pseudo-label"].item() == 0.0
    assert not output.masks["pseudo-label"].any()


def test_fixmatch_without_strength_and_boxes_shows_the_same_crop_twice(batch: Batch) -> None:
    method = make("fixmatch", strength=0.0, boxes=0)
    method.step(batch, halfway())
    shown = method.net.calls[0][0]
    torch.testing.assert_close(shown[L + U :], shown[L : L + U])


# ---------------------------------------------------------------------------------------------------------------------
# entropy minimisation


@pytest.mark.parametrize(("which", "first"), [("unlabelled", L), ("all", 0)])
@pytest.mark.parametrize("num_classes", [2, 14])
def test_entropy_minimisation_is_its_formula(which: str, first: int, num_classes: int) -> None:
    batch = crops(num_classes)
    method: Any = make("entropy-min", num_classes, crops=which, consistency=3.0, ramp_length=0)
    output = method.step(batch, Progress(0, 10))
    p = method.net.conv(batch.image[first:]).double().softmax(1)
    expected = 3.0 * -(p * p.log()).sum(1).mean() / math.log(num_classes)
    torch.testing.assert_close(output.losses["entropy"].double(), expected, rtol=1e-4, atol=1e-6)
    assert output.guided[0].shape[0] == U

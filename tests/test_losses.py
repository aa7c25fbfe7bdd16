"""Losses against plain formulas, and the laws that the golden numbers cannot show."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cfrbench import losses
from cfrbench.volume import IGNORE


def logits_and_target(classes: int, seed: int = 0, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    logits = 3.0 * torch.randn(2, classes, 5, 4, 3)
    target = torch.randint(0, classes, (2, 5, 4, 3), dtype=torch.uint8)
    return logits, target.masked_fill(torch.rand(target.shape) < ignored, IGNORE)


def plain_ce_dice(logits: Tensor, target: Tensor, smooth: float) -> Tensor:
    """The officials' way: int64 labels, one float mask a class."""
    probabilities = logits.softmax(1)
    terms = []
    for name in range(logits.shape[1]):
        score, mask = probabilities[:, name], (target == name).to(logits.dtype)
        sizes = (score**2).sum() + (mask**2).sum()
        terms.append(1 - (2 * (score * mask).sum() + smooth) / (sizes + smooth))
    return 0.5 * (F.cross_entropy(logits, target.long(), ignore_index=IGNORE) + sum(terms) / len(terms))


@pytest.mark.parametrize("classes", [2, 3, 14])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("smooth", [1e-5, 1e-10])
def test_ce_dice_and_its_gradient_equal_the_plain_way(classes: int, ignored: float, smooth: float) -> None:
    logits, target = logits_and_target(classes, ignored=ignored)
    logits = logits.double().requires_grad_()
    ours, plain = losses.ce_dice(logits, target, smooth=smooth), plain_ce_dice(logits, target, smooth)
    torch.testing.assert_close(ours, plain)
    ours_gradient, plain_gradient = (torch.autograd.grad(loss, logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(ours_gradient, plain_gradient)


def test_ce_dice_is_half_the_sum_of_its_parts() -> None:
    logits, target = logits_and_target(3, ignored=0.2)
    parts = losses.cross_entropy(logits, target) + losses.dice_loss(logits.softmax(1), target)
    torch.testing.assert_close(losses.ce_dice(logits, target), 0.5 * parts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_of_target_gives_the_same(dtype: torch.dtype) -> None:
    logits, target = logits_and_target(3, ignored=0.2)
    for loss in (losses.cross_entropy, losses.ce_dice, losses.ce_foreground_dice):
        assert torch.equal(loss(logits, target.to(dtype)), loss(logits, target))


def test_canvases_have_the_same_losses_as_volumes() -> None:
    logits, target = logits_and_target(3)
    flat = losses.ce_dice(logits.flatten(3), target.flatten(2))
    torch.testing.assert_close(flat, losses.ce_dice(logits, target))


def test_half_precision_is_widened_before_the_softmax() -> None:
    logits, target = logits_and_target(2)
    rough = logits.bfloat16()
    for loss in (losses.cross_entropy, losses.ce_dice, losses.ce_foreground_dice):
        assert loss(rough, target).dtype == torch.float32
        assert torch.equal(loss(rough, target), loss(rough.float(), target))
    assert losses.softmax_mse(rough, rough).dtype == torch.float32


def test_where_everything_is_ignored_cross_entropy_is_0_and_teaches_nothing() -> None:
    logits, target = logits_and_target(2)
    logits.requires_grad_()
    loss = losses.cross_entropy(logits, torch.full_like(target, IGNORE))
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert math.isfinite(float(losses.ce_dice(logits, torch.full_like(target, IGNORE)).detach()))


def test_without_an_ignored_label_255_is_an_error() -> None:
    logits, target = logits_and_target(2)
    with pytest.raises(IndexError):
        losses.cross_entropy(logits, torch.full_like(target, IGNORE), ignore=None)


def test_padding_does_not_move_cross_entropy_but_moves_dice() -> None:
    logits, target = logits_and_target(2)
    more_logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
    more_target = torch.cat([target, torch.full_like(target, IGNORE)], dim=-1)
    torch.testing.assert_close(losses.cross_entropy(more_logits, more_target), losses.cross_entropy(logits, target))
    padded = losses.dice_loss(more_logits.softmax(1), more_target)
    assert float(padded) > float(losses.dice_loss(logits.softmax(1), target)) + 0.01


@given(st.integers(2, 5), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_dice_losses_lie_between_0_for_truth_and_1(classes: int, seed: int) -> None:
    logits, target = logits_and_target(classes, seed)
    truth = F.one_hot(target.long(), classes).movedim(-1, 1).float()
    assert float(losses.dice_loss(truth, target)) == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < float(losses.dice_loss(logits.softmax(1), target)) < 1.0
    assert float(losses.foreground_dice_loss(truth[:, 1], target == 1)) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.linear_dice_loss(truth[:, 1], target == 1)) == pytest.approx(0.0, abs=1e-6)


def test_class_weights_are_divided_by_the_number_of_classes() -> None:
    logits, target = logits_and_target(3)
    probabilities = logits.softmax(1)
    once = losses.dice_loss(probabilities, target)
    torch.testing.assert_close(losses.dice_loss(probabilities, target, weights=[2.0, 2.0, 2.0]), 2.0 * once)


def test_consistency_losses_vanish_between_equals() -> None:
    logits, _ = logits_and_target(3)
    for loss in (losses.softmax_mse, losses.softmax_kl, losses.sigmoid_mse):
        difference = loss(logits, logits)
        assert difference.shape == logits.shape
        assert not difference.any()
    for mean in (losses.softmax_kl_mean, losses.sigmoid_kl_mean, losses.symmetric_mse):
        assert float(mean(logits, logits)) == 0.0


def test_divergence_survives_extreme_logits() -> None:
    sure = torch.tensor([[200.0, -200.0]]).view(1, 2, 1, 1, 1)
    assert torch.isfinite(losses.softmax_kl(-sure, sure)).all()
    assert torch.isfinite(losses.sigmoid_kl_mean(-sure, sure))


def test_a_teacher_under_no_grad_gets_no_gradient_and_the_student_does() -> None:
    student, _ = logits_and_target(2, 0)
    teacher, _ = logits_and_target(2, 1)
    student.requires_grad_()
    loss = losses.softmax_mse(student, teacher).mean() + losses.softmax_dice(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().sum() > 0


def test_entropy_is_0_for_certainty_and_1_for_ignorance() -> None:
    shape = (1, 4, 2, 2, 2)
    ignorant = torch.full(shape, 0.25)
    certain = torch.zeros(shape)
    certain[:, 2] = 1.0
    assert losses.entropy_map(ignorant).shape == (1, 1, 2, 2, 2)
    torch.testing.assert_close(losses.entropy_map(ignorant), torch.ones(1, 1, 2, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.entropy_map(certain), torch.zeros(1, 1, 2, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.entropy_map(ignorant, False), math.log(4) * losses.entropy_map(ignorant))


@given(st.integers(1, 6), st.integers(0, 1000), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_class_map_is_argmax(classes: int, seed: int, ties: bool, channels_last: bool) -> None:
    logits = torch.randn(2, classes, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    if ties:
        logits = logits.round()
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    result = losses.class_map(logits)
    assert result.dtype == torch.uint8
    assert torch.equal(result.long(), first_largest(logits))


def first_largest(logits: Tensor) -> Tensor:
    # torch.argmax promises no order among ties
    is_largest = logits == logits.amax(1, keepdim=True)
    return is_largest.int().cumsum(1).eq(0).sum(1)


def test_class_map_agrees_with_torch_argmax_without_ties() -> None:
    logits, _ = logits_and_target(14)
    assert torch.equal(losses.class_map(logits).long(), logits.argmax(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_masked_mean_counts_the_values_under_the_mask(channels: int) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 4, 5, generator=draw)
    mask = torch.rand(2, channels, 4, 5, generator=draw) > 0.5
    expected = values[mask.expand_as(values)].mean()
    torch.testing.assert_close(losses.masked_mean(values, mask), expected)
    torch.testing.assert_close(losses.masked_mean(values, mask.float()), expected)
    assert losses.masked_mean(values, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("classes", [2, 5])
def test_a_confident_class_map_leaves_out_what_is_below_the_threshold(classes: int) -> None:
    probabilities = torch.randn(2, classes, 5, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    found = losses.confident_class_map(probabilities, 0.5)
    best = probabilities.amax(dim=1)
    assert torch.equal(found == 255, best < 0.5)
    assert torch.equal(found[best >= 0.5], losses.class_map(probabilities)[best >= 0.5])
    assert torch.equal(losses.confident_class_map(probabilities, 0.0), losses.class_map(probabilities))


def test_losses_of_labelled_voxels_only_do_not_see_the_others() -> None:
    logits = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.randint(3, (2, 6, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    target[:, 3:] = 255
    loss = losses.ce_dice(logits, target, only_labelled=True)
    torch.testing.assert_close(loss, losses.ce_dice(logits[:, :, :3], target[:, :3]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[:, :, 3:].any()
    complete = target.clamp(max=2)
    assert torch.equal(losses.ce_dice(logits, complete, only_labelled=True), losses.ce_dice(logits, complete))


def test_one_hot_knows_no_class_of_an_ignored_voxel() -> None:
    found = losses.one_hot(torch.tensor([[0, 2, 255]], dtype=torch.uint8), 3)
    assert found.tolist() == [[[True, False, False], [False, False, False], [False, True, False]]]

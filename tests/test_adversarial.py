"""Adversarial directions beat random ones, and the passes that seek them leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench.adversarial import adversarial_direction, frozen_statistics, unit
from cfrbench.losses import linear_dice_loss, soft_dice_loss


def network(classes: int) -> Any:
    return nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Tanh(), nn.Conv3d(6, classes, 1),
                         nn.Softmax(dim=1))  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 1, 5), (2, 2, 4, 3), (4, 1, 3, 4, 5)])
def test_unit_vectors_of_each_sample(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    for given, made in zip(values, unit(values), strict=True):
        torch.testing.assert_close(made, given / given.norm())
    assert float(unit(torch.zeros(shape)).abs().max()) == 0.0


@pytest.mark.parametrize("distance", [linear_dice_loss, soft_dice_loss])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_adversarial_direction_moves_the_prediction_more_than_random_ones(distance: Any, classes: int) -> None:
    torch.manual_seed(classes)
    predict, image = network(classes).double(), torch.randn(2, 1, 6, 6, 4, dtype=torch.float64)
    predict[-2].weight.data.mul_(10.0)  # from unsure to sure
    with torch.no_grad():
        clean = predict(image)

    def gap(direction: Tensor) -> float:
        return float(distance(predict(image + 2.0 * direction), clean).detach())

    worst = adversarial_direction(predict, image, clean, torch.rand_like(image) - 0.5, distance, reach=2.0)
    torch.testing.assert_close(worst.flatten(1).norm(dim=1), torch.ones(2).double(), rtol=0, atol=1e-3)
    assert gap(worst) > max(gap(unit(torch.randn_like(image))) for _ in range(30))
    assert all(weight.grad is None for weight in predict.parameters())


def test_statistics_stand_still_but_the_batch_is_used() -> None:
    norm = nn.BatchNorm3d(2)
    image = 3.0 + 2.0 * torch.randn(4, 2, 3, 3, 3)
    with frozen_statistics(norm):
        inside = norm(image)
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert torch.equal(norm.running_mean, torch.zeros(2))  # type: ignore[arg-type]
    torch.testing.assert_close(inside, norm(image))
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_layers_that_track_nothing_stay_so_and_flags_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm3d(2), nn.BatchNorm3d(2, track_running_stats=False), nn.InstanceNorm3d(2))
    with frozen_statistics(net):
        assert flags(net) == [False, False, False]
    assert flags(net) == [True, False, False]
    with pytest.raises(ZeroDivisionError), frozen_statistics(net):
        1 / 0  # noqa: B018
    assert flags(net) == [True, False, False]


def flags(net: Any) -> list[bool]:
    return [layer.track_running_stats for layer in net]


def test_soft_dice_is_its_formula() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 4, 5).softmax(1), torch.randn(2, 3, 4, 5).softmax(1)
    terms = [1 - (2 * (a * b).sum() + 0.5) / ((a * a).sum() + (b * b).sum() + 0.5)
             for a, b in zip(one.unbind(1), other.unbind(1), strict=True)]  # fmt: skip
    torch.testing.assert_close(soft_dice_loss(one, other, smooth=0.5), sum(terms) / 3)
    assert float(soft_dice_loss(one, one)) == pytest.approx(0.0, abs=1e-6)

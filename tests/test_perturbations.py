"""What disturbs images and features, and how unsure networks are measured, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfrbench.perturbations import bend_intensity, drop_most_active, empty_boxes, mix, scale_features
from cfrbench.uncertainty import deviation_and_features, mean_probability

SHAPES = [(2, 3, 4), (2, 3, 5, 4), (2, 3, 4, 3, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_mix_weighs_each_pair_by_its_own_share(shape: tuple[int, ...]) -> None:
    first, second = drawn(*shape), drawn(*shape, seed=1)
    share = torch.tensor([0.0, 0.25])
    mixed = mix(first, second, share)
    assert torch.equal(mixed[0], first[0])
    torch.testing.assert_close(mixed[1], 0.75 * first[1] + 0.25 * second[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_feature_noise_is_shared_by_the_batch(shape: tuple[int, ...]) -> None:
    features, noise = drawn(*shape), drawn(*shape[1:], seed=1)
    for before, after in zip(features, scale_features(features, noise), strict=True):
        torch.testing.assert_close(after, before + before * noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_most_active_voxels_of_each_crop_are_dropped(shape: tuple[int, ...]) -> None:
    features = drawn(*shape).abs()
    dropped = drop_most_active(features, 0.8)
    for before, after in zip(features.flatten(2), dropped.flatten(2), strict=True):
        means = before.mean(0)
        for voxel in range(before.shape[1]):
            kept = means[voxel] < 0.8 * means.max()
            assert torch.equal(after[:, voxel], before[:, voxel] if kept else torch.zeros(shape[1]))
        assert not after[:, means.argmax()].any()


def test_mean_probability_is_the_mean_over_passes_of_two() -> None:
    image, seen = drawn(3, 1, 4, 4, 2), []

    def network(batch: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        logits = torch.cat([batch, drawn(*batch.shape, seed=len(seen))], dim=1)
        seen.append(logits)
        return logits.to(torch.bfloat16)

    mean = mean_probability(network, image, 6)
    assert [tuple(logits.shape) for logits in seen] == [(6, 2, 4, 4, 2)] * 3
    halves = torch.stack([half for logits in seen for half in logits.to(torch.bfloat16).float().chunk(2)])
    torch.testing.assert_close(mean, halves.softmax(dim=2).mean(0))
    assert mean.dtype == torch.float32


def test_no_pass_is_no_mean() -> None:
    with pytest.raises(ValueError, match="even"):
        mean_probability(lambda batch: batch, drawn(1, 1, 2), 0)


def test_deviation_is_that_of_all_passes_at_once_and_features_their_mean() -> None:
    logits, features = drawn(7, 2, 3, 4, 4, 2), drawn(7, 2, 5, 2, 2, 1, seed=1)
    passes = iter(zip(logits.bfloat16(), features.bfloat16(), strict=True))
    deviation, mean = deviation_and_features(lambda image: next(passes), drawn(2, 1, 4, 4, 2), 7)
    torch.testing.assert_close(deviation, (logits.bfloat16().float() / 2).sigmoid().std(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, features.bfloat16().float().mean(dim=0))
    assert next(passes, None) is None


def test_intensities_are_bent_within_the_range_of_their_crop() -> None:
    image, one, zero = 3.0 * drawn(2, 1, 4, 4, 3), torch.ones(2), torch.zeros(2)
    torch.testing.assert_close(bend_intensity(image, one, one, zero), image)
    bent = bend_intensity(image, torch.tensor([0.5, 2.0]), one, zero)
    for before, after, lighter in zip(image.flatten(1), bent.flatten(1), (True, False), strict=True):
        assert torch.equal(before.argsort(), after.argsort())
        torch.testing.assert_close(torch.stack(after.aminmax()), torch.stack(before.aminmax()))
        assert bool((after >= before - 1e-5).all() if lighter else (after <= before + 1e-5).all())


def test_contrast_scales_around_the_mean_and_brightness_shifts_each_crop() -> None:
    image, one = drawn(2, 1, 4, 4, 3), torch.ones(2)
    changed = bend_intensity(image, one, torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0]))
    for before, after, scale, shift in zip(image, changed, (2.0, 0.5), (0.0, -1.0), strict=True):
        torch.testing.assert_close(after, before.mean() + scale * (before - before.mean()) + shift)
    assert torch.isfinite(bend_intensity(torch.ones(1, 1, 2, 2, 2), one[:1], one[:1], one[:1])).all()


@pytest.mark.parametrize(("sides", "side"), [((8, 8, 4), 0.5), ((9, 6, 5), 0.4), ((8, 8, 8), 1.0)])
def test_boxes_are_empty_and_as_large_as_asked_for(sides: tuple[int, ...], side: float) -> None:
    image = drawn(3, 1, *sides).abs() + 1.0
    corners = torch.rand(3, 1, 3, generator=torch.Generator().manual_seed(0))
    boxed = empty_boxes(image, corners, side)
    for before, after in zip(image[:, 0], boxed[:, 0], strict=True):
        hole = after == 0
        where = hole.nonzero()
        spans = (where.amax(0) - where.amin(0) + 1).tolist()
        assert spans == [round(side * length) for length in sides]
        assert int(hole.sum()) == spans[0] * spans[1] * spans[2]
        assert torch.equal(after[~hole], before[~hole])


def test_boxes_reach_both_ends_and_may_be_none_or_several() -> None:
    image = torch.ones(1, 1, 8, 8, 8)
    ends = torch.tensor([[[0.0, 0.0, 0.0], [0.9999, 0.9999, 0.9999]]])
    boxed = empty_boxes(image, ends, 0.25)[0, 0]
    assert not boxed[:2, :2, :2].any()
    assert not boxed[-2:, -2:, -2:].any()
    assert int((boxed == 0).sum()) == 16
    assert torch.equal(empty_boxes(image, torch.zeros(1, 0, 3), 0.25), image)

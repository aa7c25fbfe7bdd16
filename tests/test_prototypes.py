"""Prototypes against loops over voxels, and in half precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.losses import one_hot
from cfrbench.prototypes import (
    class_prototypes,
    cosine_similarity,
    nearest_prototype,
    rectified_labels,
    spread,
    squared_distances,
)

B, K, C, SIDES = 2, 5, 3, (4, 3, 2)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels without class 2 in the first crop, weights of their voxels."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(B, K, *SIDES, generator=draw)
    labels = torch.randint(C, (B, *SIDES), generator=draw).to(torch.uint8)
    labels[0][labels[0] == 2] = 0
    return features, labels, one_hot(labels, C) * torch.rand(B, C, *SIDES, generator=draw)


def voxels() -> list[tuple[int, int, int]]:
    return [(x, y, z) for x in range(SIDES[0]) for y in range(SIDES[1]) for z in range(SIDES[2])]


def test_prototypes_are_weighted_means_of_each_crop() -> None:
    features, _, weights = drawn()
    prototypes = class_prototypes(features, weights)
    for b in range(B):
        for c in range(C):
            total, mass = torch.zeros(K), 0.0
            for x, y, z in voxels():
                weight = float(weights[b, c, x, y, z])
                total, mass = total + weight * features[b, :, x, y, z], mass + weight
            torch.testing.assert_close(prototypes[b, c], total / (mass + 1e-5))
    assert not prototypes[0, 2].any()


def test_similarities_and_distances_voxel_by_voxel() -> None:
    features, _, weights = drawn()
    prototypes = class_prototypes(features, weights)
    cosines, distances = cosine_similarity(features, prototypes), squared_distances(features, prototypes)
    for b in range(B):
        for c in range(C):
            for x, y, z in voxels():
                feature = features[b, :, x, y, z]
                expected = F.cosine_similarity(feature, prototypes[b, c], dim=0)
                torch.testing.assert_close(cosines[b, c, x, y, z], expected, rtol=1e-5, atol=1e-6)
                square = (feature - prototypes[b, c]).square().sum()
                torch.testing.assert_close(distances[b, c, x, y, z], square, rtol=1e-5, atol=1e-5)


def test_gradients_exist_and_are_finite_where_features_vanish() -> None:
    features, _, weights = drawn()
    features[:, :, 0] = 0.0
    features.requires_grad_()
    cosine_similarity(features, class_prototypes(features, weights)).sum().backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()


def test_the_nearest_prototype_is_one_or_none() -> None:
    distances = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 0.0]])
    nearest = nearest_prototype(distances[..., None, None, None])[..., 0, 0, 0]
    assert nearest.tolist() == [[False, True, False], [False] * 3, [False] * 3, [False, False, True]]


def test_rectified_labels_leave_out_uncertain_classes() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])[..., None, None, None]
    uncertainty = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.5]])[..., None, None, None]
    assert rectified_labels(probabilities, uncertainty, 0.1).flatten().tolist() == [1, 0, 0]


def test_spread_features_lie_between_those_of_the_coarser_level() -> None:
    coarse = torch.randn(1, K, 4, 4, 3)
    fine = spread(coarse, (8, 8, 6))
    assert fine.shape == (1, K, 8, 8, 6)
    torch.testing.assert_close(fine, F.interpolate(coarse, scale_factor=2, mode="trilinear"))
    # Its first voxel is a corner, the next a quarter of the way along each axis.
    assert fine[0, 0, 0, 0, 0] == coarse[0, 0, 0, 0, 0]
    torch.testing.assert_close(fine[0, :, 1, 0, 0], 0.75 * coarse[0, :, 0, 0, 0] + 0.25 * coarse[0, :, 1, 0, 0])


def test_sums_stay_in_float32_under_autocast() -> None:
    features, _, weights = drawn()
    prototypes = class_prototypes(features, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_prototypes(features, weights), prototypes)
        assert torch.equal(squared_distances(features, prototypes), squared_distances(features, prototypes))
        assert cosine_similarity(features, prototypes).dtype == torch.float32
        assert spread(features.bfloat16(), SIDES).dtype == torch.float32

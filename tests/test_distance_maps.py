"""Signed distance maps against every pair of voxels, and the cases the official formula leaves open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from cfrbench.distance_maps import distances, distances_by_offsets, signed_distance_maps

masks = st.tuples(st.integers(1, 3), *[st.integers(1, 6)] * 3).flatmap(lambda shape: arrays(np.bool_, shape))


def plain(mask: Tensor, absent: float) -> Tensor:
    """The definition, over all pairs of voxels."""
    if not mask.any() or mask.all():
        return torch.full(mask.shape, -1.0 if mask.any() else absent)
    places = torch.stack(torch.meshgrid(*map(torch.arange, mask.shape), indexing="ij"), -1).double()
    pairs = torch.cdist(places.reshape(-1, 3), places.reshape(-1, 3))
    flat = mask.flatten()
    outside = pairs[:, flat].amin(1).view(mask.shape)
    inside = pairs[:, ~flat].amin(1).view(mask.shape)
    signed = outside / outside.max() - inside / inside.max()
    steps = (pairs - 1.0).abs() < 1e-9
    surface = flat & (steps & ~flat).any(1)
    return signed.masked_fill(surface.view(mask.shape), 0.0).float()


@settings(max_examples=60, deadline=None)
@given(given_masks=masks, absent=st.sampled_from([0.0, 1.0]))
def test_equals_the_definition(given_masks: np.ndarray, absent: float) -> None:
    chosen = torch.from_numpy(given_masks)
    expected = torch.stack([plain(mask, absent) for mask in chosen])
    torch.testing.assert_close(signed_distance_maps(chosen, absent), expected, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(given_masks=masks)
def test_the_way_for_other_devices_gives_the_same_distances(given_masks: np.ndarray) -> None:
    targets = torch.from_numpy(given_masks)
    targets[:, 0, 0, 0] = True
    torch.testing.assert_close(distances_by_offsets(targets), distances(targets), rtol=1e-6, atol=0)


def test_an_absent_and_a_filling_mask() -> None:
    nothing, everything = torch.zeros(1, 3, 3, 3, dtype=torch.bool), torch.ones(1, 3, 3, 3, dtype=torch.bool)
    assert (signed_distance_maps(nothing) == 0).all()
    assert (signed_distance_maps(nothing, absent=1.0) == 1).all()
    assert (signed_distance_maps(everything, absent=1.0) == -1).all()


def test_leading_axes_are_kept_and_maps_do_not_meet() -> None:
    draw = torch.Generator().manual_seed(0)
    many = torch.rand(2, 3, 5, 4, 6, generator=draw) > 0.6
    many[0, 1] = False
    maps = signed_distance_maps(many)
    assert maps.shape == many.shape
    assert maps.dtype == torch.float32
    for crop in range(2):
        for number in range(3):
            assert torch.equal(maps[crop, number], signed_distance_maps(many[crop, number]))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_number(threads: int) -> None:
    many = torch.rand(5, 9, 8, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        maps = signed_distance_maps(many)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(maps, torch.stack([signed_distance_maps(mask) for mask in many]))

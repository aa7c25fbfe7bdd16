"""Cubes of tokens: windows, shifts, and a depth that is stretched after the projection instead of before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench_tune.msa_adapter import near_square
from cfrbench_tune.volume_encoder import VolumeAttention, border_mask, from_windows, to_windows
from tests.tune.models import adapted, foundation, images, tuner_of


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (6, 3), (6, 6), (8, 2)])
def test_windows_hold_neighbours_and_come_back(grid: int, side: int) -> None:
    places = torch.stack(torch.meshgrid(*[torch.arange(grid)] * 3, indexing="ij"), dim=-1).expand(2, -1, -1, -1, -1)
    windows = to_windows(places, side)
    assert windows.shape == (2 * (grid // side) ** 3, side, side, side, 3)
    spans = windows.flatten(1, 3)
    assert bool((spans.amax(1) - spans.amin(1) == side - 1).all())
    assert torch.equal(from_windows(windows, side, grid), places)


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (8, 4), (9, 3)])
def test_the_mask_parts_what_the_shift_has_brought_together(grid: int, side: int) -> None:
    shift = side // 2
    places = torch.stack(torch.meshgrid(*[torch.arange(grid)] * 3, indexing="ij"), dim=-1)
    rolled = places.roll([-shift] * 3, (0, 1, 2))
    tokens = to_windows(rolled.unsqueeze(0), side).flatten(1, 3)  # where each token of a window came from
    distance = (tokens[:, :, None] - tokens[:, None, :]).abs().amax(-1)
    expected = torch.where(distance < side, 0.0, -100.0)
    assert torch.equal(border_mask(grid, side, shift, torch.device("cpu")), expected)


def test_masked_windows_ignore_the_other_border() -> None:
    attention: Any = adapted(tuner_of("sam3d-adapter"), foundation("tiny"), 2).image_encoder.get_submodule(
        "blocks.0.attn"
    )
    assert isinstance(attention, VolumeAttention)
    torch.manual_seed(0)
    cubes = torch.randn(2, 2, 2, 2, 32)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, 4:] = mask[:, 4:, :4] = -1e4  # the halves along the first axis do not see each other
    changed = cubes.clone()
    changed[:, 1] = torch.randn(2, 2, 2, 32)
    with torch.no_grad():
        assert torch.equal(attention(cubes, mask)[:, 0], attention(changed, mask)[:, 0])
        assert not torch.equal(attention(cubes)[:, 0], attention(changed)[:, 0])


@torch.no_grad()
def test_stretching_the_depth_after_the_projection_changes_nothing() -> None:
    tuner, model = tuner_of("sam3d-adapter"), foundation("tiny")
    encoder: Any = adapted(tuner, model, 2).image_encoder
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    volume = torch.rand(1, 5, 3, 32, 32)
    stretched = F.interpolate(volume.movedim(1, 2), (32, 32, 32), mode="trilinear", align_corners=False).movedim(
        1, 2
    )  # in depth alone: the sides are as they should be
    patches: Tensor = encoder.patch_embed(stretched[0])
    expected = encoder.slice_embed(patches.permute(3, 1, 2, 0).unsqueeze(0)).movedim(1, -1)
    table = F.avg_pool2d(encoder.pos_embed.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    expected = expected + table.unsqueeze(3) + encoder.depth_embed[:, None, None]
    torch.testing.assert_close(encoder._tokens(volume), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sam3d-adapter", "msa-adapter-3d"])
@torch.no_grad()
def test_volumes_of_a_batch_do_not_see_each_other_and_their_slices_do(name: str) -> None:
    tuner, model = tuner_of(name), foundation("tiny")
    network = adapted(tuner, model, 3).eval()
    volumes = images(tuner, network, model)
    depth = volumes.shape[1]
    logits = network(volumes)
    assert logits.shape[0] == volumes.shape[0] * depth
    torch.testing.assert_close(network(volumes[1:]), logits[depth:], rtol=1e-4, atol=1e-5)
    changed = volumes.clone()
    changed[0, 0] = 1.0
    others = network(changed)
    assert not torch.allclose(others[1], logits[1], atol=1e-5)  # another slice of the same volume
    torch.testing.assert_close(others[depth:], logits[depth:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "sides"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (16, (4, 4)), (80, (8, 10))])
def test_the_nearest_square(count: int, sides: tuple[int, int]) -> None:
    assert near_square(count) == sides

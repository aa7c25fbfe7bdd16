"""Small turns and zooms of crops."""

from __future__ import annotations

import numpy as np
import torch

from cfrbench.jitter import draw_affine, warp_image, warp_label


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_no_turn_and_no_zoom_change_nothing() -> None:
    crop = torch.rand(9, 12, 4)
    affine = draw_affine(0.0, 1.0, rng())
    assert torch.allclose(warp_image(crop, affine), crop, atol=1e-5)
    label = (crop > 0.5).to(torch.uint8)
    assert torch.equal(warp_label(label, affine), label)


def test_labels_get_no_new_values_and_follow_their_image() -> None:
    label = torch.zeros(40, 24, 3, dtype=torch.uint8)
    label[8:20, 6:18] = 7
    affine = draw_affine(20.0, 1.3, rng())
    turned = warp_label(label, affine)
    assert turned.dtype == torch.uint8
    assert set(turned.unique().tolist()) == {0, 7}
    image = warp_image((label == 7).float(), affine)
    assert float(((image > 0.5) == (turned == 7)).float().mean()) > 0.98


def test_a_quarter_turn_of_a_crop_that_is_not_square_does_not_shear_it() -> None:
    crop = torch.zeros(40, 20, 1)
    crop[17:23, 4:16] = 1.0  # 6 x 12
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    turned = warp_image(crop, quarter)[..., 0] > 0.5
    rows, cols = turned.any(dim=1).sum(), turned.any(dim=0).sum()
    assert (int(rows), int(cols)) == (12, 6)


def test_every_slice_is_moved_alike() -> None:
    crop = torch.rand(16, 16, 1).expand(16, 16, 5)
    turned = warp_image(crop, draw_affine(15.0, 1.2, rng()))
    assert torch.allclose(turned, turned[..., :1].expand_as(turned))


def test_draws_stay_in_bounds_and_differ() -> None:
    source = rng()
    drawn = [draw_affine(15.0, 1.2, source) for _ in range(50)]
    scales = [float(a[:, :2].det().sqrt()) for a in drawn]
    assert 1 / 1.2 <= min(scales) < 0.95 < 1.05 < max(scales) <= 1.2
    angles = [abs(float(torch.rad2deg(torch.atan2(a[1, 0], a[0, 0])))) for a in drawn]
    assert 10 < max(angles) <= 15.001

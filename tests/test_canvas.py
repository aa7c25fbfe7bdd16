"""Turns of a canvas can be taken back; resizing keeps what a model must see."""

from __future__ import annotations

import pytest
import torch

from cfrbench.canvas import resize_canvas, resize_logits, rotflip_canvas, undo_rotflip_canvas
from cfrbench.errors import UsageError

TURNS = [(k, axis) for k in range(4) for axis in (0, 1)]


@pytest.mark.parametrize(("k", "axis"), TURNS)
def test_a_turn_can_be_taken_back(k: int, axis: int) -> None:
    canvases = torch.arange(2 * 3 * 25).reshape(2, 3, 5, 5)
    assert torch.equal(undo_rotflip_canvas(rotflip_canvas(canvases, k, axis), k, axis), canvases)


def test_turns_are_the_four_mirror_images_each_drawn_twice() -> None:
    canvas = torch.arange(9).reshape(3, 3)
    results = {tuple(rotflip_canvas(canvas, k, axis).flatten().tolist()) for k, axis in TURNS}
    # A flip always happens: of the eight symmetries of a square only the mirrored ones come up, never the identity.
    assert len(results) == 4
    assert tuple(range(9)) not in results


def test_a_turn_moves_every_canvas_of_a_batch_alike() -> None:
    canvases = torch.rand(2, 3, 4, 4)
    turned = rotflip_canvas(canvases, 1, 0)
    assert torch.equal(turned[1, 2], rotflip_canvas(canvases[1, 2], 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_resizing_keeps_leading_axes_dtype_and_constants(dtype: torch.dtype) -> None:
    canvases = torch.full((2, 1, 32, 32), 0.75, dtype=dtype)
    for resized in (resize_canvas(canvases, 8), resize_logits(canvases, 48)):
        assert resized.dtype == dtype
        assert resized.shape[:2] == (2, 1)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.75))


def test_a_canvas_of_the_right_size_is_not_copied() -> None:
    canvas = torch.rand(1, 16, 16)
    assert resize_canvas(canvas, 16) is canvas
    assert resize_logits(canvas, 16) is canvas


def test_shrinking_a_canvas_averages_over_pixels_that_plain_bilinear_would_skip() -> None:
    stripes = torch.zeros(1, 32, 32)
    stripes[..., ::8] = 1
    interior = resize_canvas(stripes, 4)[..., 1:3]
    torch.testing.assert_close(interior, torch.full_like(interior, 1 / 8), atol=0.02, rtol=0)
    assert resize_logits(stripes, 4).abs().max() == 0


def test_enlarged_logits_keep_corners_and_range() -> None:
    logits = torch.randn(2, 3, 4, 4)
    large = resize_logits(logits, 16)
    torch.testing.assert_close(large[..., 0, 0], logits[..., 0, 0])
    torch.testing.assert_close(large[..., -1, -1], logits[..., -1, -1])
    assert large.min() >= logits.min()
    assert large.max() <= logits.max()


def test_labels_are_never_resized() -> None:
    with pytest.raises(UsageError, match="labels"):
        resize_canvas(torch.zeros(1, 8, 8, dtype=torch.uint8), 4)

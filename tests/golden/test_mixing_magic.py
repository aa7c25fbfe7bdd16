"""MagicNet's cubes, losses, blending, schedules and sliding window against ``ssl_mixing.npz``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.averaging import update_ema
from cfrbench.config import Triple
from cfrbench.contracts import Progress
from cfrbench.cubes import (
    blend,
    class_weights,
    cut,
    exchange,
    join,
    join_transposed,
    location_labels,
    location_loss,
    recover,
)
from cfrbench.inference import predict_probabilities
from cfrbench.losses import class_map, dice_loss
from cfrbench.schedules import ema_decay
from tests.golden.ledger import ledger

book = ledger("ssl_mixing")


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def close(actual: Tensor, key: str) -> None:
    """Within 1e-5, as the notes to the file recommend."""
    torch.testing.assert_close(actual.detach(), take(key).to(actual.dtype), rtol=0, atol=1e-5)


def grid_of(sides: Any, cube: int) -> Triple:
    x, y, z = (int(side) // cube for side in sides)
    return x, y, z


# ---------------------------------------------------------------------------------------------------------------------
# cubes


def test_crops_exchange_cubes_and_get_them_back() -> None:
    source = take("magic_part_uniform").argsort(dim=0)
    assert torch.equal(source, take("magic_part_index").long())
    assert torch.equal(source.argsort(dim=0), take("magic_rec_index").long())
    mixed = exchange(take("magic_part_volume"), source)
    assert torch.equal(mixed, take("magic_part_mixed"))
    assert torch.equal(recover(mixed, source), take("magic_part_volume"))
    assert torch.equal(recover(take("magic_rec_input"), source), take("magic_rec_output"))


def test_cubes_of_a_crop_and_their_places() -> None:
    shape, cube = take("magic_within_volume_shape").tolist(), int(take("magic_within_cube_size"))
    volume = torch.arange(int(np.prod(shape))).reshape(shape)
    grid = grid_of(shape[2:], cube)
    cubes = cut(volume, grid)
    assert torch.equal(cubes, take("magic_within_patches").long())
    assert torch.equal(location_labels(grid), take("magic_within_loc_labels").long())
    assert torch.equal(join_transposed(cubes, grid), take("magic_within_unmixed").long())
    assert torch.equal(join(cubes, grid), volume)


@pytest.mark.parametrize("shuffled", [False, True])
def test_location_loss(shuffled: bool) -> None:
    """The official code shuffles the cubes, which changes nothing."""
    features, order = take("magic_loc_features"), take("magic_loc_perm").long()
    weight, bias = take("magic_loc_weight"), take("magic_loc_bias")
    side = round(len(bias) ** (1 / 3))

    def head(flat: Tensor) -> Tensor:
        if not shuffled:
            return F.linear(flat, weight, bias)
        return F.linear(flat[order], weight, bias)[order.argsort()]

    close(location_loss(head, list(features), (side, side, side)), "magic_loc_loss")


# ---------------------------------------------------------------------------------------------------------------------
# blending and Dice


def test_cube_logits_in_the_official_order() -> None:
    cubes, whole = take("magic_blend_cube_logits"), take("magic_blend_unmixed_logits")
    assert torch.equal(join_transposed(cubes, grid_of(whole.shape[2:], cubes.shape[-1])), whole)


@pytest.mark.parametrize(("suffix", "temperature"), [("", None), ("_T2", 2.0)])
def test_blended_labels(suffix: str, temperature: float | None) -> None:
    temperature = float(take("magic_blend_temperature")) if temperature is None else temperature
    weights = class_weights(take("magic_blend_class_counts"), temperature)
    close(weights, f"magic_blend_class_weight{suffix}")
    logits = blend(take("magic_blend_teacher_logits"), take("magic_blend_unmixed_logits"), weights)
    if not suffix:
        close(logits, "magic_blend_logits")
    assert torch.equal(class_map(logits), take(f"magic_blend_label{suffix}").to(torch.uint8))


def test_dice() -> None:
    logits = take("magic_blend_teacher_logits").requires_grad_()
    loss = dice_loss(logits.softmax(dim=1), take("magic_dice_label"), smooth=1e-10)
    close(loss, "magic_dice_loss")
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    close(logits.grad, "magic_dice_grad")


# ---------------------------------------------------------------------------------------------------------------------
# schedules, teacher, test


@pytest.mark.parametrize("name", ["btcv", "mact"])
def test_ramps_of_the_named_configs(name: str) -> None:
    plugin = registry.load("ssl", "magicnet")
    config = plugin.Config(**plugin.configs[name])
    steps = take("magic_ramp_iters").tolist()
    weights = [config.weight(Progress(step, max(steps) + 1)) for step in steps]
    close(torch.tensor(weights), f"magic_ramp_{name}")


def test_teacher() -> None:
    teacher, found = nn.ParameterList([take("magic_ema_teacher0")]), []
    for step, values in enumerate(take("magic_ema_student_seq")):
        update_ema(teacher, nn.ParameterList([values]), ema_decay(step))
        found.append(teacher[0].detach().clone())
    close(torch.stack(found), "magic_ema_teacher_seq")


def test_sliding_window() -> None:
    a, b, c = take("magic_sw_coef")[..., None, None, None]
    height, width, depth = take("magic_sw_patch").tolist()
    along = [torch.linspace(-1.0, 1.0, side) for side in (height, depth)]
    first, last = along[0][:, None, None], along[1]
    scores = predict_probabilities(
        lambda crop: (a * crop[0] + b * first + c * last)[None],
        take("magic_sw_image"),
        (height, width, depth),
        int(take("magic_sw_stride_xy")),
        int(take("magic_sw_stride_z")),
        len(a),
    )
    close(scores, "magic_sw_score")
    assert torch.equal(class_map(scores[None])[0], take("magic_sw_label").to(torch.uint8))

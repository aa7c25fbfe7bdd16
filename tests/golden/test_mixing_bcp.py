"""BCP's box, losses and component filters against ``ssl_mixing.npz``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrbench import registry
from cfrbench.losses import class_map
from cfrbench.pasting import (
    box_sides,
    copy_paste_loss,
    labelled_ce_dice,
    labelled_dice_loss,
    largest_components,
    only,
    outside_box,
)
from tests.golden.ledger import ledger

book = ledger("ssl_mixing")
CONFIG = registry.load("ssl", "bcp").Config()


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def labels(key: str) -> Tensor:
    return take(key).to(torch.uint8)


def close(actual: Tensor, key: str) -> None:
    """Within 1e-5, as the notes to the file recommend."""
    torch.testing.assert_close(actual.detach(), take(key), rtol=0, atol=1e-5)


def test_box() -> None:
    """The box, from the numbers that the official generator draws: torch's draws are others."""
    crop = take("bcp_mask_shape").tolist()
    box = box_sides(crop, CONFIG.box)
    draw = np.random.RandomState(int(take("bcp_mask_seed")))
    corner = [draw.randint(0, side - length) for side, length in zip(crop, box, strict=True)]
    assert corner == take("bcp_mask_draws").tolist() == take("bcp_mask_start").tolist()
    stop = [first + length for first, length in zip(corner, box, strict=True)]
    assert stop == take("bcp_mask_stop_exclusive").tolist()
    outside = outside_box(crop, corner, box)
    assert int((~outside).sum()) == int(take("bcp_mask_zero_count"))
    shape = take("bcp_mask_loss_shape").tolist()
    assert int((~outside).expand(shape).sum()) == int(take("bcp_mask_loss_zero_count"))


# ---------------------------------------------------------------------------------------------------------------------
# losses

#: weight of the labels around the box and of those inside it
WEIGHTS = {"l": (1.0, CONFIG.unlabelled_weight), "u": (CONFIG.unlabelled_weight, 1.0), "one": (1.0, 1.0)}


def mixed_loss(logits: Tensor, around: float, within: float) -> Tensor:
    """`copy_paste_loss` gives true labels, those with weight 1, first."""
    image, patch, outside = labels("bcp_mix_img_label"), labels("bcp_mix_patch_label"), take("bcp_mix_mask").bool()
    if around == 1.0:
        return copy_paste_loss(logits, image, patch, outside, within)
    return copy_paste_loss(logits, patch, image, ~outside, around)


@pytest.mark.parametrize("way", WEIGHTS)
def test_copy_paste_loss(way: str) -> None:
    logits = take("bcp_mix_logits").requires_grad_()
    loss = mixed_loss(logits, *WEIGHTS[way])
    close(loss, f"bcp_mix_loss_{way}")
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    close(logits.grad, f"bcp_mix_grad_{way}")


def test_dice_and_pre_training_loss() -> None:
    logits, label, outside = take("bcp_mix_logits"), labels("bcp_mix_img_label"), take("bcp_mix_mask").bool()
    probabilities = logits.softmax(dim=1)
    close(labelled_dice_loss(probabilities, only(label, outside)), "bcp_dice_masked")
    close(labelled_dice_loss(probabilities, label), "bcp_dice_unmasked")
    close(labelled_ce_dice(logits, label), "bcp_pretrain_loss")


# ---------------------------------------------------------------------------------------------------------------------
# components


@pytest.mark.parametrize(("suffix", "neighbours"), [("", CONFIG.neighbours), ("_conn2", 18), ("_conn1", 6)])
def test_largest_component_of_the_teacher(suffix: str, neighbours: Any) -> None:
    found = class_map(take("bcp_cc_logits"))
    assert torch.equal(found, labels("bcp_cc_threshold_mask"))
    assert torch.equal(largest_components(found, neighbours), labels(f"bcp_cc_mask{suffix}"))


@pytest.mark.parametrize(("given", "kept", "neighbours"), [
    ("tie_input", "tie_output", 26), ("diag_input", "diag_full", 26), ("diag_input", "diag_conn2", 18),
    ("diag_input", "diag_conn1", 6),
])  # fmt: skip
def test_ties_and_diagonals(given: str, kept: str, neighbours: Any) -> None:
    assert torch.equal(largest_components(labels(f"bcp_cc_{given}"), neighbours), labels(f"bcp_cc_{kept}"))


def test_largest_component_of_each_class_of_a_slice() -> None:
    assert torch.equal(largest_components(class_map(take("bcp_acdc_logits")), 8), labels("bcp_acdc_mask"))

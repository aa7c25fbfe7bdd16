"""SLC-Net's block Dice and pseudo-supervision against ``ssl_mixing.npz``."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrbench.losses import block_dice_loss, class_map, cross_entropy, entropy_map, weighted_cross_entropy
from cfrbench.schedules import threshold_rampup
from cfrbench.uncertainty import mean_probability
from tests.golden.ledger import ledger

book = ledger("ssl_mixing")

#: ``slc_block_loss_n5_ragged`` is the loss of 5 blocks along each axis
OTHER_COUNTS = [key for key in book.keys("slc_block_loss_n") if re.match(r"slc_block_loss_n\d+", key)]


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def close(actual: Tensor | float, key: str) -> None:
    """Within 1e-5, as the notes to the file recommend."""
    assert float(actual) == pytest.approx(float(book.take(key)), abs=1e-5)


def official_block_dice(blocks: int) -> Tensor:
    """The edge of a block is that of the last axis along every axis."""
    probabilities, label = take("slc_block_prob"), take("slc_block_label")
    edges = [math.ceil(label.shape[-1] / blocks)] * (label.ndim - 1)
    return block_dice_loss(probabilities, label, blocks, edges=edges)


def test_block_dice() -> None:
    close(official_block_dice(int(book.take("slc_block_num"))), "slc_block_loss")


@pytest.mark.parametrize("key", OTHER_COUNTS)
def test_block_dice_in_other_numbers_of_blocks(key: str) -> None:
    found = re.match(r"slc_block_loss_n(\d+)", key)
    assert found is not None
    close(official_block_dice(int(found[1])), key)


def uncertainty() -> Tensor:
    """The entropy of the stored passes, which come two at a time as `mean_probability` makes them."""
    passes, image = take("slc_mc_logits"), take("slc_logits1")
    pairs = iter(passes.split(2 * len(image)))
    mean = mean_probability(lambda twice: next(pairs), image, len(passes) // len(image))
    return entropy_map(mean, normalised=False)


def test_uncertainty_and_weight() -> None:
    torch.testing.assert_close(uncertainty(), take("slc_uncertainty"), rtol=0, atol=1e-5)
    torch.testing.assert_close((-uncertainty()).exp(), take("slc_weight"), rtol=0, atol=1e-5)


def test_pseudo_supervision() -> None:
    one, two = take("slc_logits1"), take("slc_logits2")
    close(cross_entropy(one, class_map(two)), "slc_pseudo_loss1")
    close(weighted_cross_entropy(two, class_map(one), (-uncertainty()).exp()), "slc_pseudo_loss2")


def test_hard_mask_of_the_journal() -> None:
    step, total = take("slc_hard_iter").tolist()
    threshold = threshold_rampup(step, total, 0.75, 1.0) * math.log(2)
    close(threshold, "slc_hard_threshold")
    certain = (uncertainty() < threshold).float()
    assert float(certain.mean()) == pytest.approx(float(book.take("slc_hard_mask_fraction")), abs=1e-6)
    loss = weighted_cross_entropy(take("slc_logits2"), class_map(take("slc_logits1")), certain)
    close(loss, "slc_hard_pseudo_loss2")

"""The memory of labelled features, and the contrast against it, beside plain spellings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.memory_bank import ClassScores, MemoryBank, contrastive_loss, some_of_each

WIDTH = 6


def voxels(classes: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(count, WIDTH), torch.randint(0, classes, (count,), dtype=torch.uint8)


def filled(classes: int, size: int = 4) -> tuple[MemoryBank, ClassScores]:
    bank, scores = MemoryBank(classes, size, WIDTH), ClassScores(classes, WIDTH)
    bank.update(*voxels(classes, 20 * classes), scores)
    return bank, scores


@pytest.mark.parametrize("classes", [2, 5])
def test_background_is_never_stored(classes: int) -> None:
    bank, _ = filled(classes)
    assert bank.count.tolist() == [0] + [4] * (classes - 1)
    assert len(bank[0]) == 0
    assert not bank.vectors[0].any()


def test_a_class_that_does_not_occur_keeps_its_vectors_and_others_are_replaced() -> None:
    bank, scores = filled(3)
    before = bank.vectors.clone()
    new = torch.randn(2, WIDTH)
    bank.update(new, torch.tensor([1, 1]), scores)
    assert torch.equal(bank[1], new)
    assert bank.count.tolist() == [0, 2, 4]
    assert torch.equal(bank[2], before[2])
    again = MemoryBank(3, 4, WIDTH)
    again.load_state_dict(bank.state_dict())
    assert all(torch.equal(bank[name], again[name]) for name in range(3))


def test_scores_are_two_layers_with_the_norm_of_the_batch() -> None:
    scores, (rows, _) = ClassScores(3, WIDTH), voxels(3, 9)
    state = dict(scores.named_parameters())
    hidden = rows @ state["hidden_weight"][2].T + state["hidden_bias"][2]
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    expected = F.leaky_relu(hidden, 0.2) @ state["out_weight"][2].T + state["out_bias"][2]
    torch.testing.assert_close(scores(rows, 2), expected[:, 0])


@pytest.mark.parametrize("classes", [2, 5])
def test_contrast_is_the_mean_over_pairs(classes: int) -> None:
    """Weights summing to the number of voxels, cosines of every pair: the official spelling."""
    (bank, scores), (rows, labels) = filled(classes), voxels(classes, 60, seed=1)
    rows.requires_grad_()
    expected = torch.zeros(())
    for name in range(1, classes):
        own, memory = rows[labels == name], bank[name]
        weights = scores(own.detach(), name).sigmoid()
        weights = weights * len(own) / weights.sum()
        pairs = torch.stack([1 - F.cosine_similarity(own, vector[None]) for vector in memory], dim=1)
        expected = expected + (weights[:, None] * pairs).mean()
    loss = contrastive_loss(rows, labels, bank, scores)
    torch.testing.assert_close(loss, expected / classes)
    ours, plain = (torch.autograd.grad(value, rows)[0] for value in (loss, expected / classes))
    torch.testing.assert_close(ours, plain)


def test_classes_with_one_voxel_or_one_vector_count_nothing() -> None:
    bank, scores = filled(3)
    bank.count[1] = 1
    rows, labels = torch.randn(4, WIDTH), torch.tensor([1, 1, 1, 2])
    assert float(contrastive_loss(rows, labels, bank, scores)) == 0.0
    assert float(contrastive_loss(rows, torch.tensor([1, 1, 2, 2]), bank, scores).detach()) > 0.0


def test_some_of_each_class() -> None:
    _, labels = voxels(4, 200)
    labels[labels == 3] = 0
    labels[:2] = 3
    places = some_of_each(labels, 4, 5)
    assert places.unique().numel() == places.numel()
    assert labels[places].bincount().tolist() == [5, 5, 5, 2]
    assert not torch.equal(places, some_of_each(labels, 4, 5)), "drawn anew"
    assert sorted(some_of_each(labels, 4, 1000).tolist()) == list(range(200))

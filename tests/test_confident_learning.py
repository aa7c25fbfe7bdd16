"""Confident learning against cleanlab, whose numbers it has to give where equal values leave no choice."""

from __future__ import annotations

import pytest
import torch
from cleanlab.count import compute_confident_joint, get_confident_thresholds
from cleanlab.filter import find_label_issues
from torch import Tensor

from cfrbench.confident_learning import (
    Pruning,
    calibrated_joint,
    confident_joint,
    confident_thresholds,
    label_issues,
)

FILTERS: dict[Pruning, str] = {"both": "both", "class": "prune_by_class", "noise-rate": "prune_by_noise_rate"}


def drawn(seed: int, classes: int, items: int, absent: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels ``(N,)``, of which many are wrong, and probabilities ``(N, C)``."""
    draw = torch.Generator().manual_seed(seed)
    sharp = 2.0 if seed % 2 else 0.7
    probabilities = (sharp * torch.randn(items, classes, generator=draw, dtype=torch.float64)).softmax(dim=1)
    labels = torch.multinomial(probabilities, 1, generator=draw)[:, 0]
    if absent is not None:
        labels[labels == absent] = (absent + 1) % classes
    return labels, probabilities


CASES = [(seed, classes, items) for seed in range(4) for classes, items in ((2, 300), (3, 300), (5, 200), (14, 400))]


@pytest.mark.filterwarnings("ignore:May not flag all label issues in class")
@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize(("seed", "classes", "items"), CASES)
def test_equals_cleanlab(seed: int, classes: int, items: int, absent: int | None) -> None:
    labels, probabilities = drawn(seed, classes, items, absent)
    given = {"labels": labels.numpy(), "pred_probs": probabilities.numpy()}
    joint = confident_joint(labels, probabilities.T)
    assert torch.equal(joint, torch.from_numpy(compute_confident_joint(**given, calibrate=False)))
    assert torch.equal(calibrated_joint(joint, labels), torch.from_numpy(compute_confident_joint(**given)))
    if len(labels.unique()) < 2:
        return  # cleanlab has nothing to compare
    for pruning, name in FILTERS.items():
        expected = torch.from_numpy(find_label_issues(**given, filter_by=name, n_jobs=1))
        assert torch.equal(label_issues(labels, probabilities, pruning), expected), pruning


@pytest.mark.parametrize("classes", [2, 14])
def test_thresholds_are_those_of_cleanlab_and_two_for_an_absent_class(classes: int) -> None:
    labels, probabilities = drawn(0, classes, 300, absent=1)
    expected = torch.from_numpy(get_confident_thresholds(labels.numpy(), probabilities.numpy()))
    ours = confident_thresholds(labels, probabilities.T)
    present = labels.unique()
    assert len(expected) == classes or len(expected) == len(present)
    torch.testing.assert_close(ours[present], expected[present] if len(expected) == classes else expected)
    assert float(ours[1]) == 2.0


@pytest.mark.parametrize("seed", range(6))
def test_equal_probabilities_change_which_items_are_marked_but_not_how_many(seed: int) -> None:
    labels, probabilities = drawn(seed, 2, 120)
    probabilities[:, 1] = (probabilities[:, 1] * 7).floor() / 7 + 0.01  # no two classes are equally probable
    probabilities[:, 0] = 1.0 - probabilities[:, 1]
    for pruning, name in FILTERS.items():
        if pruning == "both":
            continue  # how many stand in both sets depends on which
        expected = find_label_issues(labels.numpy(), probabilities.numpy(), filter_by=name, n_jobs=1)
        found = label_issues(labels, probabilities, pruning)
        assert int(found.sum()) == expected.sum()


def test_voxels_of_a_batch_are_items_of_one_problem() -> None:
    labels, probabilities = drawn(1, 3, 2 * 4 * 3 * 2)
    maps = probabilities.view(2, 4, 3, 2, 3).movedim(-1, 1)
    marked = label_issues(labels.view(2, 4, 3, 2).to(torch.uint8), maps)
    assert marked.shape == (2, 4, 3, 2)
    assert marked.any()
    assert torch.equal(marked.flatten(), label_issues(labels, probabilities))


def test_planted_errors_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (2000,), generator=draw)
    logits = 6.0 * torch.nn.functional.one_hot(truth, 3) + torch.randn(2000, 3, generator=draw)
    labels = truth.clone()
    labels[:200] = (truth[:200] + 1) % 3
    marked = label_issues(labels, logits.softmax(dim=1))
    assert marked[:200].float().mean() > 0.95
    assert not marked[200:].any()


def test_a_label_of_the_largest_probability_is_never_marked() -> None:
    labels, probabilities = drawn(3, 4, 200)
    best = probabilities.argmax(dim=1)
    assert not label_issues(best, probabilities).any()
    assert not (label_issues(labels, probabilities, "noise-rate") & (labels == best)).any()

"""The guidance term: what it adds, to whom, and how much of it when."""

from __future__ import annotations

import pytest
import torch

from cfrbench import registry
from cfrbench.config import TrainingSection
from cfrbench.contracts import Batch, Progress, StepOutput
from cfrbench.errors import UsageError
from cfrbench.guidance import guidance_loss, guidance_weight
from cfrbench.losses import ce_dice
from cfrbench.testing import check_pseudo


def logits(seed: int, classes: int = 3) -> torch.Tensor:
    return torch.randn(2, classes, 4, 4, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()


PSEUDO = torch.randint(3, (2, 4, 4, 2), generator=torch.Generator().manual_seed(9)).to(torch.uint8)


def test_every_network_is_guided_as_strongly_as_one_alone() -> None:
    first, second = logits(1), logits(2)
    both = guidance_loss(StepOutput({}, guided=(first, second)), PSEUDO, 1.0)
    torch.testing.assert_close(both, ce_dice(first, PSEUDO) + ce_dice(second, PSEUDO))
    alone = torch.autograd.grad(guidance_loss(StepOutput({}, guided=(first,)), PSEUDO, 1.0), first)[0]
    torch.testing.assert_close(torch.autograd.grad(both, first)[0], alone)


def test_the_weight_scales_it() -> None:
    output = StepOutput({}, guided=(logits(1),))
    torch.testing.assert_close(guidance_loss(output, PSEUDO, 0.25), 0.25 * guidance_loss(output, PSEUDO, 1.0))


def test_right_labels_cost_nothing_and_wrong_ones_much() -> None:
    sure = 50.0 * torch.nn.functional.one_hot(PSEUDO.long(), 3).movedim(-1, 1).float()
    assert float(guidance_loss(StepOutput({}, guided=(sure,)), PSEUDO, 1.0)) < 1e-6
    assert float(guidance_loss(StepOutput({}, guided=(sure.roll(1, 1),)), PSEUDO, 1.0)) > 10.0


def test_a_method_without_guided_logits_is_refused_in_words() -> None:
    supervised = registry.load("ssl", "supervised")
    method = supervised(lambda: torch.nn.Conv3d(1, 3, 1), 3)
    output = method.step(Batch(torch.randn(4, 1, 4, 4, 2), PSEUDO, PSEUDO), Progress(0, 1))
    with pytest.raises(UsageError, match="cannot be guided"):
        guidance_loss(output, PSEUDO, 1.0)


def test_constant_and_decaying_weights() -> None:
    constant = TrainingSection(guidance_weight=0.5)
    decaying = TrainingSection(guidance_weight=0.5, guidance_schedule="linear-decay")
    assert [guidance_weight(constant, step, 4) for step in range(4)] == [0.5] * 4
    assert [guidance_weight(decaying, step, 4) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]


def test_pseudo_labels_that_guide_somewhere_pass() -> None:
    check_pseudo({"a": PSEUDO[0], "b": torch.zeros_like(PSEUDO[0])})


def test_moved_pseudo_labels_are_learnt_where_they_are_and_nowhere_else() -> None:
    logits = torch.randn(3, 2, 4, 4, 4, requires_grad=True)
    moved = torch.randint(2, (3, 4, 4, 4), dtype=torch.uint8)
    moved[:, 2:] = 255
    loss = guidance_loss(StepOutput({}, guided=(logits,), guided_pseudo=moved), PSEUDO, 1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[:, :, :2] != 0).all())
    assert not bool(gradient[:, :, 2:].any())

"""The moving average of a teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfrbench.averaging import update_ema


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4))


def test_parameters_follow_the_formula_and_statistics_stay_the_teachers_own() -> None:
    teacher, student = network(0), network(1)
    student(torch.randn(2, 1, 5, 5, 5))
    before = [p.detach().clone() for p in teacher.parameters()]
    statistics = {name: b.clone() for name, b in teacher.named_buffers()}
    update_ema(teacher, student, 0.9)
    for old, new, current in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.9 * old + 0.1 * current.detach())
    assert all(torch.equal(b, statistics[name]) for name, b in teacher.named_buffers())


def test_a_decay_of_0_copies_and_needs_no_gradient_in_the_teacher() -> None:
    teacher, student = network(0).requires_grad_(False), network(1)
    update_ema(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_networks_of_different_build_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        update_ema(network(0), nn.Sequential(nn.Conv3d(1, 4, 3)), 0.5)

"""The mean teacher and the options that teacher-student methods share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cfrbench.contracts import Progress
from cfrbench.schedules import consistency_weight
from cfrbench.teachers import MeanTeacher, TeacherOptions, noisy


@given(step=st.integers(0, 5999))
def test_the_ramp_of_an_official_run_is_the_official_one(step: int) -> None:
    assert TeacherOptions().weight(Progress(step, 6000)) == consistency_weight(step, 0.1, 40, 150)


@given(total=st.integers(1, 20000), place=st.floats(0, 1, exclude_max=True))
def test_a_run_of_any_length_has_the_same_ramp_shape(total: int, place: float) -> None:
    step = int(place * total)
    epoch = max(e for e in range(40) if e * total <= 40 * step)  # the 40th of the run that the step lies in
    assert TeacherOptions().weight(Progress(step, total)) == consistency_weight(150 * epoch, 0.1, 40, 150)


@given(step=st.integers(0, 900))
def test_a_fixed_epoch_follows_the_counter_whatever_the_length(step: int) -> None:
    options = TeacherOptions(epoch_steps=150, consistency=1.0, ramp_length=200)
    assert options.weight(Progress(step, 900)) == consistency_weight(step, 1.0, 200, 150)


def test_noise_is_clipped_and_leaves_the_image_alone() -> None:
    torch.manual_seed(0)
    image = torch.randn(4, 1, 16, 16, 8)
    given_image = image.clone()
    added = noisy(image, std=0.1, clip=0.2) - image
    assert torch.equal(image, given_image)
    assert float(added.abs().max()) == pytest.approx(0.2, abs=1e-6)
    share = float((added.abs() > 0.1999).float().mean())
    assert share == pytest.approx(0.0455, abs=0.01)  # a normal number is beyond two deviations
    assert float(added[added.abs() < 0.19].std()) == pytest.approx(0.085, abs=0.01)
    assert abs(float(added.mean())) < 0.003


def test_noise_is_what_the_loop_seeds() -> None:
    image = torch.zeros(1, 1, 4, 4, 4)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(noisy(image, 0.1, 0.2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm3d(1)

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return self.norm(image) * self.scale


def test_the_teacher_sees_noise_and_gives_no_gradient() -> None:
    teacher = MeanTeacher(Recorder(), TeacherOptions()).train()
    image = torch.randn(2, 1, 4, 4, 4)
    logits = teacher(image)
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert 0 < float((teacher.net.seen - image).abs().max()) <= 0.2 + 1e-6
    assert float(teacher.net.norm.running_mean.abs()) > 0  # its own statistics, gathered in train mode


def test_the_teacher_copies_first_and_follows_slowly_then() -> None:
    student, teacher = Recorder(), MeanTeacher(Recorder(), TeacherOptions())
    student.scale.data.fill_(5.0)
    student.norm.running_mean.fill_(3.0)
    teacher.follow(student, Progress(0, 1000))
    assert float(teacher.net.scale) == 5.0
    student.scale.data.fill_(6.0)
    teacher.follow(student, Progress(1, 1000))  # decay 1 - 1 / 2
    assert float(teacher.net.scale) == pytest.approx(5.5)
    teacher.follow(student, Progress(500, 1000))  # decay 0.99 from step 99 on
    assert float(teacher.net.scale) == pytest.approx(5.5 * 0.99 + 6.0 * 0.01)
    assert float(teacher.net.norm.running_mean) == 0.0  # buffers are its own

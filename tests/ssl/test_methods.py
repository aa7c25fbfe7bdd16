"""What each method does in a step, seen through networks that report how they were called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.contracts import Batch, Progress, SSLMethod
from cfrbench.losses import ce_dice, ce_foreground_dice, class_map, softmax_mse
from cfrbench.schedules import threshold_rampup

L, U, C = 2, 3, 2
SIDES = (4, 4, 4)


class Spy(nn.Module):
    """One convolution that remembers what it was shown, in which mode, with or without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, C, kernel_size=1)
        self.calls: list[tuple[Tensor, bool, bool]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.calls.append((image, self.training, torch.is_grad_enabled()))
        logits: Tensor = self.conv(image)
        return logits


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(3)
    image = torch.randn(L + U, 1, *SIDES, generator=draw)
    return Batch(image, (image[:L, 0] > 0).to(torch.uint8))


def make(name: str, **options: Any) -> SSLMethod:
    plugin = registry.load("ssl", name)
    torch.manual_seed(0)
    method: SSLMethod = plugin(Spy, C, plugin.Config(**options))
    return method.train()


def halfway(phase: int = 0, phase_step: int = 50) -> Progress:
    return Progress(100 * phase + phase_step, 200, phase, phase_step, 100)


def test_supervised_sees_the_labelled_crops_only(batch: Batch) -> None:
    method = make("supervised")
    output = method.step(batch, halfway())
    ((shown, training, grad),) = method.net.calls
    assert torch.equal(shown, batch.image[:L])
    assert training
    assert grad
    assert output.guided == ()
    assert not method.uses_unlabelled


@pytest.mark.parametrize(("name", "loss"), [("ce_dice", ce_dice), ("ce_foreground_dice", ce_foreground_dice)])
def test_supervised_losses(batch: Batch, name: str, loss: Any) -> None:
    method = make("supervised", loss=name)
    expected = loss(method.net.conv(batch.image[:L]), batch.label)
    torch.testing.assert_close(method.step(batch, halfway()).losses["supervised"], expected)


@pytest.mark.parametrize(("name", "options", "first"), [
    ("mt", {}, 0), ("mt", {"form": "ssl4mis"}, L), ("acmt", {}, L),
])  # fmt: skip
def test_one_student_pass_and_one_noisy_teacher_pass(batch: Batch, name: str, options: Any, first: int) -> None:
    method = make(name, **options)
    output = method.step(batch, halfway())
    ((shown, training, grad),) = method.student.calls
    assert torch.equal(shown, batch.image)
    assert training
    assert grad
    ((noisy, training, grad),) = method.teacher.net.calls
    assert noisy.shape[0] == L + U - first
    assert 0 < float((noisy - batch.image[first:]).abs().max()) <= 0.2 + 1e-6
    assert training
    assert not grad
    torch.testing.assert_close(output.guided[0], method.student.conv(batch.image[L:]))


@pytest.mark.parametrize(("form", "first"), [("cfr", 0), ("ssl4mis", L)])
def test_mean_teacher_counts_the_crops_of_its_form(batch: Batch, form: str, first: int) -> None:
    method = make("mt", form=form, noise_std=0.0, consistency=2.0, ramp_length=0)
    distance = softmax_mse(method.student.conv(batch.image), method.teacher.net.conv(batch.image))[first:].mean()
    torch.testing.assert_close(method.step(batch, halfway()).losses["consistency"], 2.0 * distance)


def test_mean_teacher_agrees_with_itself_after_the_first_update(batch: Batch) -> None:
    method = make("mt", noise_std=0.0)
    assert float(method.step(batch, Progress(0, 10)).losses["consistency"].detach()) > 0
    method.after_update(Progress(0, 10))
    assert float(method.step(batch, Progress(1, 10)).losses["consistency"].detach()) == 0


@pytest.mark.parametrize("step", [0, 100, 199])
def test_acmt_averages_over_the_ambiguous_voxels(batch: Batch, step: int) -> None:
    """A loop over voxels gives the same mask and mean."""
    method = make("acmt", noise_std=0.0, consistency=1.0, ramp_length=0)
    method.student.conv.weight.data.mul_(4.0)  # from unsure to sure
    student, teacher = method.student.conv(batch.image[L:]), method.teacher.net.conv(batch.image[L:])
    output = method.step(batch, Progress(step, 200))
    threshold, distances = threshold_rampup(step, 200, 0.75, 0.95), []
    mask = output.masks["consistency"]
    voxels = zip(student.movedim(1, -1).reshape(-1, C).tolist(), teacher.movedim(1, -1).reshape(-1, C).tolist(),
                 mask.flatten().tolist(), strict=True)  # fmt: skip
    for own, other, kept in voxels:
        p, q = torch.tensor(own).double().softmax(0), torch.tensor(other).double().softmax(0)
        entropy = float(-(p * (p + 1e-6).log2()).sum())
        assert kept == (entropy >= threshold) or abs(entropy - threshold) < 1e-5
        if kept:
            distances += (p - q).square().tolist()
    assert 0 < len(distances) < mask.numel() * C
    assert float(output.losses["consistency"].detach()) == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_acmt_without_an_ambiguous_voxel_is_zero_not_nan(batch: Batch) -> None:
    method = make("acmt", threshold_start=1.5, threshold_stop=1.5)
    output = method.step(batch, halfway())
    assert not output.masks["consistency"].any()
    assert float(output.losses["consistency"].detach()) == 0.0


def test_self_training_is_supervised_first(batch: Batch) -> None:
    method = make("self-training")
    assert [phase.name for phase in method.phases()] == ["supervised", "round 1", "round 2"]
    output = method.step(batch, halfway(phase=0))
    assert output.losses.keys() == {"supervised"}
    assert output.guided[0].shape[0] == U
    assert method.snapshot.calls == []


def test_self_training_learns_the_labels_of_a_frozen_snapshot(batch: Batch) -> None:
    method = make("self-training", weight=0.5)
    method.step(batch, halfway(phase=1, phase_step=0))
    taken = method.snapshot.conv.weight.clone()
    assert torch.equal(taken, method.student.conv.weight)
    with torch.no_grad():
        method.student.conv.weight.neg_()
    output = method.step(batch, halfway(phase=1, phase_step=1))
    assert torch.equal(method.snapshot.conv.weight, taken)
    shown, training, grad = method.snapshot.calls[-1]
    assert torch.equal(shown, batch.image[L:])
    assert not training
    assert not grad
    own = class_map(method.snapshot.conv(batch.image[L:]))
    expected = 0.5 * ce_dice(method.student.conv(batch.image[L:]), own)
    torch.testing.assert_close(output.losses["self-training"], expected)
    method.step(batch, halfway(phase=2, phase_step=0))
    assert torch.equal(method.snapshot.conv.weight, method.student.conv.weight)


def test_self_training_has_as_many_rounds_as_asked_for() -> None:
    assert len(make("self-training", rounds=5).phases()) == 6


@pytest.mark.parametrize("name", registry.names("ssl"))
def test_all_methods_start_from_the_same_network(name: str) -> None:
    """Baselines, twins and bounds of one seed are comparable because the tested network is built first."""
    torch.manual_seed(0)
    reference = Spy()
    tested = make(name).predictor()
    assert all(torch.equal(a, b) for a, b in zip(tested.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("name", registry.names("ssl"))
def test_methods_work_in_half_precision(name: str, batch: Batch) -> None:
    """Under autocast the losses are float32, finite, and near those of float32."""
    outputs = []
    for enabled in (False, True):
        method = make(name)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(method.step(batch, halfway(phase=len(method.phases()) - 1)).losses)
    exact, half = outputs
    assert exact.keys() == half.keys()
    for key, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[key], rtol=0.05, atol=0.01)

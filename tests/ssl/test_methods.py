"""What each method does in a step, seen through networks that report how they were called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfrbench import registry
from cfrbench.contracts import Batch, Progress
from cfrbench.losses import ce_dice, ce_foreground_dice, softmax_mse
from cfrbench.schedules import threshold_rampup
from tests.ssl.spy import C, L, U, crops, halfway, make


@pytest.fixture
def batch() -> Batch:
    return crops()


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


@pytest.mark.parametrize("name", registry.names("ssl"))
def test_all_methods_start_from_the_same_network(name: str) -> None:
    """Baselines, twins and bounds of one seed are comparable because the tested network is built first."""
    vnet = registry.load("net", "vnet")
    segmenter = vnet(vnet.Config(width=2, depth=2))
    torch.manual_seed(0)
    reference = dict(segmenter.build(1, C).named_parameters())
    torch.manual_seed(0)
    predictor = registry.load("ssl", name)(lambda: segmenter.build(1, C), C).predictor()
    # Of several tested networks, as MCF has, it is the first.
    network = predictor.networks[0] if hasattr(predictor, "networks") else predictor
    tested = dict(network.named_parameters())
    # A method may put a classifier of another shape in place, as DTC does for two classes.
    assert all(name.startswith("out_conv.") for name in reference.keys() ^ tested.keys())
    assert all(torch.equal(reference[name], tested[name]) for name in reference.keys() & tested.keys())


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

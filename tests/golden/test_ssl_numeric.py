"""Losses, ramps, schedules, moving average and sampler against what the official repositories gave."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfrbench import averaging, losses, schedules
from tests.golden.ledger import ledger
from tests.golden.samplers import sampler_setups

BOOK = ledger("ssl_consistency")
CASES = sorted({key.split(".")[0] for key in BOOK.keys("c") if re.match(r"c\d+\.base\.", key)})


def tensor(key: str) -> Tensor:
    return torch.from_numpy(BOOK.take(key))


def close(got: Any, key: str) -> None:
    np.testing.assert_allclose(np.asarray(got), BOOK.take(key), rtol=1e-4, atol=1e-6)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def student(case: str) -> Tensor:
    return tensor(f"{case}.base.student_logits")


@pytest.fixture
def teacher(case: str) -> Tensor:
    return tensor(f"{case}.base.teacher_logits")


def test_there_are_cases() -> None:
    assert CASES


def test_supervised_losses(case: str, student: Tensor) -> None:
    labelled = int(BOOK.take(f"{case}.base.labeled_bs"))
    logits = student[:labelled]
    target = tensor(f"{case}.base.label")[:labelled].to(torch.uint8)
    probabilities = logits.softmax(1)
    weights = range(1, logits.shape[1] + 1)
    loss = f"{case}.loss"
    close(losses.foreground_dice_loss(probabilities[:, 1], target == 1), f"{loss}.dice_fg_labeled")
    close(losses.linear_dice_loss(probabilities[:, 1], target == 1), f"{loss}.dice1_fg_labeled")
    close(losses.dice_loss(probabilities, target), f"{loss}.dice_multiclass_labeled")
    close(losses.dice_loss(probabilities, target), f"{loss}.dice_multiclass_softmaxflag")
    close(losses.dice_loss(probabilities, target, weights=list(weights)), f"{loss}.dice_multiclass_weighted")
    close(losses.cross_entropy(logits, target), f"{loss}.ce_labeled")
    multiclass = BOOK.take(f"{loss}.ce_labeled") + BOOK.take(f"{loss}.dice_multiclass_labeled")
    foreground = BOOK.take(f"{loss}.ce_labeled") + BOOK.take(f"{loss}.dice_fg_labeled")
    assert float(losses.ce_dice(logits, target)) == pytest.approx(multiclass / 2, rel=1e-4)
    assert float(losses.ce_foreground_dice(logits, target)) == pytest.approx(foreground / 2, rel=1e-4)


def test_consistency_losses(case: str, student: Tensor, teacher: Tensor) -> None:
    loss = f"{case}.loss"
    close(losses.softmax_mse(student, teacher), f"{loss}.softmax_mse")
    close(losses.softmax_kl(student, teacher), f"{loss}.softmax_kl_elementwise")
    close(losses.softmax_kl_mean(student, teacher), f"{loss}.softmax_kl_mean")
    close(losses.sigmoid_mse(student, teacher), f"{loss}.sigmoid_mse")
    close(losses.sigmoid_kl_mean(student, teacher), f"{loss}.sigmoid_kl_mean")
    close(losses.softmax_dice(student, teacher), f"{loss}.softmax_dice")
    close(losses.symmetric_mse(student, teacher), f"{loss}.symmetric_mse")


def test_entropies(case: str, student: Tensor) -> None:
    probabilities = student.softmax(1)
    for word, normalised in (("normalised", True), ("raw", False)):
        entropy = losses.entropy_map(probabilities, normalised)
        close(entropy, f"{case}.loss.entropy_{word}_map")
        close(entropy.mean(), f"{case}.loss.entropy_{word}_mean")


def test_consistency_weight_at_the_step_of_a_case(case: str) -> None:
    # The stored weights belong to the methods; the step itself is asserted to be on the ramp they use.
    step = int(BOOK.take(f"{case}.base.iter_num"))
    total = int(BOOK.take(f"{case}.base.max_iterations"))
    weights = [BOOK.arrays[key] for key in BOOK.keys(f"{case}.mt.consistency_weight")]
    assert 0 <= step < total
    assert weights
    for weight in weights:
        assert schedules.consistency_weight(step, 0.1, 40) == pytest.approx(float(weight))


RAMPS: dict[str, Callable[[float, float], float]] = {
    "sigmoid_rampup": schedules.sigmoid_rampup,
    "linear_rampup": schedules.linear_rampup,
}


@pytest.mark.parametrize("name", RAMPS)
def test_rampups(name: str) -> None:
    current, lengths = BOOK.take("ramps.current"), BOOK.take("ramps.lengths")
    close([[RAMPS[name](c, length) for c in current] for length in lengths], f"ramps.{name}")


def test_cosine_rampdown() -> None:
    keys = BOOK.keys("ramps.cosine_rampdown_len")
    assert keys
    for key in keys:
        length = float(key.removeprefix("ramps.cosine_rampdown_len"))
        close([schedules.cosine_rampdown(c, length) for c in BOOK.take("ramps.current")], key)


def test_consistency_weights() -> None:
    keys = BOOK.keys("sched.cons_weight_")
    assert keys
    for key in keys:
        maximum, length = (float(part) for part in re.findall(r"[\d.]+", key.removeprefix("sched.cons_weight_")))
        weights = [schedules.consistency_weight(int(t), maximum, length) for t in BOOK.take("sched.iters")]
        close(weights, key)


THRESHOLDS = {"uamt": (0.75, 1.0), "acmt_ent": (0.75, 0.95), "acmt_mu": (0.75, 0.9)}


@pytest.mark.parametrize("method", THRESHOLDS)
def test_thresholds(method: str) -> None:
    keys = BOOK.keys(f"sched.{method}_threshold_max")
    assert keys
    for key in keys:
        total = int(key.rpartition("max")[2])
        steps = BOOK.take(f"sched.threshold_iters_max{total}")
        ours = np.array([schedules.threshold_rampup(int(t), total, *THRESHOLDS[method]) for t in steps])
        # Thresholds of entropies that are not normalised were stored with their factor ln C.
        close(ours * (1.0 if method == "acmt_ent" else np.log(2.0)), key)


LEARNING_RATES: dict[str, schedules.LearningRatePolicy] = {"step": "step", "poly_mt": "poly-a", "poly_cps": "poly-b"}


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_learning_rates(name: str) -> None:
    keys = [key for key in BOOK.keys("lr.") if re.match(rf"lr\.{name}\d*_base", key)]
    assert keys
    for key in keys:
        numbers = dict(re.findall(r"(step|base|max)(\d+\.?\d*)", key))
        # The officials write the step's 2500 down; ours is that share of training.
        total = int(numbers["max"]) if "max" in numbers else int(numbers["step"]) * 6000 // 2500
        steps = BOOK.take("lr.step_index")
        close(
            [schedules.learning_rate(LEARNING_RATES[name], float(numbers["base"]), int(t), total) for t in steps], key
        )


class Vector(nn.Module):
    """A network of one parameter vector and one buffer."""

    def __init__(self, values: Tensor, buffer: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())
        self.register_buffer("statistic", buffer.clone())


def test_moving_average_of_parameters_but_not_of_buffers() -> None:
    buffers, steps = tensor("ema.teacher_buffer_after"), BOOK.take("ema.global_steps")
    teacher = Vector(tensor("ema.teacher_init"), torch.zeros_like(buffers[0]))
    after = []
    for step, values in zip(steps, tensor("ema.student_params"), strict=True):
        student = Vector(values, torch.full_like(buffers[0], float(step) + 1.0))
        averaging.update_ema(teacher, student, schedules.ema_decay(int(step)))
        after.append((teacher.values.detach().clone(), teacher.get_buffer("statistic").clone()))
    close([schedules.ema_decay(int(step)) for step in steps], "ema.alpha_used")
    close(torch.stack([values for values, _ in after]), "ema.teacher_after")
    assert torch.equal(torch.stack([buffer for _, buffer in after]), buffers)


def test_two_stream_sampler() -> None:
    batches, length = BOOK.take("sampler.two_epochs"), int(BOOK.take("sampler.len"))
    epochs = list(batches.reshape(-1, length, batches.shape[1]))
    assert sampler_setups(epochs, seeds=[int(BOOK.take("sampler.seed"))])

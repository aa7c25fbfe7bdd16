"""Laws of the schedules between the points that the golden files store."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfrbench import schedules
from cfrbench.errors import ConfigError

STEPS = st.integers(0, 20_000)


@given(STEPS, st.integers(1, 400))
def test_ramps_stay_between_0_and_1_and_move_one_way(current: int, length: int) -> None:
    for ramp, sign in ((schedules.sigmoid_rampup, 1), (schedules.linear_rampup, 1), (schedules.cosine_rampdown, -1)):
        now, later = ramp(current, length), ramp(current + 1, length)
        assert 0.0 <= now <= 1.0
        assert sign * (later - now) >= 0.0


def test_ramps_start_and_end_where_they_should() -> None:
    assert schedules.sigmoid_rampup(0, 40) == pytest.approx(math.exp(-5))
    assert [ramp(40, 40) for ramp in (schedules.sigmoid_rampup, schedules.linear_rampup)] == [1.0, 1.0]
    assert [ramp(0, 0) for ramp in (schedules.sigmoid_rampup, schedules.linear_rampup)] == [1.0, 1.0]
    assert (schedules.cosine_rampdown(0, 40), schedules.cosine_rampdown(40, 40)) == (1.0, 0.0)
    assert schedules.cosine_rampdown(0, 0) == 0.0


def test_the_consistency_weight_moves_once_in_150_steps() -> None:
    weights = [schedules.consistency_weight(step, 0.1, 40) for step in range(301)]
    assert len(set(weights[:150])) == len(set(weights[150:300])) == 1
    assert weights[149] < weights[150] < weights[300]
    short = [schedules.consistency_weight(step, 0.1, 40, epoch_steps=10) for step in range(0, 301, 10)]
    assert len(set(short)) == len(short)


def test_thresholds_run_from_start_to_stop() -> None:
    assert schedules.threshold_rampup(0, 6000, 0.75, 1.0) == pytest.approx(0.75 + 0.25 * math.exp(-5))
    assert schedules.threshold_rampup(6000, 6000, 0.75, 1.0) == 1.0


@given(st.integers(0, 6000))
def test_the_step_policy_is_the_official_one_at_6000(step: int) -> None:
    assert schedules.learning_rate("step", 0.01, step, 6000) == pytest.approx(0.01 * 0.1 ** (step // 2500))


def test_the_step_policy_shrinks_with_training() -> None:
    rates = [schedules.learning_rate("step", 0.01, step, 12) for step in range(12)]
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 2)


@given(STEPS, st.integers(1, 10_000))
def test_every_policy_is_between_0_and_base(step: int, total: int) -> None:
    for policy in schedules.POLICIES:
        rate = schedules.learning_rate(policy, 0.01, step, total)
        assert 0.0 <= rate <= 0.01
        assert isinstance(rate, float)


@given(st.integers(1, 5999))
def test_poly_a_is_poly_b_one_step_late(step: int) -> None:
    late = schedules.learning_rate("poly-a", 0.01, step, 6000)
    assert late == schedules.learning_rate("poly-b", 0.01, step - 1, 6000)


def test_fine_tuning_warms_up_in_a_line_and_then_decays() -> None:
    rates = [schedules.learning_rate("finetune", 1.0, step, 1000, warmup_steps=250) for step in range(1000)]
    assert rates[:250] == pytest.approx([(step + 1) / 250 for step in range(250)])
    assert rates[249] == rates[250] == 1.0
    assert rates[250:] == sorted(rates[250:], reverse=True)
    plain = schedules.learning_rate("finetune", 1.0, 400, 1000)
    assert plain == schedules.learning_rate("poly-b", 1.0, 400, 1000)


def test_an_unknown_policy_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"'poly'.*Known: constant, finetune, poly-a, poly-b, step"):
        schedules.learning_rate("poly", 0.01, 0, 10)  # type: ignore[arg-type]


def test_the_teacher_is_a_copy_first_and_slow_later() -> None:
    assert schedules.ema_decay(0) == 0.0
    assert schedules.ema_decay(98) < schedules.ema_decay(99) == 0.99 == schedules.ema_decay(10_000)
    assert schedules.ema_decay(10_000, maximum=0.999) == 0.999

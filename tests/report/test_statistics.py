"""Intervals, tests and ranks against oracles, laws, and simulations whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cfrbench.report import statistics
from cfrbench.report.statistics import crossed_interval, holm, mean_interval, ranking, signed_rank_p, smallest_p, wins

Array = NDArray[np.float64]


def draws(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Array, float]:
    """Simulated differences and the mean they are drawn with; ``failures``: 30 % of cases gain 50, the others 8."""
    if kind == "failures":
        failed = rng.random(shape) < 0.3
        return np.where(failed, rng.normal(50, 8, shape), rng.normal(8, 6, shape)), 0.3 * 50 + 0.7 * 8
    made: dict[str, tuple[Array, float]] = {
        "normal": (rng.standard_normal(shape), 0.0),
        "t5": (rng.standard_t(5, shape), 0.0),
        "gamma": (rng.gamma(4, 1, shape), 4.0),
        "exponential": (rng.exponential(1, shape), 1.0),
    }
    return made[kind]


def covered(intervals: Array, truth: float) -> float:
    """Percentage of intervals ``(n, 2)`` that hold the truth."""
    return float(100 * ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean())


# ---------------------------------------------------------------------------------------------------------------------
# one mean


@pytest.mark.parametrize("cases", [8, 20, 60])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(cases: int) -> None:
    values, truth = draws("normal", (2000, cases), np.random.default_rng(cases))
    assert 93 <= covered(mean_interval(values, resamples=999), truth) <= 97


@pytest.mark.slow
@pytest.mark.parametrize("cases", [8, 20, 60])
@pytest.mark.parametrize("kind", ["normal", "t5", "gamma", "exponential", "failures"])
def test_coverage_over_shapes_of_differences(kind: str, cases: int) -> None:
    rng = np.random.default_rng([cases, 7])
    parts = [draws(kind, (250, cases), rng) for _ in range(40)]
    found = np.mean([covered(mean_interval(values, resamples=1999), truth) for values, truth in parts])
    assert 93 - 0.5 <= found <= (99 if kind == "failures" else 97)


@pytest.mark.slow
def test_a_plain_percentile_interval_of_eight_cases_covers_too_rarely() -> None:
    rng = np.random.default_rng(8)
    values, truth = draws("normal", (4000, 8), rng)
    means = values @ statistics._shares(8, 1999).T
    assert covered(np.quantile(means, [0.025, 0.975], axis=1).T, truth) < 91


def test_it_is_the_studentised_bootstrap_written_as_loops() -> None:
    values = np.array([3.0, -1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    ratios = []
    for shares in statistics._shares(len(values), 199):
        resample = np.repeat(values, np.round(shares * len(values)).astype(int))
        error = resample.std(ddof=0) / np.sqrt(len(values) - 1)
        ratios.append((resample.mean() - values.mean()) / error)
    low, high = np.sort(ratios)[[int(np.ceil(0.025 * 199)) - 1, int(np.ceil(0.975 * 199)) - 1]]
    error = values.std(ddof=1) / np.sqrt(len(values))
    expected = values.mean() - high * error, values.mean() - low * error
    assert mean_interval(values, resamples=199) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[1.0, 4.0], [3.0, 1.0, 2.5], [0.0, 7.0, 2.0, 2.0], [0.0] * 7 + [8.0]])
def test_few_or_mostly_equal_values_get_students_t(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(np.array(values)) == pytest.approx([expected.low, expected.high])


def test_equal_values_have_a_point_and_one_value_has_no_interval() -> None:
    assert mean_interval(np.full(8, 2.5)) == pytest.approx([2.5, 2.5])
    assert np.isnan(mean_interval(np.array([2.5]))).all()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(-50, 50), min_size=5, max_size=12, unique=True),
    st.floats(-20, 20),
    st.sampled_from([0.5, 2.0, 10.0]),
)
def test_shifting_and_scaling_moves_the_interval_with_the_values(values: list[int], shift: float, scale: float) -> None:
    plain = mean_interval(np.array(values, float), resamples=299)
    moved = mean_interval(np.array(values) * scale + shift, resamples=299)
    assert moved == pytest.approx(plain * scale + shift, abs=1e-6)
    assert plain[0] <= np.mean(values) <= plain[1]


def test_many_means_at_once_are_the_same_as_one_by_one() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 9))
    together = mean_interval(values)
    assert together.shape == (2, 3, 2)
    assert together[1, 2] == pytest.approx(mean_interval(values[1, 2]))
    assert (mean_interval(values) == together).all()


# ---------------------------------------------------------------------------------------------------------------------
# seeds and cases


def test_without_an_effect_of_seeds_the_crossed_interval_is_that_of_the_cases() -> None:
    cases = np.array([1.0, 5.0, 2.0, 8.0, 3.0])
    expected = stats.ttest_1samp(cases, 0.0).confidence_interval(0.95)
    found = crossed_interval(np.tile(cases, (3, 1)))
    assert found == pytest.approx([expected.low, expected.high])


def test_without_an_effect_of_cases_it_is_that_of_the_seeds() -> None:
    seeds = np.array([1.0, 5.0, 2.0])
    expected = stats.ttest_1samp(seeds, 0.0).confidence_interval(0.95)
    assert crossed_interval(np.tile(seeds[:, None], (1, 8))) == pytest.approx([expected.low, expected.high])


def test_one_seed_or_one_case_says_nothing_about_others() -> None:
    assert np.isnan(crossed_interval(np.ones((1, 8)))).all()
    assert np.isnan(crossed_interval(np.ones((3, 1)))).all()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("cases", [8, 20])
def test_coverage_over_seeds_and_cases(seeds: int, cases: int) -> None:
    rng = np.random.default_rng([seeds, cases])
    shape = (1500, seeds, cases)
    values = (0.2 * rng.standard_normal((1500, seeds, 1)) + rng.standard_normal((1500, 1, cases))
              + 0.5 * rng.standard_normal(shape))  # fmt: skip
    assert 92.5 <= covered(np.array([crossed_interval(one, resamples=999) for one in values]), 0.0) <= 98


# ---------------------------------------------------------------------------------------------------------------------
# tests


def by_all_signs(differences: Array) -> float:
    """The exact p of the signed-rank test: all sign flips of the ranks, zeros left out."""
    kept = differences[differences != 0]
    ranks = stats.rankdata(np.abs(kept))
    observed = abs((ranks * np.sign(kept)).sum())
    flips = np.array(list(itertools.product([-1, 1], repeat=len(kept)))) @ ranks
    return float((np.abs(flips) >= observed - 1e-9).mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [9, 0])
def test_signed_rank_p_is_exact_for_few_cases_with_ties_and_zeros(seed: int, decimals: int) -> None:
    values = np.round(np.random.default_rng(seed).normal(0.7, 1.2, 8), decimals)
    assert signed_rank_p(values) == pytest.approx(by_all_signs(values))


@pytest.mark.parametrize("cases", [20, 60])
@pytest.mark.parametrize("decimals", [6, 0])
def test_signed_rank_p_is_that_of_scipy(cases: int, decimals: int) -> None:
    values = np.round(np.random.default_rng(cases).normal(0.3, 1.5, cases), decimals)
    assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values).pvalue)


def test_last_bits_make_no_ranks_and_identical_rows_no_difference() -> None:
    assert signed_rank_p(np.array([0.1 + 0.2, 0.3, -0.3, 0.3, 0.3])) == pytest.approx(
        signed_rank_p(np.array([0.3, 0.3, -0.3, 0.3, 0.3]))
    )
    assert signed_rank_p(np.zeros(8)) == 1.0
    assert np.isnan(signed_rank_p(np.array([])))


def test_the_smallest_p_is_that_of_equal_signs() -> None:
    for cases in (3, 5, 8):
        assert smallest_p(cases) == pytest.approx(signed_rank_p(np.arange(1.0, cases + 1)))
    assert smallest_p(8, 8) == pytest.approx(8 * 2 / 256)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.04, 0.05, 0.3, 1.0]) | st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="the extra `test` brings statsmodels")
    assert holm(np.array(p)) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_a_missing_p_is_no_comparison() -> None:
    found = holm(np.array([0.02, np.nan, 0.03]))
    assert found[[0, 2]] == pytest.approx([0.04, 0.04])
    assert np.isnan(found[1])


def test_wins_losses_ties() -> None:
    assert wins(np.array([2.0, -1.0, 0.0, 1e-12, 5.0])) == (2, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [8, 20])
def test_identical_methods_are_called_different_in_at_most_five_percent_of_tables(cases: int) -> None:
    rng = np.random.default_rng(cases)
    tables, pairs = 2000, list(itertools.combinations(range(4), 2))
    wrong = 0
    for _ in range(tables):
        # four methods of one quality: hard and easy cases are shared, what differs is noise
        scores = 80 + 8 * rng.standard_normal((1, cases)) + 3 * rng.standard_normal((4, cases))
        p = np.array([signed_rank_p(scores[one] - scores[other]) for one, other in pairs])
        wrong += bool((holm(p) < 0.05).any())
    assert wrong / tables <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tables)


# ---------------------------------------------------------------------------------------------------------------------
# ranks

#: means 80, 75, 75, 60; by case the first row is 1st, 2nd, 1st and so on
HAND = np.array([[90.0, 70.0, 80.0], [80.0, 75.0, 70.0], [80.0, 70.0, 75.0], [60.0, 55.0, 65.0]])


def test_ranks_of_a_hand_made_table() -> None:
    found = ranking(HAND)
    assert found.rank.tolist() == [1.0, 2.5, 2.5, 4.0]
    assert found.of_cases.tolist() == pytest.approx([(1 + 2.5 + 1) / 3, (2.5 + 1 + 3) / 3, (2.5 + 2.5 + 2) / 3, 4.0])
    assert ranking(HAND, higher_is_better=False).rank.tolist() == [4.0, 2.5, 2.5, 1.0]


def test_rank_stability_counts_every_resample_of_three_cases() -> None:
    expected = []
    for resample in itertools.product(range(3), repeat=3):
        means = HAND[:, list(resample)].mean(1)
        best = np.isclose(means, means.max())
        expected.append(best / best.sum())
    assert ranking(HAND).first == pytest.approx(np.mean(expected, axis=0), abs=0.02)
    assert ranking(HAND).first.sum() == pytest.approx(1.0)


def test_stability_is_the_mean_kendall_tau_of_scipy() -> None:
    found = ranking(HAND, resamples=99)
    taus = [stats.kendalltau(found.rank, sample).statistic for sample in found.samples.T]
    assert found.stability == pytest.approx(np.nan_to_num(taus).mean())


def test_identical_rows_share_ranks_in_every_resample() -> None:
    found = ranking(np.tile(HAND[0], (3, 1)))
    assert (found.samples == 2.0).all()
    assert found.first == pytest.approx([1 / 3] * 3)


def test_what_cannot_be_told_apart_is_half_a_t_interval() -> None:
    differences = np.array([[1.0, 3.0, 2.0, 6.0]])
    low, high = stats.ttest_1samp(differences[0], 0.0).confidence_interval(0.95)
    assert statistics.detectable(differences) == pytest.approx((high - low) / 2)
    assert np.isnan(statistics.detectable(np.empty((0, 8))))

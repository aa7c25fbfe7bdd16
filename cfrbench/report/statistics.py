"""What paired scores of few cases can and cannot say: intervals, tests, ranks. Arrays in, numbers out; no frames here.

Everything is computed from stored scores, draws its random numbers from a fixed seed, and is vectorised over resamples:
resampling with replacement is drawn as counts, so that every mean of every resample is one matrix product. How often
the intervals hold the truth is measured in docs/statistics.md.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 9999
SEED = 20240
#: with fewer values than this a bootstrap knows too few different resamples, and Student's t is used
FEW = 5
#: to so many differences every sign flip is tried, as scipy's ``auto`` does; beyond, scipy.stats, half a second to load
_ALL_SIGNS = 13
#: a resample whose values differ by less than this share of the sample's deviation has no spread
_FLAT = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# intervals


def mean_interval(values: Array, resamples: int = RESAMPLES) -> Array:
    """A 95 % interval of the mean of ``values`` ``(..., n)``, as ``(..., 2)``; NaN for one value.

    The studentised bootstrap (Efron and Tibshirani 1993, section 12.5): the deviation of each resample's mean is
    divided by that resample's own standard error. Student's t where there are fewer than `FEW` values, or where so many
    are equal that too many resamples have no spread.
    """
    values = np.asarray(values, dtype=float)
    count = values.shape[-1]
    if count < 2:
        return np.full((*values.shape[:-1], 2), np.nan)
    mean = values.mean(-1, keepdims=True)
    error = values.std(-1, ddof=1, keepdims=True) / np.sqrt(count)
    student: Array = mean + error * stdtrit(count - 1, _tails())
    if count < FEW:
        return student
    away = values - mean
    shares = _shares(count, resamples)
    centre = away @ shares.T
    spread = np.sqrt(np.maximum((away**2) @ shares.T - centre**2, 0.0) / (count - 1))
    return _studentised(mean, error, centre, spread, student)


def crossed_interval(values: Array, resamples: int = RESAMPLES) -> Array:
    """A 95 % interval of the mean of ``values`` ``(seeds, cases)`` that holds for other seeds and for other cases.

    Seeds and cases are crossed random effects (the same cases are predicted under every seed), so both are resampled
    (Owen 2007, the pigeonhole bootstrap), and each resample's mean is divided by its own standard error. With fewer
    than `FEW` seeds or cases: t with Satterthwaite's degrees of freedom. NaN with one seed or one case.
    """
    values = np.asarray(values, dtype=float)
    if min(values.shape) < 2:
        return np.full(2, np.nan)
    away = values - values.mean()
    variances = _variances(
        away, np.full((1, len(values)), 1 / len(values)), np.full((1, away.shape[1]), 1 / away.shape[1])
    )
    error, freedom = variances.error, variances.freedom(values.shape)
    student: Array = values.mean() + error * stdtrit(freedom, _tails())
    if min(values.shape) < FEW:
        return student
    resampled = _variances(away, _shares(len(values), resamples), _shares(away.shape[1], resamples, stream=1))
    return _studentised(np.array([values.mean()]), error, resampled.centre, resampled.error, student)


class Variances(NamedTuple):
    """Mean squares of a crossed table of resamples ``(resamples,)``, and the standard error of its mean."""

    centre: Array
    seeds: Array
    cases: Array
    rest: Array
    error: Array

    def freedom(self, shape: tuple[int, ...]) -> Array:
        """Satterthwaite's degrees of freedom of the squared error."""
        seeds, cases = shape[0] - 1, shape[1] - 1
        parts = self.seeds**2 / seeds + self.cases**2 / cases + self.rest**2 / (seeds * cases)
        whole = (self.error**2 * shape[0] * shape[1]) ** 2
        return np.maximum(np.divide(whole, parts, out=np.ones_like(whole), where=parts > 0), 1.0)


def _variances(values: Array, seeds: Array, cases: Array) -> Variances:
    """Mean squares of ``values`` ``(S, C)`` whose rows weigh ``seeds`` ``(B, S)`` and columns ``cases`` ``(B, C)``."""
    s, c = values.shape
    rows, columns = cases @ values.T, seeds @ values
    centre = (rows * seeds).sum(1)
    of_rows = np.maximum((rows**2 * seeds).sum(1) - centre**2, 0.0)
    of_columns = np.maximum((columns**2 * cases).sum(1) - centre**2, 0.0)
    total = np.maximum(((cases @ (values**2).T) * seeds).sum(1) - centre**2, 0.0)
    between_seeds, between_cases = s * c * of_rows / (s - 1), s * c * of_columns / (c - 1)
    rest = np.maximum(s * c * (total - of_rows - of_columns), 0.0) / ((s - 1) * (c - 1))
    # The unbiased sum can be negative where neither effect is there; either effect alone is a lower bound.
    squared = np.maximum(between_seeds + between_cases - rest, np.maximum(between_seeds, between_cases))
    return Variances(centre, between_seeds, between_cases, rest, np.sqrt(squared / (s * c)))


def _studentised(mean: Array, error: Array, centre: Array, spread: Array, student: Array) -> Array:
    """Intervals from resamples on the last axis; ``student`` where too many of them have no spread."""
    flat = spread <= _FLAT * error
    ratio = np.where(flat, 0.0, centre) / np.where(flat, 1.0, spread)
    endless = np.copysign(np.inf, centre)
    tails = np.quantile(np.where(flat & (centre != 0), endless, ratio), _tails()[::-1], axis=-1, method="inverted_cdf")
    tails = np.moveaxis(tails, 0, -1)
    usable = np.isfinite(tails).all(-1, keepdims=True)
    return np.where(usable, mean - np.where(usable, tails, 0.0) * error, student)


def _tails() -> Array:
    return np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])


@lru_cache(maxsize=16)
def _shares(count: int, resamples: int, stream: int = 0) -> Array:
    """How much of each resample every one of ``count`` values is ``(resamples, count)``; read-only, drawn once."""
    generator = np.random.default_rng([SEED, count, stream])
    shares: Array = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    shares.flags.writeable = False  # every caller gets the same array
    return shares


def detectable(differences: Array) -> float:
    """The difference under which rows cannot be told apart: half a 95 % t interval of ``differences`` ``(pairs, n)``.

    The median over the pairs; NaN for one case or no pair.
    """
    count = differences.shape[-1]
    if count < 2 or not len(differences):
        return float("nan")
    errors = differences.std(-1, ddof=1) / np.sqrt(count)
    return float(np.median(errors) * stdtrit(count - 1, (1 + LEVEL) / 2))


# ---------------------------------------------------------------------------------------------------------------------
# tests


def signed_rank_p(differences: Array) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are left out, 1 if all are zero, NaN without a case.

    scipy's ``auto``: exact to 50 cases without ties or zeros, by all sign flips to 13 cases with them, else by the
    normal approximation. Differences are rounded to 1e-9, so that equal ones are ties whatever their last bits.
    """
    rounded = np.round(np.asarray(differences, dtype=float), 9)
    if not rounded.size:
        return float("nan")
    if not rounded.any():
        return 1.0
    if len(rounded) <= _ALL_SIGNS:
        return _by_all_signs(rounded[rounded != 0])
    from scipy import stats

    with warnings.catch_warnings():
        # scipy warns that its approximation is rough for few untied cases; docs/statistics.md says when it is used.
        warnings.filterwarnings("ignore", message="Sample size too small")
        return float(stats.wilcoxon(rounded, zero_method="wilcox", method="auto").pvalue)


def _by_all_signs(differences: Array) -> float:
    """Share of all sign flips of ``differences`` ``(n,)``, none zero, whose rank sum is as far from its mean."""
    sizes = np.abs(differences)
    above = sizes[:, None] > sizes
    doubled_ranks = above.sum(1) + (~above.T).sum(1) + 1  # of equal sizes the mean rank: whole numbers when doubled
    flips = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
    away = np.abs((2 * flips - 1) @ doubled_ranks)
    return float((away >= abs(np.sign(differences) @ doubled_ranks)).mean())


def holm(p: Array) -> Array:
    """Holm's step-down adjusted p, in the order given; NaN stays NaN and counts as no comparison."""
    p = np.asarray(p, dtype=float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def smallest_p(cases: int, comparisons: int = 1) -> float:
    """The smallest p that the signed-rank test can give for so many cases, times the number of comparisons."""
    return min(1.0, comparisons * 2.0 ** (1 - cases))


def wins(differences: Array) -> tuple[int, int, int]:
    """How many differences are above, below and at zero."""
    rounded = np.round(differences, 9)
    return int((rounded > 0).sum()), int((rounded < 0).sum()), int((rounded == 0).sum())


# ---------------------------------------------------------------------------------------------------------------------
# ranks


class Ranking(NamedTuple):
    """Ranks of k rows, 1 is best, equal ones share the mean rank; arrays ``(k,)``, ``samples`` ``(k, resamples)``.

    ``rank``: of the means over cases. ``low`` and ``high``: 95 % of the ranks over resampled cases. ``first``: share of
    the resamples in which a row is first, split among ties. ``of_cases``: the mean of the ranks within each case.
    """

    rank: Array
    low: Array
    high: Array
    first: Array
    of_cases: Array
    samples: Array

    @property
    def stability(self) -> float:
        """Mean Kendall tau-b between the ranking and that of each resample; NaN where all rows are equal."""
        sign = np.sign(self.rank[:, None] - self.rank[None])
        signs = np.sign(self.samples[:, None] - self.samples[None])
        agreement = (sign[..., None] * signs).sum((0, 1))
        norm = np.sqrt((sign**2).sum() * (signs**2).sum((0, 1)))
        if not sign.any():
            return float("nan")
        return float(np.divide(agreement, norm, out=np.zeros_like(agreement), where=norm > 0).mean())


def ranking(values: Array, *, higher_is_better: bool = True, resamples: int = RESAMPLES) -> Ranking:
    """Rank rows of ``values`` ``(k, cases)`` by their means, and again in every resample of the cases."""
    signed = -np.asarray(values, dtype=float) if higher_is_better else np.asarray(values, dtype=float)
    from scipy import stats

    means = signed @ _shares(signed.shape[1], resamples).T
    samples = stats.rankdata(np.round(means, 9), axis=0)
    low, high = np.quantile(samples, _tails(), axis=1, method="inverted_cdf")
    best = samples == samples.min(0)
    return Ranking(
        rank=stats.rankdata(np.round(signed.mean(1), 9)),
        low=low,
        high=high,
        first=(best / best.sum(0)).mean(1),
        of_cases=stats.rankdata(np.round(signed, 9), axis=0).mean(1),
        samples=samples,
    )

"""Numbers of many cases: their mean with its uncertainty, and the difference between two methods."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 5000
SEED = 0  # the same cases give the same interval
LEVEL = 0.95
FEWEST_DIFFERENCES = 6  # with five the signed-rank test cannot reach p < 0.05, however clear they are


@dataclass(frozen=True)
class Summary:
    """A number over the cases of a cohort where it is defined.

    Attributes:
        n: number of cases where it is defined.
        mean: mean, NaN without a case.
        deviation: sample standard deviation (n - 1), NaN below two cases.
        low: lower end of the 95 % bootstrap interval of the mean, NaN below two cases.
        high: its upper end.
    """

    n: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """How one number differs between two methods on the same cases: first minus second.

    Attributes:
        n: cases where both have the number.
        first_mean: mean of the first method over these cases.
        second_mean: mean of the second method over these cases.
        median_difference: median over the cases.
        mean_difference: mean over the cases.
        low: lower end of the 95 % bootstrap interval of the mean difference, NaN below two cases.
        high: its upper end.
        p_value: of Wilcoxon's signed-rank test, two-sided; NaN where it was not made.
        remark: why not, else empty.
    """

    n: int
    first_mean: float
    second_mean: float
    median_difference: float
    mean_difference: float
    low: float
    high: float
    p_value: float
    remark: str


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean, from cases drawn with replacement.

    Args:
        values: (N,), without NaN.

    Returns:
        Both ends, the same on every run; NaN below two values.
    """
    if values.size < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(SEED).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def summarize(numbers: Sequence[float]) -> Summary:
    """Mean, standard deviation and bootstrap interval of the mean; NaN are left out."""
    values = np.asarray(numbers, float)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else math.nan
    deviation = float(values.std(ddof=1)) if values.size > 1 else math.nan
    return Summary(int(values.size), mean, deviation, *bootstrap_interval(values))


def compare_paired(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Differences of two methods case by case, with Wilcoxon's signed-rank test.

    Cases where both agree say nothing about a direction, and the test leaves them out.

    Args:
        first: (N,), one number per case; NaN where it has none.
        second: (N,), the same cases in the same order.
    """
    pairs = np.array([first, second], float).reshape(2, -1)
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    # Numbers that agree may differ in their last bit, by the order in which they were computed.
    differences = np.round(pairs[0] - pairs[1], 12)
    n, unequal = differences.size, int(np.count_nonzero(differences))
    nothing = (math.nan,) * 4
    means = pairs.mean(axis=1) if n else nothing
    median, mean = (float(np.median(differences)), float(differences.mean())) if n else nothing[:2]
    p_value, remark = math.nan, ""
    if not n:
        remark = "no case has the number in both"
    elif not unequal:
        remark = "equal in every case"
    elif unequal < FEWEST_DIFFERENCES:
        remark = f"{unequal} differ, a test needs {FEWEST_DIFFERENCES}"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ties, which the test corrects for
            p_value = float(stats.wilcoxon(differences[differences != 0]).pvalue)
    interval = bootstrap_interval(differences)
    return PairedTest(n, float(means[0]), float(means[1]), median, mean, *interval, p_value, remark)

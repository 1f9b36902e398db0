import numpy as np
import pytest
from scipy import stats

from tdistill.evaluation import bootstrap
from tdistill.evaluation.bootstrap import (
    bootstrap_mean,
    bootstrap_mean_difference,
    bootstrap_ratio,
    bootstrap_ratio_difference,
)


def width(interval):
    return interval.high - interval.low


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=200)
    interval = bootstrap_mean(values, seed=0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 499)
    hits_mean = hits_ratio = 0
    for trial in range(300):
        rng = np.random.default_rng(trial)
        counts = rng.integers(5, 60, size=40)
        values = rng.normal(1.5, 1.0, size=40)  # per token, so the ratio of sums estimates 1.5 as well
        mean, ratio = bootstrap_mean(values, seed=trial), bootstrap_ratio(values * counts, counts, seed=trial)
        hits_mean += mean.low <= 1.5 <= mean.high
        hits_ratio += ratio.low <= 1.5 <= ratio.high
    # 0.95 ± 4 standard errors (0.0126), less 0.03 for 40 prompts.
    assert 0.87 <= hits_mean / 300 <= 0.999
    assert 0.87 <= hits_ratio / 300 <= 0.999


SKEWED = np.random.default_rng(8)
DATA = {
    "skewed": (SKEWED.gamma(0.3, size=(2, 25)), SKEWED.integers(1, 50, size=(2, 25))),
    "few": (np.array([[1.0, 2.0, 4.0], [0.5, 0.0, 9.0]]), np.array([[1, 1, 1], [3, 1, 2]])),
    "one that outweighs the others": (np.array([[1e6, 1.0, 2.0, 0.5], [3.0, 1.0, 2.0, 0.5]]), np.ones((2, 4))),
    "two values": (np.array([[0.0] * 9 + [1.0], [1.0] * 9 + [0.0]]), np.ones((2, 10))),
}


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("name", DATA)
def test_intervals_are_those_of_scipy(name, level):
    (sums_a, sums_b), (counts_a, counts_b) = DATA[name]

    def expected(data, statistic):
        rng = np.random.default_rng(3)
        found = stats.bootstrap(data, statistic, paired=True, confidence_level=level, n_resamples=9999, rng=rng)
        return (found.confidence_interval.low, found.confidence_interval.high)

    ratio = bootstrap_ratio(sums_a, counts_a, seed=3, level=level)
    assert ratio[1:] == pytest.approx(
        expected((sums_a, counts_a), lambda s, c, axis=-1: s.sum(axis) / c.sum(axis)), rel=1e-9
    )
    difference = bootstrap_ratio_difference(sums_a, counts_a, sums_b, counts_b, seed=3, level=level)
    assert difference[1:] == pytest.approx(
        expected(
            (sums_a, counts_a, sums_b, counts_b),
            lambda s, c, t, d, axis=-1: s.sum(axis) / c.sum(axis) - t.sum(axis) / d.sum(axis),
        ),
        rel=1e-9,
    )


def test_a_ratio_weighs_tokens_and_not_prompts():
    # 2 nats over 1 token and 3 nats over 9: 5 / 10 a token, not the mean of 2 and 1/3.
    assert bootstrap_ratio([2.0, 3.0], [1, 9], seed=0).value == pytest.approx(0.5)


def test_paired_interval_is_narrower_on_correlated_data():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 1, size=60)
    a = 2.0 + difficulty + rng.normal(0, 0.1, 60)
    b = 1.9 + difficulty + rng.normal(0, 0.1, 60)
    paired = bootstrap_mean_difference(a, b, seed=0)
    unpaired = np.hypot(width(bootstrap_mean(a, seed=0)), width(bootstrap_mean(b, seed=0)))
    assert paired.low < 0.1 < paired.high
    assert width(paired) < 0.25 * unpaired

    counts = rng.integers(10, 50, 60)
    ratio = bootstrap_ratio_difference(a * counts, counts, b * counts, counts, seed=0)
    assert ratio.value == pytest.approx((a * counts).sum() / counts.sum() - (b * counts).sum() / counts.sum())
    assert ratio.low < 0.1 < ratio.high
    assert width(ratio) < 0.25 * unpaired


def test_ratio_difference_with_different_counts():
    # 6/3 − 10/10
    assert bootstrap_ratio_difference([2, 4], [1, 2], [4, 6], [5, 5], seed=0).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("interval", "value"),
    [
        (bootstrap_mean([0.7] * 9, seed=0), 0.7),
        (bootstrap_mean([0.0] * 9, seed=0), 0.0),
        (bootstrap_ratio([0.3, 0.6, 2.1], [1, 2, 7], seed=0), 0.3),
        (bootstrap_mean_difference([1.0, 5.0], [1.0, 5.0], seed=0), 0.0),
        (bootstrap_ratio_difference([1.0, 5.0, 2.0], [3, 4, 5], [1.0, 5.0, 2.0], [3, 4, 5], seed=0), 0.0),
    ],
)
def test_constant_data_have_an_interval_of_no_width(interval, value):
    assert interval.value == pytest.approx(value)
    assert interval.low == interval.value == interval.high


@pytest.mark.parametrize(("value", "num_items"), [(0.0, 20), (1.0, 12), (0.0, 2)])
def test_shares_that_are_all_0_or_all_1_have_an_exact_interval(value, num_items):
    exact = stats.binomtest(int(value * num_items), num_items).proportion_ci(0.9, "exact")
    interval = bootstrap_mean([value] * num_items, seed=0, level=0.9, shares=True)
    assert interval == pytest.approx((value, exact.low, exact.high))
    # Averaged over seeds first: a prompt is one item, however often it was answered.
    assert bootstrap_mean([[value] * 5] * num_items, seed=0, level=0.9, shares=True) == interval


def test_equal_shares_between_0_and_1_leave_room_on_both_sides():
    others = 1 - 0.025 ** (1 / 9)
    assert bootstrap_mean([0.5] * 9, seed=0, shares=True) == pytest.approx((0.5, 0.5 - others / 2, 0.5 + others / 2))
    none = bootstrap_mean_difference([1.0] * 9, [1.0] * 9, seed=0, shares=True)
    assert none == pytest.approx((0, -others, others))
    whole = bootstrap_mean_difference([1.0] * 9, [0.0] * 9, seed=0, shares=True)
    assert whole == pytest.approx((1, 1 - 2 * others, 1))


def test_an_exact_interval_covers_a_share_that_is_never_seen():
    # The upper end is the share at which n items without one success have a probability of 2.5 %.
    high = bootstrap_mean([0.0] * 20, seed=0, shares=True).high
    assert (1 - high) ** 20 == pytest.approx(0.025)


def test_shares_that_differ_are_resampled_like_anything_else():
    values = np.random.default_rng(6).integers(0, 2, size=30)
    assert bootstrap_mean(values, seed=0, shares=True) == bootstrap_mean(values, seed=0)
    a, b = np.random.default_rng(7).integers(0, 2, size=(2, 30))
    assert bootstrap_mean_difference(a, b, seed=0, shares=True) == bootstrap_mean_difference(a, b, seed=0)


@pytest.mark.parametrize("shares", [False, True])
def test_one_prompt_says_nothing_about_others(shares):
    assert bootstrap_mean([0.4], seed=0) == (0.4, None, None)
    assert bootstrap_mean([1.0], seed=0, shares=shares) == (1.0, None, None)


def test_a_resample_without_tokens_gives_no_interval_instead_of_nan():
    interval = bootstrap_ratio([1.0, 0.0], [2, 0], seed=0)
    assert interval == (0.5, None, None)


def test_more_seeds_of_the_same_answers_do_not_narrow_the_interval():
    values = np.random.default_rng(2).normal(size=30)
    counts = np.random.default_rng(3).integers(1, 9, size=30)
    assert bootstrap_mean(np.tile(values[:, None], 5), seed=0) == pytest.approx(bootstrap_mean(values, seed=0))
    repeated = bootstrap_ratio(np.tile(values[:, None], 5), np.tile(counts[:, None], 5), seed=0)
    assert repeated == pytest.approx(bootstrap_ratio(values, counts, seed=0))


def test_the_seed_decides():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_a_block_of_resamples_does_not_change_the_result(monkeypatch):
    values = np.random.default_rng(5).normal(size=30)
    whole = bootstrap_mean(values, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 3000)
    assert bootstrap_mean(values, seed=1) == pytest.approx(whole, abs=0.02)

"""Values that can be found by hand, and variances that theory gives."""

import numpy as np
import pytest

from tdistill.resampling import Measured, percentile_interval, resample


def mean_of(values_RPS) -> Measured:
    values = np.array(values_RPS, float)
    return Measured(values, np.ones(values.shape[:2]))


def shares(values) -> dict[float, float]:
    found, counts = np.unique(values.round(9), return_counts=True)
    return dict(zip(found.tolist(), (counts / len(values)).tolist(), strict=True))


def near(share: float):
    # Four standard errors of a share of 9,999 resamples.
    return pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 9_999))


def test_a_value_is_a_ratio_of_sums_averaged_over_trainings():
    # Training 1: (2 + 3) / (1 + 9) = 0.5, training 2: (1 + 9) / 10 = 1.
    row = Measured(np.array([[[2.0], [3.0]], [[1.0], [9.0]]]), np.array([[1.0, 9.0], [1.0, 9.0]]))
    assert row.value == pytest.approx(0.75)


def test_two_prompts_are_drawn_with_replacement():
    # Both 0, one of each, both 1.
    assert shares(resample([mean_of([[[0], [1]]])], 0)[0]) == {0: near(1 / 4), 0.5: near(1 / 2), 1: near(1 / 4)}


def test_a_ratio_divides_what_was_drawn_by_the_tokens_of_what_was_drawn():
    row = Measured(np.array([[[2.0], [3.0]]]), np.array([[1.0, 9.0]]))
    drawn = shares(resample([row], 0)[0])
    assert drawn == {round(3 / 9, 9): near(1 / 4), 0.5: near(1 / 2), 2: near(1 / 4)}


def test_answers_of_a_prompt_stay_together():
    # Means 0 and 1 of the two prompts, whatever their seeds say.
    assert shares(resample([mean_of([[[-1, 1], [0, 2]]])], 0)[0]) == {0: near(1 / 4), 0.5: near(1 / 2), 1: near(1 / 4)}


def test_one_of_two_trainings_is_drawn():
    drawn = resample([mean_of([[[1], [1]], [[3], [3]]])], 0)[0]
    assert shares(drawn) == {1: near(1 / 2), 3: near(1 / 2)}
    assert percentile_interval(2.0, drawn, 0.95) == (2.0, 1.0, 3.0)


def test_differences_of_rows_are_paired_over_prompts():
    values = np.random.default_rng(0).normal(size=(1, 9, 3))
    a, b = resample([mean_of(values + 0.5), mean_of(values)], 0)
    assert a.std() > 0.1
    assert a - b == pytest.approx(0.5)


def test_a_row_added_changes_no_interval_of_another():
    rng = np.random.default_rng(1)
    one, other, third = (mean_of(rng.normal(size=(1, 9, seeds))) for seeds in (3, 3, 5))
    alone = resample([one, other], 0)
    assert resample([one, other, third], 0)[:2] == pytest.approx(alone)


def test_the_variance_over_few_trainings_is_that_of_their_mean():
    trainings = np.array([1.0, 2.0, 4.0])
    drawn = resample([mean_of(np.repeat(trainings, 4).reshape(3, 4, 1))], 0)[0]
    assert drawn.var() == pytest.approx(trainings.var(ddof=1) / 3, rel=0.05)


def test_rows_on_several_sets_of_prompts_have_the_same_trainings_in_one_resample():
    trainings = np.array([1.0, 2.0, 4.0])
    sets = [mean_of(np.repeat(trainings, num).reshape(3, num, 1)) for num in (500, 80)]
    one, other = (resample([mean_of([[[0.0]] * len(of.counts_RP[0])]), of], 0)[1] for of in sets)
    assert one == pytest.approx(other)
    # So the mean over sets is no more certain than one of them.
    assert ((one + other) / 2).var() == pytest.approx(trainings.var(ddof=1) / 3, rel=0.05)


def test_the_variance_over_prompts_and_seeds_is_that_of_the_mean():
    """Of 2,000 sets of 40 prompts and 3 seeds, with as much noise between seeds as between prompts."""
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, size=(2000, 40, 1)) + rng.normal(0, 1, size=(2000, 40, 3))
    true = values.mean((1, 2)).var()
    found = np.mean([resample([mean_of(one[None])], 0)[0].var() for one in values[:40]])
    assert found == pytest.approx(true, rel=0.15)


def test_a_resample_without_tokens_gives_no_interval():
    row = Measured(np.array([[[1.0], [0.0]]]), np.array([[2.0, 0.0]]))
    assert percentile_interval(row.value, resample([row], 0)[0], 0.95) == (0.5, None, None)

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from tdistill.errors import ModelLogitsError, TokenizerMismatchError, UnsupportedModelError
from tdistill.evaluation import bootstrap, states
from tdistill.evaluation.bootstrap import bootstrap_ratio, bootstrap_weighted
from tdistill.evaluation.exposure import PositionSums, exposure, kl_by_position
from tdistill.head import OutputHead


def sums(*rows):
    """One answer per prompt."""
    return PositionSums.gather([np.array(row, float) for row in rows], range(len(rows)), len(rows))


def test_the_excess_agrees_with_a_calculation_by_hand():
    # Own prefixes: position means 1, 3, 6 → R = 1, 4, 10. Teacher's: 1, 1, 2 → l ε(l) = 1, 2, 4.
    own = sums([0.5, 2.0, 6.0], [1.5, 4.0, 6.0])
    teacher = sums([1.0, 0.5, 2.0], [1.0, 1.5, 2.0])
    found = exposure(own, teacher, "bd")
    assert found.curve.kl_own_prefixes == (1.0, 3.0, 6.0)
    assert found.curve.kl_teacher_prefixes == (1.0, 1.0, 2.0)
    assert found.curve.excess == pytest.approx((0.0, 1.0, 1.5))
    assert found.excess is not None and found.excess.value == pytest.approx(1.5)
    assert found.kl_own.value == pytest.approx(10 / 3) and found.kl_teacher.value == pytest.approx(4 / 3)
    assert [point.length for point in found.curve.points] == [1, 2, 3]
    assert [point.value for point in found.curve.points] == pytest.approx([0.0, 1.0, 1.5])


def test_a_mean_is_over_the_answers_that_are_as_long():
    # Position 2: only the first prompt's answer is there, and its 8 is not diluted by the other's absence.
    own, teacher = sums([2.0, 8.0], [4.0]), sums([1.0, 2.0], [1.0, 4.0])
    curve = exposure(own, teacher, "bd", min_share=0.5).curve
    assert curve.kl_own_prefixes == (3.0, 8.0)
    assert curve.kl_teacher_prefixes == (1.0, 3.0)
    assert (curve.num_prompts_own, curve.num_prompts_teacher) == ((2, 1), (2, 2))
    assert curve.excess[-1] == pytest.approx(11 / 4 - 1)
    # Asked for all prompts, the curve ends before that position.
    assert len(exposure(own, teacher, "bd", min_share=1.0).curve.excess) == 1


def test_answers_of_one_prompt_are_pooled_in_it():
    values = [np.array([1.0, 5.0]), np.array([3.0]), np.array([10.0, 20.0, 30.0])]
    pooled = PositionSums.gather(values, [0, 0, 1], 2)
    np.testing.assert_array_equal(pooled.kl_PT, [[4.0, 5.0, 0.0], [10.0, 20.0, 30.0]])
    np.testing.assert_array_equal(pooled.count_PT, [[2, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(pooled.means(np.ones((1, 2))), [[14 / 3, 12.5, 30.0]])
    # A prompt that counts twice has twice the weight, and one that is not drawn has none.
    np.testing.assert_allclose(pooled.means(np.array([[0.0, 2.0]])), [[10.0, 20.0, 30.0]])


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 299)
    hits, truth = 0, (1.0 + 2.0 + 3.0 + 4.0) / 4 - 1
    for trial in range(150):
        rng = np.random.default_rng(trial)
        hard = rng.gamma(20.0, 1 / 20.0, size=(60, 1))  # a hard prompt is hard on both prefixes
        own = sums(*(hard * [1.0, 2.0, 3.0, 4.0] * rng.gamma(9.0, 1 / 9.0, size=(60, 4))))
        teacher = sums(*(hard * rng.gamma(9.0, 1 / 9.0, size=(60, 4))))
        interval = exposure(own, teacher, "s", seed=trial).excess
        hits += interval.low <= truth <= interval.high
    # 0.95 ± 4 standard errors (0.018).
    assert 0.87 <= hits / 150 <= 1.0


def test_the_two_parts_of_a_prompt_are_drawn_together():
    # Twice as far on its own prefixes, whatever the prompt: then prompts do not matter.
    rows = np.random.default_rng(0).gamma(2.0, size=(20, 3))
    interval = exposure(sums(*(2 * rows)), sums(*rows), "s").excess
    assert interval == pytest.approx((1.0, 1.0, 1.0))


def test_a_student_that_is_the_teacher_there_has_no_excess(caplog):
    found = exposure(sums([0.0, 1.0]), sums([0.0, 0.0]), "copy")
    assert found.excess is None and found.curve.excess == (None, None) and found.curve.points == ()
    assert "copy" in caplog.text


def test_weights_give_the_interval_that_sums_give():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(3, 1, 30), rng.integers(1, 9, 30)
    rows = []

    def statistic(weights):
        rows.append(len(weights))
        return (weights @ values) / (weights @ counts)

    left_out = statistic(1 - np.eye(30))
    by_weights = bootstrap_weighted(statistic, left_out, seed=5)
    assert by_weights == pytest.approx(bootstrap_ratio(values, counts, seed=5))
    # The resamples and the value itself: nothing is computed for every prompt a second time.
    assert sum(rows[1:]) == bootstrap.NUM_RESAMPLES + 1


@pytest.mark.parametrize("min_share", [0.2, 1.0])
def test_intervals_of_answers_of_all_lengths_are_those_of_scipy(min_share):
    rng = np.random.default_rng(3)
    own, teacher = (sums(*(rng.gamma(2.0, size=rng.integers(1, 7)) for _ in range(12))) for _ in range(2))
    found = exposure(own, teacher, "s", min_share=min_share, seed=2)
    length = len(found.curve.excess)
    assert (length > 1) == (min_share < 1)

    def excess(index):
        per_part = [
            np.where(part.count_PT[index].sum(0) > 0, part.kl_PT[index].sum(0) / part.count_PT[index].sum(0), 0.0)
            for part in (own, teacher)
        ]
        return per_part[0][:length].sum() / per_part[1][:length].sum() - 1

    with np.errstate(invalid="ignore"):
        expected = stats.bootstrap(
            (np.arange(12),),
            excess,
            vectorized=False,
            n_resamples=bootstrap.NUM_RESAMPLES,
            rng=np.random.default_rng(2),
        ).confidence_interval
    assert (found.excess.low, found.excess.high) == pytest.approx((expected.low, expected.high))


# ---- divergences along answers ----


def kl_by_hand(teacher, student, prompt, answer, temperature=1.0):
    """Float64, one unpadded sequence at a time, from the models' own logits."""
    ids = torch.tensor(np.concatenate([prompt, answer]), dtype=torch.long)[None]
    rows = []
    for model in (teacher, student):
        with torch.no_grad():
            z = copy.deepcopy(model).double()(ids).logits[0, len(prompt) - 1 : -1, :64].numpy() / temperature
        z = z - z.max(1, keepdims=True)
        rows.append(z - np.log(np.exp(z).sum(1, keepdims=True)))
    return (np.exp(rows[0]) * (rows[0] - rows[1])).sum(1)


@pytest.mark.parametrize(("batch_size", "block", "temperature"), [(1, 256, 1.0), (3, 2, 1.0), (4, 7, 0.6)])
def test_every_position_agrees_with_numpy(make_model, trajectories, monkeypatch, batch_size, block, temperature):
    monkeypatch.setattr(states, "_BLOCK", block)
    teacher, models = make_model(0), {"a": make_model(1), "b": make_model(2)}
    pairs = [(t.prompt_ids, t.response_ids) for t in trajectories]
    found = kl_by_position(teacher, models, pairs, vocab_size=64, batch_size=batch_size, temperature=temperature)
    for name, model in models.items():
        for (prompt, answer), value_T in zip(pairs, found[name], strict=True):
            np.testing.assert_allclose(value_T, kl_by_hand(teacher, model, prompt, answer, temperature), rtol=2e-4)


def test_no_more_than_one_block_of_distributions_is_held(make_model, trajectories, monkeypatch):
    monkeypatch.setattr(states, "_BLOCK", 3)
    sizes = []
    whole = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda head, hidden: sizes.append(len(hidden)) or whole(head, hidden))
    pairs = [(t.prompt_ids, t.response_ids) for t in trajectories]
    teacher, student = make_model(0), make_model(1)
    kl_by_position(teacher, {"s": student}, pairs, vocab_size=64, batch_size=4)
    # The first two are the check of the heads, on a probe of 8 tokens.
    assert sizes[:2] == [8, 8] and max(sizes[2:]) == 3
    assert sum(sizes[2:]) == 2 * sum(len(answer) for _, answer in pairs)


def test_a_copy_of_the_teacher_is_at_no_distance_anywhere(make_model, trajectories):
    teacher = make_model(0)
    pairs = [(t.prompt_ids, t.response_ids) for t in trajectories]
    for value_T in kl_by_position(teacher, {"same": copy.deepcopy(teacher)}, pairs, vocab_size=64)["same"]:
        np.testing.assert_array_equal(value_T, 0.0)


def test_models_that_cannot_be_measured_are_named(make_model, trajectories):
    pairs = [(t.prompt_ids % 60, t.response_ids % 60) for t in trajectories]
    with pytest.raises(TokenizerMismatchError, match=r"'small' has 60 .* 64"):
        kl_by_position(make_model(0), {"small": make_model(1, vocab_size=60)}, pairs, vocab_size=64)
    broken = make_model(1)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ModelLogitsError, match="'bd' gives NaN"):
        kl_by_position(make_model(0), {"bd": broken}, pairs, vocab_size=64)
    odd = make_model(1)
    odd.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedModelError, match=r"'odd'.*leave out evaluation\.exposure"):
        kl_by_position(make_model(0), {"odd": odd}, pairs, vocab_size=64)

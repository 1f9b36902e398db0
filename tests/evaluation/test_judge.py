import json
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from fake_judge import parts, serving
from pydantic import ValidationError

from tdistill.errors import ConfigError, JudgeError
from tdistill.evaluation.judge import JudgeSettings, check_judge, combine, judge_answers, read_verdict
from tdistill.evaluation.kept import Kept

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    """No proxy between the tests and their server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def settings(judge, **fields):
    return JudgeSettings(base_url=judge.base_url, model="judge", **{"retry_wait_s": 0.0, "timeout_s": 5.0, **fields})


def longer_is_better(body):
    _, first, second = parts(body)
    return "[[C]]" if len(first) == len(second) else "Because. [[A]]" if len(first) > len(second) else "[[B]]"


def test_a_judge_that_looks_at_the_answers_alone():
    prompts, a, b = ["p1", "p2", "p3"], ["long answer", "x", "same"], ["short", "longer", "size"]
    with serving(longer_is_better) as judge:
        found = judge_answers(prompts, a, b, settings(judge, max_tokens=77))
    assert found.score.tolist() == [1.0, 0.0, 0.5] and found.agrees.tolist() == [1.0, 1.0, 1.0]
    assert (found.num_malformed, found.num_unanswered) == (0, 0)
    # Each pair is asked in both orders, in the form of the interface.
    asked = sorted(parts(body) for _, _, body in judge.requests)
    assert asked == sorted([(p, *pair) for p, x, y in zip(prompts, a, b, strict=True) for pair in ((x, y), (y, x))])
    for path, headers, body in judge.requests:
        assert path == "/v1/chat/completions"
        assert "Authorization" not in headers and headers["Content-Type"] == "application/json"
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 77, 0)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_a_judge_that_prefers_a_place_is_found_out():
    with serving(lambda body: "[[A]]") as judge:
        found = judge_answers(["p", "q"], ["a", "b"], ["c", "d"], settings(judge))
    assert found.score.tolist() == [0.5, 0.5] and found.agrees.tolist() == [0.0, 0.0]


def test_replies_that_were_kept_are_not_asked_for_again(tmp_path):
    keep = partial(Kept(tmp_path, {"bd": "hash"}).get, "judge", "bd")
    answered = []

    def reply(body):
        answered.append(body)
        return longer_is_better(body) if len(answered) != 4 else (500, {}, b"")

    def ask(judge, **fields):
        return judge_answers(["p", "q"], ["long", "x"], ["y", "longer"], settings(judge, **fields), keep=keep)

    with serving(reply) as judge:
        assert ask(judge, num_parallel=1, max_attempts=1).num_unanswered == 1
        found = ask(judge)
        assert (len(answered), found.num_unanswered, found.score.tolist()) == (5, 0, [1.0, 0.0])
        ask(judge, max_tokens=9)
        assert len(answered) == 9


def test_replies_without_one_verdict_are_counted_and_not_interpreted():
    def reply(body):
        request, first, _ = parts(body)
        if request in ("none", "thought"):
            message = {"content": None} if request == "none" else {"reasoning_content": "hm"}
            return 200, {}, json.dumps({"choices": [{"message": message}]}).encode()
        return {"both": "[[A]] no, [[B]]", "word": "A", "half": "[[A]]" if first == "a" else "hm", "good": "[[C]]"}[
            request
        ]

    prompts = ["both", "word", "half", "good", "none", "thought"]
    with serving(reply) as judge:
        found = judge_answers(prompts, ["a"] * 6, ["b"] * 6, settings(judge))
    np.testing.assert_array_equal(found.judged, [False, False, False, True, False, False])
    assert (found.num_malformed, found.num_unanswered) == (9, 0)
    assert found.score[3] == 0.5


@pytest.mark.parametrize(
    ("order_ab", "order_ba", "expected"),
    [
        ("first", "second", (1.0, 1.0)),
        ("second", "first", (0.0, 1.0)),
        ("tie", "tie", (0.5, 1.0)),
        ("first", "first", (0.5, 0.0)),  # the place won
        ("first", "tie", (0.5, 0.0)),  # no win without both orders
        ("tie", "first", (0.5, 0.0)),
    ],
)
def test_a_win_needs_both_orders(order_ab, order_ba, expected):
    assert combine(order_ab, order_ba) == expected
    assert np.isnan(combine(order_ab, None)).all() and np.isnan(combine(None, order_ba)).all()


def test_the_same_verdict_twice_is_one_verdict():
    assert read_verdict("[[B]] ... so [[B]]") == "second"
    assert read_verdict("") is None and read_verdict("[[D]] [B]") is None


# ---- other servers ----


def test_extra_fields_are_added_changed_and_left_out():
    def reply(body):
        # As hosted models answer that want another limit and take no temperature.
        refused = {"max_tokens", "temperature"} & set(body)
        return (400, {}, b"Unsupported parameter") if refused else longer_is_better(body)

    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 900, "seed": 7, "top_p": 0.5,
             "chat_template_kwargs": {"enable_thinking": False, "unset": None}}  # fmt: skip
    with serving(reply) as judge:
        assert judge_answers(["p"], ["aa"], ["b"], settings(judge)).num_unanswered == 2
        judge.requests.clear()
        found = judge_answers(["p"], ["aa"], ["b"], settings(judge, extra_body=extra))
    assert found.score.tolist() == [1.0]
    sent = [{name: body[name] for name in body if name != "messages"} for _, _, body in judge.requests]
    expected = {"model": "judge", "max_completion_tokens": 900, "seed": 7, "top_p": 0.5,
                "chat_template_kwargs": {"enable_thinking": False, "unset": None}}  # fmt: skip
    assert sent == [expected, expected]


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "key",
        "token",
        "x-api-key",
        "Authorization",
        "auth_token",
        "password",
        "headers",
        "client_secret",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_no_key_stands_in_extra_fields(name, nested):
    extra = {"options": [{"inner": {name: KEY}}]} if nested else {name: KEY}
    with pytest.raises(ValidationError, match=rf"extra_body\.{name} looks like a key.*api_key_env") as caught:
        JudgeSettings(base_url="http://h/v1", model="m", extra_body=extra)
    assert all(KEY not in error["msg"] for error in caught.value.errors())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "other"}, r"extra_body\.model cannot be set: it is evaluation\.judge\.model\. Remove"),
        ({"messages": None}, r"extra_body\.messages cannot be set"),
        ({"stream": True}, r"extra_body\.stream cannot be set: replies are read as a whole"),
        ({"max_tokens": 9}, r"extra_body\.max_tokens cannot be set: it is evaluation\.judge\.max_tokens"),
        ({"top_p": float("nan")}, "not finite"),
    ],
)
def test_extra_fields_that_would_break_a_request_are_refused(extra, message):
    with pytest.raises(ValidationError, match=message):
        JudgeSettings(base_url="http://h/v1", model="m", extra_body=extra)


def test_what_a_server_rejects_is_quoted_with_the_remedy(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    reason = f"Unsupported\nparameter \x1b[31m'temperature' of {KEY} " + "x" * 500
    with serving(lambda body: (400, {}, reason.encode())) as judge, pytest.raises(JudgeError) as caught:
        check_judge(settings(judge, api_key_env="JUDGE_KEY"))
    message = str(caught.value)
    assert f"The judge at {judge.base_url} (evaluation.judge.base_url) rejects a request to model 'judge'" in message
    assert r"status 400: Unsupported parameter \x1b[31m'temperature' of *** xxx" in message
    assert "evaluation.judge.extra_body, such as {temperature: null}" in message and "Start the server" not in message
    assert KEY not in message and message.isprintable() and len(message) < 700
    assert len(judge.requests) == 1


def test_a_server_that_stays_busy_is_not_taken_for_a_wrong_address():
    with serving(lambda body: (503, {}, b"loading model")) as judge, pytest.raises(JudgeError) as caught:
        check_judge(settings(judge))
    assert "is not ready, status 503: loading model. Wait" in str(caught.value)


# ---- what goes wrong on the way ----


def test_a_passing_failure_is_tried_again():
    seen = {}

    def reply(body):
        seen[parts(body)] = seen.get(parts(body), 0) + 1
        return (503, {}, b"loading") if seen[parts(body)] < 3 else longer_is_better(body)

    with serving(reply) as judge:
        found = judge_answers(["p"], ["aa"], ["b"], settings(judge, max_attempts=3))
        assert found.score.tolist() == [1.0] and len(judge.requests) == 6
        seen.clear()
        found = judge_answers(["p"], ["aa"], ["b"], settings(judge, max_attempts=2))
    assert found.num_unanswered == 2 and not found.judged.any()


@pytest.mark.parametrize("raw", [b"<html>Bad gateway</html>", b"{}", b'{"choices": []}', b"[1]", b"\xff"])
def test_a_reply_that_is_no_completion_is_tried_again_and_not_kept(tmp_path, raw):
    keep, proxy = partial(Kept(tmp_path, {"bd": "hash"}).get, "judge", "bd"), [True]

    def reply(body):
        return (200, {"Content-Type": "text/html"}, raw) if proxy[0] else longer_is_better(body)

    with serving(reply) as judge:
        own = settings(judge, max_attempts=2)
        found = judge_answers(["p"], ["aa"], ["b"], own, keep=keep)
        assert (found.num_unanswered, found.num_malformed, len(judge.requests)) == (2, 0, 4)
        with pytest.raises(JudgeError, match=r"does not answer: no completion came back: .* correct the address"):
            check_judge(own)
        proxy[0] = False
        assert judge_answers(["p"], ["aa"], ["b"], own, keep=keep).score.tolist() == [1.0]


def test_a_request_that_the_server_cannot_take_is_not_tried_again_and_the_others_go_on():
    with serving(lambda body: (400, {}, b"too long") if parts(body)[0] == "p" else longer_is_better(body)) as judge:
        found = judge_answers(["p", "q"], ["aa", "bb"], ["c", "d"], settings(judge))
    assert len(judge.requests) == 4
    assert found.num_unanswered == 2 and found.num_malformed == 0
    np.testing.assert_array_equal(found.score, [np.nan, 1.0])


def test_a_slow_server_is_given_up(monkeypatch):
    with serving(lambda body: time.sleep(0.5) or "[[A]]") as judge:
        started = time.perf_counter()
        found = judge_answers(["p"], ["a"], ["b"], settings(judge, timeout_s=0.05, max_attempts=1, num_parallel=2))
        assert time.perf_counter() - started < 0.4
    assert found.num_unanswered == 2


def test_an_interrupt_sends_nothing_more(monkeypatch):
    class Interrupted:
        def __init__(self, **kwargs: Any) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("tdistill.evaluation.judge.tqdm", Interrupted)
    with serving(lambda body: time.sleep(0.01) or "[[A]]") as judge:
        with pytest.raises(KeyboardInterrupt):
            judge_answers(["p"] * 50, ["a"] * 50, ["b"] * 50, settings(judge, num_parallel=1))
        assert len(judge.requests) < 10


def test_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr("tdistill.evaluation.judge.sleep", waits.append)
    with serving(lambda body: (500, {}, b"")) as judge, pytest.raises(JudgeError):
        check_judge(settings(judge, max_attempts=4, retry_wait_s=0.5))
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "asked", "expected"),
    [
        (429, "7", [7.0, 7.0]),
        (503, " 1 ", [1.0, 1.0]),
        (429, "0", [0.5, 1.0]),
        (503, "86400", [60.0, 60.0]),
        (503, "9" * 400, [60.0, 60.0]),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", [0.5, 1.0]),
        (429, "-5", [0.5, 1.0]),
        (500, "7", [0.5, 1.0]),
    ],
)
def test_a_busy_server_is_given_the_time_that_it_asks_for(monkeypatch, status, asked, expected):
    waits = []
    monkeypatch.setattr("tdistill.evaluation.judge.sleep", waits.append)
    with serving(lambda body: (status, {"Retry-After": asked}, b"")) as judge, pytest.raises(JudgeError):
        check_judge(settings(judge, retry_wait_s=0.5))
    assert waits == expected


def test_a_server_that_is_not_there_is_named():
    with serving(longer_is_better) as judge:
        pass
    with pytest.raises(
        JudgeError, match=rf"{judge.base_url} \(evaluation\.judge\.base_url\) does not answer: .*refused"
    ):
        check_judge(settings(judge))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_at_once(status):
    with serving(lambda body: (status, {}, b'{"error": "no such model"}')) as judge:
        with pytest.raises(JudgeError, match=rf"refuses .* 'judge', status {status}: .*no such model.*Correct"):
            check_judge(settings(judge))
        assert len(judge.requests) == 1
        with pytest.raises(JudgeError):
            judge_answers(["p"] * 50, ["a"] * 50, ["b"] * 50, settings(judge))
    assert len(judge.requests) < 50


def test_a_good_server_passes_the_check_with_one_short_request():
    with serving(lambda body: "y") as judge:
        check_judge(settings(judge))
    assert [body["max_tokens"] for _, _, body in judge.requests] == [1]


# ---- the key ----


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with serving(lambda body: (401, {}, f"wrong key {KEY} was given".encode())) as judge:
        own = settings(judge, api_key_env="JUDGE_KEY")
        with pytest.raises(JudgeError) as caught:
            check_judge(own)
    assert judge.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) and "wrong key *** was given" in str(caught.value)
    assert KEY not in own.model_dump_json() and KEY not in repr(own)


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_does_not_carry_the_key_away(monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda body: "[[A]]") as other:
        away = {"Location": f"{other.base_url}/chat/completions"}
        with serving(lambda body: (status, away, b"")) as judge, pytest.raises(JudgeError, match=f"status {status}"):
            check_judge(settings(judge, api_key_env="JUDGE_KEY"))
    assert other.requests == []


def test_a_key_of_the_hub_is_not_sent_by_itself(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    with serving(lambda body: "y") as judge:
        check_judge(settings(judge))
    assert KEY not in str(judge.requests)


def test_a_missing_or_malformed_key_is_named_without_its_value(monkeypatch):
    own = JudgeSettings(base_url="http://localhost:1/v1", model="m", api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for call in (own.api_key, lambda: check_judge(own), lambda: judge_answers(["p"], ["a"], ["b"], own)):
        with pytest.raises(ConfigError, match=r"JUDGE_KEY .* is not set"):
            call()
    monkeypatch.setenv("JUDGE_KEY", "sk-a\nsk-b")
    with pytest.raises(ConfigError, match="JUDGE_KEY") as caught:
        own.api_key()
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_key_env": KEY}, "name of an environment variable"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "holds a user, a password"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "holds a user, a password"),
        ({"base_url": "localhost:8000/v1"}, r"base_url = 'localhost:8000/v1' is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"base_url": "http://ho st/v1"}, "is no address"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_attempts": 0}, "max_attempts"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message) as caught:
        JudgeSettings(**{"base_url": "http://localhost:8000/v1", "model": "m", **fields})
    for error in caught.value.errors():
        assert KEY not in error["msg"]


def test_an_address_may_end_as_servers_print_it():
    for address in ("http://h:8000/v1", "http://h:8000/v1/", "http://h:8000/v1/chat/completions"):
        assert JudgeSettings(base_url=address, model="m").base_url == "http://h:8000/v1"

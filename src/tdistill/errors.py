"""One hierarchy of errors, one class per kind of defect.

Every message names the thing, its value and the remedy. The command line prints the message alone and exits with
``exit_code``; a Python caller catches :class:`TDistillError` or one of its children.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TDistillError(Exception):
    """Base of all errors that tdistill raises on purpose."""

    exit_code = 1


class ConfigError(TDistillError):
    """A recipe, an override or a setting is not valid."""

    exit_code = 2


class DataFileError(TDistillError):
    """A prompt or text file is missing, unreadable or malformed."""

    exit_code = 3


class EmptyPromptSetError(DataFileError):
    """No prompt is left to work on."""


class PromptTooLongError(DataFileError):
    """A rendered prompt has more tokens than the limit."""


class ModelNotFoundError(TDistillError):
    """A model folder or hub name does not resolve to loadable weights."""

    exit_code = 4


class UnsupportedModelError(TDistillError):
    """The model has a part that tdistill would compute wrongly."""

    exit_code = 4


class TokenizerMismatchError(TDistillError):
    """Teacher, store and student do not share one tokenizer."""

    exit_code = 5


class ProbabilityRangeError(ConfigError):
    """p lies outside (0, 1] or above the store's p_max."""


class TeacherLogitsError(TDistillError):
    """The teacher returned NaN or infinite logits."""

    exit_code = 6


class ModelLogitsError(TDistillError):
    """A model under evaluation returned NaN logits or an infinite loss."""

    exit_code = 6


class StoreError(TDistillError):
    """Base of store defects."""

    exit_code = 7


class StoreCorruptError(StoreError):
    """A shard or the manifest is damaged, truncated or missing."""


class StoreIncompleteError(StoreError):
    """The folder holds an unfinished capture: shards without a manifest."""


class StoreIdentityError(StoreError):
    """The store was made by another teacher, tokenizer, template or sampling setting."""


class RunFolderError(TDistillError):
    """The output folder holds another run."""

    exit_code = 8


class TrainingStoppedError(TDistillError):
    """A phase ended before its last step."""


class NoSpaceError(TDistillError):
    """The disk has too little room for what is about to be written."""

    exit_code = 9


class JudgeError(TDistillError):
    """The judge of answers cannot be reached, or refuses the request."""

    exit_code = 10


class DomainError(TDistillError):
    """A hyperparameter of an objective lies outside its domain."""

    exit_code = 2


class NonFiniteLossError(TDistillError):
    """The loss or a weight became NaN or infinite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``, else the list of known names.

    >>> did_you_mean("alhpa", ["alpha", "gamma"])
    " Did you mean 'alpha'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."

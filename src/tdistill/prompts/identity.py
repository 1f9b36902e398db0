"""Which tokenizer is it, which tokens end an answer, and does a model fit it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tdistill.errors import ConfigError, TokenizerMismatchError

# Parts of a tokenizer's JSON that do not decide which ids a text gets.
_WITHOUT_EFFECT = ("version", "truncation", "padding", "decoder")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that decides token ids: the same after saving and loading, and whatever the padding settings.

    Args:
        tokenizer: a transformers tokenizer. One with a ``tokenizers`` backend is hashed by its whole pipeline, any
            other by its class, vocabulary and added tokens.
    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        for part in _WITHOUT_EFFECT:
            facts.pop(part, None)
        # A token counts as special or not for decoding only; naming an existing token as padding changes the mark.
        facts["added_tokens"] = [
            {name: value for name, value in token.items() if name != "special"} for token in facts["added_tokens"]
        ]
    else:
        facts = {
            "class": type(tokenizer).__name__,
            "vocab": tokenizer.get_vocab(),
            "added_tokens": {str(token): index for index, token in tokenizer.added_tokens_decoder.items()},
        }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def end_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation settings, then the tokenizer's own, each once.

    Args:
        generation_config: anything with ``eos_token_id`` (an integer, a list of them, or None), or None.
        tokenizer: its ``eos_token_id`` comes last.
    Returns:
        At least one token id.
    Raises:
        ConfigError: neither names an end token.
    """
    ids: list[int] = []
    for owner in (generation_config, tokenizer):
        found = getattr(owner, "eos_token_id", None)
        ids += found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    if not ids:
        raise ConfigError(
            "No end token: eos_token_id is unset in the generation settings and in the tokenizer, so no answer could "
            'ever end. Set "eos_token_id" in the model folder\'s generation_config.json, or "eos_token" in its '
            "tokenizer_config.json."
        )
    return tuple(dict.fromkeys(int(i) for i in ids))


def num_token_ids(tokenizer: Any) -> int:
    """One more than the largest token id; more than the tokens there are where ids have holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def check_same_tokenizer(expected_sha256: str, tokenizer: Any, who: str) -> None:
    """Raise TokenizerMismatchError unless ``tokenizer``, which belongs to ``who``, has the expected hash."""
    found = tokenizer_sha256(tokenizer)
    if found != expected_sha256:
        raise TokenizerMismatchError(
            f"The tokenizer of {who} (sha256 {found[:16]}, {len(tokenizer)} tokens) is not the expected one "
            f"(sha256 {expected_sha256[:16]}). Token ids are only comparable under one tokenizer: take models that "
            "share it, or capture a new store."
        )


def check_vocabulary(model_vocab_size: int, tokenizer: Any, who: str) -> None:
    """Raise TokenizerMismatchError unless the model ``who`` has a row for every token; padding rows are allowed."""
    if model_vocab_size < (needed := num_token_ids(tokenizer)):
        raise TokenizerMismatchError(
            f"{who} has {model_vocab_size} vocabulary rows, fewer than the tokenizer's {needed} tokens. "
            "Use the tokenizer that the model was trained with, or resize the model's embeddings."
        )

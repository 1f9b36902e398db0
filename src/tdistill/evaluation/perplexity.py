"""Perplexity of held-out plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdistill.errors import ConfigError, EmptyPromptSetError
from tdistill.evaluation.batching import length_sorted
from tdistill.evaluation.bootstrap import Interval, bootstrap_ratio
from tdistill.evaluation.divergence import require_finite
from tdistill.evaluation.states import blocks, log_probs, open_head, response_states
from tdistill.prompts import read_texts

# exp of more is no float64.
_LARGEST_EXPONENT = 700.0


class PerplexitySettings(BaseModel):
    """Which text is measured, and how long documents are cut.

    Attributes:
        text: path of a ``.jsonl`` file of objects with ``text``, one document each, or ``package:NAME/FILE``.
        window_tokens: tokens that a model reads at once.
        stride_tokens: tokens by which the window moves inside a longer document.
        max_documents: only the first ones, or None for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1)
    window_tokens: int = Field(default=512, ge=2)
    stride_tokens: int = Field(default=256, ge=1)
    max_documents: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _windows_overlap(self) -> PerplexitySettings:
        if self.stride_tokens >= self.window_tokens:
            raise ValueError(
                f"stride_tokens = {self.stride_tokens} leaves nothing to read before the first token of a window of "
                f"window_tokens = {self.window_tokens}; use half of it"
            )
        return self

    def read(self) -> list[str]:
        """The documents that are not empty.

        Raises:
            DataFileError: missing or malformed file; names the line.
            EmptyPromptSetError: no document in it.
        """
        texts = [text for text in read_texts(self.text, "evaluation.perplexity.text") if text.strip()]
        if not texts:
            raise EmptyPromptSetError(
                f"{self.text} (evaluation.perplexity.text) holds empty texts only. Add lines such as "
                '{"text": "Hello."}.'
            )
        return texts[: self.max_documents]


@dataclass(frozen=True)
class Document:
    """One text as tokens, and its size.

    Attributes:
        token_ids: int64 [1 + T]: the token that begins every document, then its own.
        num_words: parts between white space.
        num_bytes: bytes in UTF-8.
    """

    token_ids: np.ndarray
    num_words: int
    num_bytes: int


def tokenize_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Tokens of each text after the token that begins a document: the tokenizer's BOS, or its EOS if it has none.

    Raises:
        ConfigError: the tokenizer has neither.
        EmptyPromptSetError: no text has a token.
    """
    special: Any = tokenizer
    first = special.bos_token_id if special.bos_token_id is not None else special.eos_token_id
    if first is None:
        raise ConfigError(
            "The tokenizer has neither a BOS nor an EOS token, so the first token of a text has nothing before it. "
            "Leave out evaluation.perplexity, or set one in the tokenizer's folder."
        )
    documents = []
    for text in texts:
        # Not cut here, so the length that the tokenizer warns about is no limit.
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            documents.append(Document(np.array([first, *ids], dtype=np.int64), len(text.split()), len(text.encode())))
    if not documents:
        raise EmptyPromptSetError("No text has a token. Name a file of texts in the language of the tokenizer.")
    return documents


def windows(token_ids: np.ndarray, window: int, stride: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Context and scored tokens of each window over one document; every token but the first is scored once.

    The first window scores all that it holds, each later one the ``stride`` tokens that it adds.

    >>> [(c.tolist(), s.tolist()) for c, s in windows(np.arange(8), window=4, stride=2)]
    [([0], [1, 2, 3]), ([2, 3], [4, 5]), ([4, 5], [6, 7])]
    """
    pairs, begin, end = [], 1, window
    while begin < len(token_ids):
        pairs.append((token_ids[max(0, end - window) : begin], token_ids[begin:end]))
        begin, end = end, end + stride
    return pairs


def text_losses(
    models: Mapping[str, PreTrainedModel],
    documents: Sequence[Document],
    *,
    vocab_size: int,
    window_tokens: int = 512,
    stride_tokens: int = 256,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of whole documents.

    −Σ_{t≥1} log π(x_t | x_{<t}), the context cut to the window.  Source: windows that overlap, as in
    https://huggingface.co/docs/transformers/perplexity; the token before the first one as in lm-eval's
    ``loglikelihood_rolling``.
    Differs from the source: documents are never joined, so that each can be resampled; a window that reaches the end
    of a document is shorter; logits are computed a block of positions at a time.

    Args:
        models: name → causal language model.
        documents: see :func:`tokenize_documents`.
        vocab_size: tokens of the tokenizer; rows of a padded output matrix beyond it get no probability.
        window_tokens: see :class:`PerplexitySettings`.
        stride_tokens: below ``window_tokens``.
        batch_size: windows of one forward pass.
        progress: show bars with tokens per second.
    Returns:
        Name → float64 [documents], nats.
    Raises:
        ConfigError: a window is longer than what a model was made for; names the model.
        ModelLogitsError: NaN or infinite; names the model and the document.
        UnsupportedModelError, TokenizerMismatchError: see :func:`~tdistill.evaluation.states.open_head`.
    """
    for name, model in models.items():
        check_window(model, name, window_tokens)
    heads = {name: open_head(model, name, vocab_size) for name, model in models.items()}
    parts = [
        (index, pair)
        for index, document in enumerate(documents)
        for pair in windows(document.token_ids, window_tokens, stride_tokens)
    ]
    batches = length_sorted([len(context) + len(scored) for _, (context, scored) in parts], batch_size)
    losses = {name: np.zeros(len(documents)) for name in models}
    num_tokens = sum(len(scored) for _, (_, scored) in parts)
    for name, model in models.items():
        with tqdm(total=num_tokens, desc=f"text, {name}", unit="token", disable=not progress) as bar:
            for batch in batches:
                chosen = [parts[index][1] for index in batch]
                document_N = np.repeat([parts[index][0] for index in batch], [len(scored) for _, scored in chosen])
                taken_N = torch.from_numpy(np.concatenate([scored for _, scored in chosen]))
                states_ND = response_states(model, chosen)
                for block in blocks(len(taken_N)):
                    rows_CV = log_probs(heads[name], states_ND[block], vocab_size)
                    nll_C = -rows_CV.gather(1, taken_N[block].to(rows_CV.device)[:, None]).squeeze(1)
                    losses[name] += np.bincount(
                        document_N[block], weights=nll_C.cpu().double().numpy(), minlength=len(documents)
                    )
                bar.update(len(taken_N))
        require_finite(losses[name], name, [f"document {index}" for index in range(len(documents))])
    return losses


def check_window(model: PreTrainedModel, name: str, window_tokens: int) -> None:
    """Raise ConfigError if a window is longer than what a model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window_tokens > limit:
        raise ConfigError(
            f"evaluation.perplexity.window_tokens = {window_tokens}, but model '{name}' was made for {limit} tokens. "
            f"Use {limit} at most."
        )


def perplexity(
    losses_nats: np.ndarray, documents: Sequence[Document], seed: int, level: float = 0.95
) -> dict[str, Interval]:
    """Losses of documents as the usual numbers, with intervals over documents.

    With L the loss of all documents together: L/tokens, exp(L/tokens), exp(L/words), L/(bytes · ln 2). The last two do
    not depend on the tokenizer.

    Args:
        losses_nats: float [documents], see :func:`text_losses`.
        documents: the same ones.
        seed: seed of the resampling of documents.
        level: confidence level.
    Returns:
        ``text_nll``, ``text_perplexity``, ``text_word_perplexity`` and ``text_bits_per_byte``. One of the
        perplexities is left out where it would be infinite: in text without white space a word is a whole document.
    """
    tokens = [len(document.token_ids) - 1 for document in documents]
    words = [document.num_words for document in documents]
    num_bytes = [document.num_bytes for document in documents]
    found = {
        "text_nll": bootstrap_ratio(losses_nats, tokens, seed, level),
        "text_bits_per_byte": bootstrap_ratio(losses_nats / math.log(2), num_bytes, seed, level),
    }
    per_unit = {
        "text_perplexity": found["text_nll"],
        "text_word_perplexity": bootstrap_ratio(losses_nats, words, seed, level),
    }
    for metric, interval in per_unit.items():
        if max(end for end in interval if end is not None) < _LARGEST_EXPONENT:
            # exp rises, so the ends of an interval stay its ends.
            value, low, high = (None if end is None else math.exp(end) for end in interval)
            assert value is not None
            found[metric] = Interval(value, low, high)
    return found

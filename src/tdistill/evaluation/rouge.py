"""Rouge-L as the literature reports it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

_WORD = re.compile("[a-z0-9]")


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def has_words(text: str) -> bool:
    """Whether Rouge-L sees anything of a text: letters of other scripts are no words to it."""
    return _WORD.search(text.lower()) is not None


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F1 of an answer, the largest over the references.

    F1 = 2PR/(P + R), P = LCS/|answer|, R = LCS/|reference|, over lower-cased, Porter-stemmed words.
    Source: Lin 2004, https://aclanthology.org/W04-1013; settings of arXiv 2505.20335 (``rouge-score``, stemmer on).

    Args:
        answer: generated text.
        references: at least one text.
    Returns:
        In [0, 1]; 0 for an answer without words. A word is made of a to z and 0 to 9 alone: see :func:`has_words`.
    """
    return float(_scorer().score_multi(list(references), answer)["rougeL"].fmeasure)

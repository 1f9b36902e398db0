"""Rouge-L as the literature reports it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F1 of an answer, the largest over the references.

    F1 = 2PR/(P + R), P = LCS/|answer|, R = LCS/|reference|, over lower-cased, Porter-stemmed words.
    Source: Lin 2004, https://aclanthology.org/W04-1013; settings of arXiv 2505.20335 (``rouge-score``, stemmer on).

    Args:
        answer: generated text.
        references: at least one text.
    Returns:
        In [0, 1]; 0 for an answer without words.
    """
    return float(_scorer().score_multi(list(references), answer)["rougeL"].fmeasure)

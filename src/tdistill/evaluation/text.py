"""Counts on one answer. All are over token ids, the end token included, as a store keeps them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def distinct_bigrams(token_ids: np.ndarray) -> tuple[int, int]:
    """Numbers of distinct bigrams and of all bigrams inside one answer.

    distinct-2 = Σ distinct / Σ all, over answers.  Source: Li et al. 2016, arXiv 1510.03055, §5.
    Differs from the source: bigrams of token ids instead of words, distinct inside each answer instead of over all
    answers together, so that the value does not depend on the number of answers and prompts can be resampled; it
    measures repetition, not sameness between answers.

    >>> distinct_bigrams(np.array([5, 6, 5, 6, 5]))
    (2, 4)
    """
    pairs = list(pairwise(token_ids.tolist()))
    return len(set(pairs)), len(pairs)
